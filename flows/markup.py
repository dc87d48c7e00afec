"""Pictures and numbers as parts of an HTML page: data URIs, inline SVG in its colours, readable values."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flows import plots

INK_NAMES = ("ink", "muted", "grid", *(f"series-{index + 1}" for index in range(len(plots.SERIES))))
"""CSS variables that take the place of `plots.COLOURS`, in that order."""


def templates(**filters: Callable[..., str]) -> Environment:
    """The project's templates: everything is escaped, and a name that the page was not given is an error."""
    environment = Environment(
        loader=PackageLoader("flows"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def inline_svg(svg: bytes, name: str, label: str) -> Markup:
    """An SVG document as an element of the page: own ids, the page's colours and fonts, a text alternative.

    Args:
        name: unique on the page; prefixes all ids, which would otherwise clash between pictures.
        label: what a screen reader says.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    for colour, ink in zip(plots.COLOURS, INK_NAMES, strict=True):
        text = text.replace(colour, f"var(--{ink})")
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    width = float(box[1]) * 4 / 3 if box else 640.0  # points to CSS pixels
    # a wide picture scrolls on a small screen instead of shrinking until its text cannot be read
    least = 0.75 * width if width > 560 else 0.0
    opening = (
        f'<svg role="img" aria-label="{Markup.escape(label)}" viewBox="{box[0][9:-1] if box else ""}" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'style="width:100%;max-width:{width:.0f}px;min-width:{min(least, 640):.0f}px">'
    )
    return Markup(opening + text[text.index(">") + 1 :])


def percent(fraction: float) -> str:
    """`97.8 %`."""
    return f"{100 * fraction:.1f} %"


def points(fraction: float) -> str:
    """Percentage points with a sign: `+1.9`."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def format_number(value: Any) -> str:
    """Up to four significant digits for floats, separators for integers, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def format_size(size: float) -> str:
    """Bytes as kB, MB or GB, decimal."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
