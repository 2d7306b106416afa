"""Views: a title, data and one small script, as a notebook fragment or as one HTML file.

The text of a corpus is untrusted, and a view carries much of it. Three gates keep it text:

- Data goes into the script as JSON in pure ASCII, with ``<``, ``>`` and ``&`` escaped too, so that
  no ``</script>``, ``<!--``, U+2028, null byte or lone surrogate can end the script or the string.
- The script makes elements and text nodes and never parses markup.
- A page's content security policy allows exactly its own script, by hash, and no request at all.

A fragment is a plain table inside a host element, followed by the script that draws the view in the
host's shadow tree. Styles of a notebook do not reach into the view nor its styles out; and where
scripts do not run (an untrusted notebook, a code-hosting site) the plain table stays.
"""

from __future__ import annotations

import hashlib
import html
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from actstore import durable
from actstore.errors import ArgumentError
from actstore.query import visible


def escape(text: object) -> str:
    r"""Return text for HTML: escaped, with nothing left that cannot be seen.

    Examples
    --------
    >>> escape("<b>\x00")
    '&lt;b&gt;\\x00'
    """
    return html.escape(visible(str(text)))


def script_json(data: object) -> str:
    r"""Return data as JSON that can stand inside a script element, whatever text it holds.

    Raises
    ------
    ValueError
        If it holds NaN or an infinity, which JSON does not have.

    Examples
    --------
    >>> print(script_json("</script>"))
    "\u003c/script\u003e"
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@dataclass(frozen=True)
class PlainTable:
    """What a view shows where scripts do not run."""

    caption: str
    """One sentence over the table."""
    columns: Sequence[str]
    """Heads of the columns."""
    rows: Sequence[Sequence[str]]
    """Cells; the first of a row is its head."""

    def html(self) -> str:
        """Return the table as HTML."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        body = "".join(
            f'<tr><th scope="row">{escape(first)}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
            + "</tr>"
            for first, *rest in self.rows
        )
        return (
            f"<table><caption>{escape(self.caption)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


_STYLE_OF_PAGE = (
    ":root{color-scheme:light dark}"
    "body{margin:0;background:light-dark(#fff,#14171c);color:light-dark(#1c2128,#dfe4ea);"
    "font:14px/1.5 system-ui,sans-serif}"
    "main{max-width:82rem;margin:0 auto;padding:clamp(.75rem,2vw,1.75rem)}"
)


def file_to_be(path: str | Path) -> Path:
    """Return the path of a page to be written; one that is there is replaced.

    Raises
    ------
    ArgumentError
        If its folder does not exist or the path is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir():
        found = f"needs the folder {target.parent}, which does not exist"
        if target.is_dir():
            found = "is a folder"
        raise ArgumentError(
            f"path = {str(target)!r} {found}; expected the name of a file in a folder that "
            "exists, such as 'factors.html'."
        )
    return target


@dataclass(frozen=True)
class View:
    """A view that a notebook shows by itself and that saves as one HTML file."""

    title: str
    """What it shows."""
    kind: str
    """Name of its script under ``static/``."""
    data: Mapping[str, Any]
    """What its script draws: JSON, without NaN."""
    table: PlainTable
    """What stands there where scripts do not run."""

    def __repr__(self) -> str:
        return f"<view of {self.title}; to_html(path) saves it, a notebook shows it>"

    @cached_property
    def _script(self) -> str:
        static = files("actstore.view") / "static"
        style, shared, own = (
            (static / name).read_text(encoding="utf-8")
            for name in ("view.css", "view.js", f"{self.kind}.js")
        )
        return (
            f'(() => {{\n"use strict";\n{shared}\n{own}\n'
            f"mount({script_json(self._id)}, {script_json(style)}, "
            f"{script_json({'title': self.title, **self.data})});\n}})();"
        )

    @cached_property
    def _id(self) -> str:
        content = script_json([self.title, self.kind, self.data]).encode("ascii")
        return f"{self.kind}-{hashlib.sha256(content).hexdigest()[:16]}"

    @property
    def html(self) -> str:
        """The view as a self-contained fragment for a notebook."""
        return (
            f'<div data-actstore-view="{self._id}">{self.table.html()}</div>\n'
            f"<script>{self._script}</script>"
        )

    def _repr_html_(self) -> str:
        return self.html

    def page(self) -> str:
        """Return the view as a whole HTML document that makes no request."""
        digest = b64encode(hashlib.sha256(self._script.encode("utf-8")).digest()).decode("ascii")
        policy = (
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
            "base-uri 'none'; form-action 'none'"
        )
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="referrer" content="no-referrer">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE_OF_PAGE}</style>\n"
            f"</head>\n<body>\n<main>\n{self.html}\n</main>\n</body>\n</html>\n"
        )

    def to_html(self, path: str | Path) -> Path:
        """Write the view as one HTML file that opens by double click; return its path.

        Raises
        ------
        ArgumentError
            If its folder does not exist or the path is a folder.
        """
        target = file_to_be(path)
        durable.write_file(target, self.page().encode("utf-8"))
        return target
