"""Figures as text that a page can carry, and as pixels."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

from diagnostics.plots.style import INK, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT_STYLE = (
    "width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; "
    "font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
)
_METADATA: dict[str, None] = {"Date": None, "Creator": None, "Format": None, "Type": None}


def slug(name: str) -> str:
    """The name with everything that an identifier or a file name should not hold turned into a hyphen."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "figure"


def to_svg(figure: Figure, *, name: str, title: str = "") -> str:
    """The figure as one self-contained ``<svg>`` element.

    Equal figures give equal text. Text stays text; text and axes take the colour of the surrounding page
    (``currentColor``), so one drawing reads on a light and on a dark background. The element scales to the width it is
    given, and its identifiers begin with ``name``, so that several can live in one page.

    Args:
        figure: The figure.
        name: What tells this drawing from the others of the page.
        title: What a screen reader says; ``name`` when empty.
    """
    from matplotlib import rc_context

    prefix = slug(name)
    buffer = io.BytesIO()
    with styled(), rc_context({"svg.hashsalt": prefix, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_METADATA)
    text = buffer.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    found = re.search(r'viewBox="[^"]+"', head)
    view = found.group(0) if found else ""
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    # A style element would reach beyond the drawing, to the whole page; what it says goes to the root instead.
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body).replace(INK, "currentColor")
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view} '
        f'role="img" aria-labelledby="{prefix}-title" style="{ROOT_STYLE}">\n '
        f'<title id="{prefix}-title">{escape(title or name)}</title>'
    )
    return (opening + body).strip() + "\n"


def to_png(figure: Figure, *, dpi: int = 200) -> bytes:
    """The figure as a PNG file on white; equal figures give equal bytes.

    Args:
        figure: The figure.
        dpi: Dots per inch.
    """
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
