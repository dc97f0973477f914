"""One page of HTML that holds its style and pictures itself and loads nothing from a network.

Parts come in as HTML.
"""

from __future__ import annotations

import base64
import importlib.resources
from collections.abc import Iterable, Mapping
from html import escape
from string import Template


def page(title: str, sections: Iterable[str]) -> str:
    """The whole page; empty sections are left out."""
    template = importlib.resources.files(__package__) / "page.html"
    text = Template(template.read_text(encoding="utf-8"))
    return text.substitute(title=escape(title), body="\n".join(filter(None, sections)))


def heading(title: str, below: str, notes: Iterable[str]) -> str:
    """Title, a line below it, and what has to be known before believing the rest."""
    return "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="soft">{escape(below)}</p>',
            *(f'<p class="note">{escape(note)}</p>' for note in notes if note),
        ]
    )


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """The main figures: name, value, and what stands below it."""
    shown = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{value}</b><span>{below}</span></div>'
        for name, value, below in figures
    )
    return f'<div class="tiles">{shown}</div>'


def picture(png: bytes, alt: str, caption: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def facts(named: Mapping[str, object]) -> str:
    """Two columns: what, and its value."""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>"
        for key, value in named.items()
        if value not in ("", None)
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def table(
    head: Iterable[str],
    rows: Iterable[Iterable[str]],
    *,
    caption: str,
    kind: str = "",
    emphasise_last: bool = False,
) -> str:
    """A table of cells that are HTML already."""
    body = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    kinds = ["overall" if emphasise_last and i == len(body) - 1 else "" for i in range(len(body))]
    lines = "".join(f'<tr class="{k}">{row}</tr>' for k, row in zip(kinds, body, strict=True))
    columns = "".join(f"<th>{cell}</th>" for cell in head)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{columns}</tr></thead>'
        f'<tbody>{lines}</tbody></table></div><p class="soft">{escape(caption)}</p>'
    )
