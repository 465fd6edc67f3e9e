"""Pages that hold all they show: no script, no font, no picture from anywhere else."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stunet.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_page(template: str, path: str | os.PathLike[str], **content: Any) -> None:
    """Fill a template and write the page, atomically. All text is escaped.

    Args:
        template: Its file name.
        path: The page.
        content: What the template names; something that it names and that is missing is an error.
    """
    environment = Environment(loader=PackageLoader("stunet.reports"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(template).render(**content)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def inline_svg(figure: Figure) -> Markup:
    """Return a figure as ``<svg>``, letters as shapes to look the same everywhere; equal figures give equal text."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # A fixed salt: matplotlib names the shapes by a random number otherwise.
    with mpl.rc_context({"svg.hashsalt": "stunet", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])  # noqa: S704 - matplotlib escapes the text in its figures


def inline_png(path: str | os.PathLike[str], alternative: str) -> Markup:
    """Return a picture as ``<img>`` that holds its data."""
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(alternative, data)
