"""What all pictures share: figure, axes, inks, reproducible bytes."""

from __future__ import annotations

import io
import threading
import warnings
from typing import Any, Literal

Format = Literal["png", "svg"]

INK, MUTED, GRID = "#24292f", "#6e7781", "#d8dee4"
SERIES = ("#3a6ea5", "#c8773a", "#5b8c5a", "#8a6bab", "#b5525c", "#4f9a9f")
COLOURS = (INK, MUTED, GRID, *SERIES)
"""Every colour that text, lines and marks may have."""

PNG_DPI = 144
_drawing = threading.Lock()  # matplotlib's settings are per process, and Prefect draws from threads


def new_figure(width: float, height: float) -> Any:
    """An empty figure of `width` x `height` inches that draws without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Any, format: Format, name: str) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # SVG: text as text; the salt (instead of a random one) and no date make the bytes reproducible
    settings = {"svg.fonttype": "none", "svg.hashsalt": name}
    metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    with _drawing, rc_context(settings), warnings.catch_warnings():
        # class names in scripts that the bundled font lacks: boxes in PNG, the reader's own fonts in SVG
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        colour = "none" if format == "svg" else "white"
        figure.savefig(buffer, format=format, dpi=PNG_DPI, facecolor=colour, metadata=metadata)
    return buffer.getvalue()


def style_axes(axes: Any, title: str = "", xlabel: str = "", ylabel: str = "", grid: str = "both") -> None:
    """The house style: title left, two spines, a light grid behind the data, units on the axes."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.set_facecolor("none")
    axes.tick_params(colors=MUTED, labelsize=9, length=0, pad=4)
    axes.tick_params(which="minor", length=0, labelbottom=False, labelleft=False)
    if grid != "none":
        axes.grid(True, axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(xlabel, fontsize=9.5, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9.5, color=MUTED)


def draw_legend(axes: Any, **options: Any) -> None:
    legend = axes.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.6, **options)
    legend.set_zorder(5)


def plain_ticks(axis: Any) -> None:
    """Numbers such as 0.001 and 20,000 instead of offsets and powers of ten."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: write_number(value)))


def write_number(value: float) -> str:
    """At most four significant digits, thousands separated."""
    if value and abs(value) < 1e-4:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """`3.2 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
