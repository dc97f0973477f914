"""HTML pages from templates; a page contains its style and pictures and loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from sammed3d_backbone.evaluation.statistics import Interval, format_number
from sammed3d_backbone.files import write_text


def write_page(path: Path, template: str, **content: object) -> Path:
    """Writes a page; all text in its content is escaped.

    Args:
        path: The HTML file.
        template: Path of the template below the package; it extends ``evaluation/page.html``.
        content: Variables of the template; `stated`, `png` and `Markup` prepare some.
    """
    write_text(path, _TEMPLATES.get_template(template).render(content))
    return path


def stated(named: Mapping[str, object]) -> dict[str, object]:
    """The entries that have a value."""
    return {key: value for key, value in named.items() if value not in ("", None)}


def png(path: Path) -> str:
    """The address of a picture that is embedded in the page; "" if the file does not exist."""
    if not path.is_file():
        return ""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format_number(value, form)


def _interval(values: Sequence[float | None], form: str = ".3f") -> Markup:
    """A mean with its bounds in small print."""
    interval = Interval.from_json(values)
    return Markup("{} <small>{}</small>").format(
        _number(interval.mean, form), interval.bounds(form)
    )


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parents[1]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "number": _number,
    "interval": _interval,
    "bounds": lambda values: Interval.from_json(values).bounds(),
}
