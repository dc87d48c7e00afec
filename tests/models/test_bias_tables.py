"""Resized position tables against SciPy's splines, torch's bicubic pictures and what must not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline

from models.backbones.bias_tables import resize_bias_table, resize_position_embedding


def table_of(window: int, heads: int = 3, extra: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(window)
    return torch.randn((2 * window - 1) ** 2 + extra, heads, generator=generator)


@pytest.mark.parametrize("method", ["bicubic", "geometric"])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(("old", "new"), [(7, 12), (7, 7), (12, 7), (2, 5), (1, 4), (1, 1), (4, 1), (7, 40)])
def test_shapes_and_class_token_rows(method: str, extra: int, old: int, new: int) -> None:
    table = table_of(old, extra=extra)
    resized = resize_bias_table(table, new, method)  # type: ignore[arg-type]
    assert resized.shape == ((2 * new - 1) ** 2 + extra, 3)
    assert resized.isfinite().all()
    assert resized.dtype == table.dtype
    if extra:
        assert torch.equal(resized[-extra:], table[-extra:])
    if old == new:
        assert torch.equal(resized, table)
        assert resized.data_ptr() != table.data_ptr()


def test_bicubic_stretches_the_picture_of_the_table() -> None:
    table = table_of(7)
    picture = table.t().reshape(1, 3, 13, 13)
    expected = F.interpolate(picture, size=(23, 23), mode="bicubic").reshape(3, -1).t()
    torch.testing.assert_close(resize_bias_table(table, 12), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("old", "new"), [(6, 7), (7, 12), (7, 14), (12, 24)])
def test_geometric_equals_scipys_splines_at_the_released_knots(old: int, new: int) -> None:
    table = table_of(old)
    low, high = 1.01, 1.5  # the bisection of the SimMIM release
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old - 1)) / (1 - q) > new - 1 else (q, high)
    side = np.cumsum(q ** np.arange(old - 1))
    knots = np.concatenate([-side[::-1], [0.0], side])
    at = np.clip(np.arange(-(new - 1), new), knots[0], knots[-1])
    resized = resize_bias_table(table.double(), new, "geometric").reshape(2 * new - 1, 2 * new - 1, 3)
    for head in range(3):
        picture = table[:, head].double().reshape(2 * old - 1, 2 * old - 1).numpy()
        expected = RectBivariateSpline(knots, knots, picture)(at, at)
        np.testing.assert_allclose(resized[:, :, head].numpy(), expected, atol=1e-3)
    centre = resized[new - 2 : new + 1, new - 2 : new + 1]  # offsets -1, 0, 1 keep their biases
    own = table.double().reshape(2 * old - 1, 2 * old - 1, 3)[old - 2 : old + 1, old - 2 : old + 1]
    torch.testing.assert_close(centre, own, atol=1e-9, rtol=0)


def test_geometric_reduction_keeps_each_offsets_bias() -> None:
    table = table_of(12)
    expected = table.reshape(23, 23, 3)[5:18, 5:18].flatten(0, 1)
    torch.testing.assert_close(resize_bias_table(table, 7, "geometric"), expected)


@pytest.mark.parametrize(
    ("shape", "window", "method", "message"),
    [
        ((170, 3), 7, "bicubic", r"\(170, 3\) is not one of relative positions"),
        ((2, 3), 7, "bicubic", "is not one of"),
        ((169,), 7, "bicubic", "is not one of"),
        ((169, 3), 0, "bicubic", "window is 0"),
        ((169, 3), 7, "linear", "'linear', but must be one of bicubic, geometric"),
    ],
)
def test_mistakes(shape: tuple[int, ...], window: int, method: str, message: str) -> None:
    table = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        resize_bias_table(table, window, method)  # type: ignore[arg-type]


def test_position_embedding_keeps_the_class_token() -> None:
    embedding = torch.randn(1, 17, 8)
    resized = resize_position_embedding(embedding, (6, 3))
    assert resized.shape == (1, 19, 8)
    assert torch.equal(resized[:, 0], embedding[:, 0])
    assert resize_position_embedding(embedding, (4, 4)) is embedding
    constant = resize_position_embedding(torch.ones(1, 17, 8), (7, 7))
    torch.testing.assert_close(constant, torch.ones(1, 50, 8))
    with pytest.raises(ValueError, match=r"\(1, 18, 8\) is not that of a square grid"):
        resize_position_embedding(torch.zeros(1, 18, 8), (4, 4))
