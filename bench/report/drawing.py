"""Make inline SVG from a drawing of matplotlib, in the colours and font of the page, with the same bytes every time.

Colours are CSS variables of the page, so one picture works in light and dark mode; text stays text.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

INK, MUTED, GRID, ACCENT, GOOD, BAD, WARN, SURFACE = (f"#0{digit}0{digit}0{digit}" for digit in range(1, 9))
SERIES = ("#111101", "#111102", "#111103", "#111104", "#111105", "#111106")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ACCENT: "--accent",
    GOOD: "--good",
    BAD: "--bad",
    WARN: "--warn",
    SURFACE: "--surface",
    **{colour: f"--series-{index}" for index, colour in enumerate(SERIES)},
}
_WIDTH_IN, HEIGHT_IN = 4.7, 2.8
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


class Drawing:
    """The result of a `drawing_board` block."""

    svg = ""


@contextlib.contextmanager
def drawing_board(name: str, *, rows: int = 1, height: float = HEIGHT_IN) -> Iterator[tuple[Drawing, Any]]:
    """Yield axes to draw on (a list if `rows` > 1); afterwards the drawing's `svg` is set."""
    drawing = Drawing()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
        ratios = [3.0, *[1.0] * (rows - 1)]
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
        yield drawing, axes[0] if rows == 1 else list(axes)
        drawing.svg = _inline(figure, name)


def _inline(figure: Figure, name: str) -> str:
    """Return the figure as an `<svg>` element with unique ids and the colours of the page."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # the reader's browser has its own fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{name}-\1"', text)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: [\d.]+px |font-family: )[^;\"]+", r"\1var(--font)", text)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', lambda m: m[1] or m[2], text, count=1
    )
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()
