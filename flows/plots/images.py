"""Grids of images: samples, mistakes, what a pretext makes of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flows.plots.frame import (
    INK,
    new_figure,
    render,
)

if TYPE_CHECKING:
    pass


def image_grid(
    images: Sequence[NDArray[np.uint8]], captions: Sequence[str], columns: int = 8, title: str = ""
) -> bytes:
    """PNG of RGB images (H, W, 3) uint8, each under its caption (a line break makes two lines).

    Raises:
        ValueError: no image, or not one caption for each.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"need one caption per image, got {len(images)} images and {len(captions)} captions")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    lines = 1 + max(caption.count("\n") for caption in captions)
    top = 0.45 if title else 0.05
    height = rows * (1.3 + 0.19 * lines) + top
    figure = new_figure(1.42 * columns, height)
    figure.set_layout_engine("none")
    if title:
        figure.text(0.008, 1 - 0.14 / height, title, fontsize=11, fontweight="bold", color=INK, va="top")
    cells = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": 0.01,
            "right": 0.99,
            "bottom": 0.04 / height,
            "top": 1 - (top + 0.19 * lines) / height,
            "hspace": 0.17 * lines + 0.06,
            "wspace": 0.1,
        },
    )
    for axes in cells.flat:
        axes.set_axis_off()
    for axes, image, caption in zip(cells.flat, images, captions, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8.5, color=INK, pad=3, parse_math=False)
    return render(figure, "png", "images")


def triple_grid(
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    third: NDArray[np.uint8],
    *,
    titles: tuple[str, str, str] = ("input", "masked", "reconstruction"),
) -> bytes:
    """PNG of three pictures of each image side by side, one image per row.

    From four images on the rows go into two blocks beside each other, which suits screens better.

    Args:
        first, second, third: (N, S, S, 3) uint8 each, N >= 1.
    """
    stacked = np.stack([first, second, third], axis=1)  # (N, 3, S, S, 3)
    number, blocks = len(stacked), 1 if len(stacked) < 4 else 2
    rows = math.ceil(number / blocks)
    columns = 3 * blocks + (blocks - 1)  # a narrow empty column between the blocks
    widths = [0.18 if column == 3 else 1.0 for column in range(columns)]
    cell, top = 1.35, 0.36
    figure = new_figure(cell * sum(widths), cell * rows + top)
    figure.set_layout_engine("none")
    cells = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": 0.01,
            "right": 0.99,
            "bottom": 0.01,
            "top": 1 - top / (cell * rows + top),
            "hspace": 0.06,
            "wspace": 0.06,
            "width_ratios": widths,
        },
    )
    for axes in cells.flat:
        axes.set_axis_off()
    for index, triple in enumerate(stacked):
        block, row = divmod(index, rows)
        for column, (image, title) in enumerate(zip(triple, titles, strict=True)):
            axes = cells[row, 4 * block + column]
            axes.imshow(image)
            if row == 0:
                axes.set_title(title, fontsize=10, color=INK, pad=6)
    return render(figure, "png", "examples")
