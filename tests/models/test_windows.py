"""The geometry of windows against definitions by loops and the coordinates measured on the released code."""

from __future__ import annotations

import math

import pytest
import torch

from models.backbones.windows import (
    MASKED_LOGIT,
    WindowGeometry,
    relative_coords,
    relative_index,
    shift_mask,
)


@pytest.mark.parametrize(
    ("window", "pretrained", "largest"),
    [
        (8, 8, 1.0566),
        (16, 12, 1.1913),
        (24, 12, 1.3826),
        (8, 6, 1.2029),
        (12, 6, 1.4057),
        (16, 8, 1.3938),
        (32, 12, 1.5191),
    ],
)
def test_largest_coordinate(window: int, pretrained: int, largest: float) -> None:
    coords = relative_coords(window, pretrained)
    assert coords.shape == ((2 * window - 1) ** 2, 2)
    assert coords.abs().max().item() == pytest.approx(largest, abs=5e-5)


@pytest.mark.parametrize(("window", "pretrained"), [(1, 1), (1, 8), (4, 1)])
def test_windows_of_one_token_have_finite_coordinates(window: int, pretrained: int) -> None:
    coords = relative_coords(window, pretrained)
    assert coords.isfinite().all()
    assert (coords[len(coords) // 2] == 0).all()


def test_index_leads_each_pair_to_its_offset() -> None:
    window = 3
    coords = relative_coords(window, window)
    index = relative_index(window).view(9, 9)
    for query in range(9):
        for key in range(9):
            for axis, offset in enumerate((query // 3 - key // 3, query % 3 - key % 3)):
                scaled = 8 * offset / (window - 1)
                expected = math.copysign(math.log2(1 + abs(scaled)) / 3, scaled)
                assert coords[index[query, key], axis].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (4, 4), (4, 8)])
def test_shift_mask_joins_exactly_the_pairs_that_were_neighbours(height: int, width: int) -> None:
    window, shift = 4, 2
    mask = shift_mask(height, width, window, shift)
    assert mask.shape == (height // window * (width // window), 1, window**2, window**2)
    for index in range(mask.shape[0]):
        top, left = index // (width // window) * window, index % (width // window) * window
        tokens = [(top + t // window, left + t % window) for t in range(window**2)]
        for query, (row, column) in enumerate(tokens):
            for key, (other_row, other_column) in enumerate(tokens):
                # Undo the roll: the two were neighbours if their distance is still that within the window.
                distance = [
                    (a + shift) % size - (b + shift) % size
                    for a, b, size in ((row, other_row, height), (column, other_column, width))
                ]
                joined = distance == [row - other_row, column - other_column]
                assert mask[index, 0, query, key].item() == (0.0 if joined else MASKED_LOGIT)


def test_mask_beats_every_possible_logit() -> None:
    logits = torch.tensor([-100.0, 116.0 + MASKED_LOGIT])  # lowest own logit, highest foreign one
    assert logits.softmax(0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("grid", "window", "rule", "expected"),
    [
        (16, 8, "shrink", (8, 4)),
        (8, 8, "shrink", (8, 0)),
        (6, 8, "shrink", (6, 0)),
        (8, 8, "pad", (8, 4)),
        (6, 8, "pad", (8, 4)),
        (7, 3, "pad", (3, 1)),
        (4, 1, "shrink", (1, 0)),
    ],
)
def test_rules(grid: int, window: int, rule: str, expected: tuple[int, int]) -> None:
    geometry = WindowGeometry(grid, window, rule)  # type: ignore[arg-type]
    assert (geometry.window, geometry.shift) == expected
    assert (geometry.shift_mask is None) == (expected[1] == 0)


def test_mask_of_another_size_is_made_on_the_fly() -> None:
    geometry = WindowGeometry(8, 4, "pad")
    assert geometry.mask_for(8, 8) is geometry.shift_mask
    torch.testing.assert_close(geometry.mask_for(5, 9), shift_mask(8, 12, 4, 2))


def test_tables_survive_a_change_of_type_and_materialisation() -> None:
    expected = WindowGeometry(8, 4, "shrink")
    with torch.device("meta"):
        materialized = WindowGeometry(8, 4, "shrink").to_empty(device="cpu")
    for geometry in (WindowGeometry(8, 4, "shrink").half(), materialized):
        for name, table in expected.named_buffers():
            torch.testing.assert_close(geometry.get_buffer(name), table, atol=0, rtol=0)
