"""The row table: what it says about rows, and what it makes of bytes that are not one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.errors import DataError
from flows.serving.lamina.rows import RowKind, RowTable, Span, TableDelta

TABLE = RowTable(
    (Span(7, 40), Span(2, 16, 3, RowKind.CHUNK), Span(0, 0)),
    (TableDelta(2, 1, (9, 4)), TableDelta(0, 0, ()), TableDelta(7, 2, (4_000_000_000,))),
)


def test_rows_lie_request_after_request_at_consecutive_positions():
    assert TABLE.rows == 5
    assert TABLE.slots.tolist() == [7, 2, 2, 2, 0]
    assert TABLE.positions.tolist() == [40, 16, 17, 18, 0]
    assert TABLE.starts.tolist() == [0, 1, 4, 5]
    assert TABLE.last_rows.tolist() == [0, 3, 4]


def test_an_empty_table_has_no_rows():
    empty = RowTable.decode(RowTable(()).encode())
    assert empty.rows == 0
    assert empty.positions.shape == empty.slots.shape == empty.last_rows.shape == (0,)


def test_a_part_keeps_the_order_and_says_which_rows_it_holds():
    part, rows = TABLE.select([0, 2])
    assert [span.slot for span in part.spans] == [2, 0]
    assert rows.tolist() == [1, 2, 3, 4]
    assert {delta.slot for delta in part.deltas} == {0, 2}
    np.testing.assert_array_equal(TABLE.positions[rows], part.positions)


def test_it_travels_unchanged_and_every_cut_is_noticed():
    payload = TABLE.encode()
    assert RowTable.decode(payload) == TABLE
    for length in range(len(payload)):
        with pytest.raises(DataError):
            RowTable.decode(payload[:length])
    with pytest.raises(DataError, match="too many"):
        RowTable.decode(payload + b"\0")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_other_bytes_are_one_clear_error(payload):
    try:
        table = RowTable.decode(payload)
    except DataError:
        return
    assert table.rows <= 1 << 16


@pytest.mark.parametrize(
    ("spans", "deltas", "words"),
    [
        ((Span(1, 0), Span(1, 1)), (), "two spans"),
        ((Span(1, 0, 2),), (), "decodes 2 rows"),
        ((Span(-1, 0),), (), "no meaning"),
        ((Span(1, 0, 0, RowKind.CHUNK),), (), "no meaning"),
        ((Span(1, 2**31 - 1),), (), "beyond"),
        ((Span(1, 0, 70_000, RowKind.CHUNK),), (), "beyond"),
        ((), (TableDelta(1, 2**27, (3,)),), "too long"),
        ((), (TableDelta(1, 0, (-3,)),), "32 bits"),
    ],
)
def test_impossible_tables_are_refused_where_they_are_made(spans, deltas, words):
    with pytest.raises(DataError, match=words):
        RowTable(spans, deltas)
