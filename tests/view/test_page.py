from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from actstore.errors import ArgumentError
from actstore.view.page import PlainTable, View, escape, script_json

from .conftest import HOSTILE


def _view(text: str = "plain") -> View:
    data = {"rows": [], "columns": [], "cells": [], "measure": text, "facts": [["model", text]]}
    return View(text, "similarity", data, PlainTable(text, ["site", text], [[text, text]]))


@pytest.mark.parametrize("text", [*HOSTILE, "\ud800 lone \udfff"])
def test_json_in_a_script_cannot_end_it_and_comes_back_the_same(text: str) -> None:
    """Hostile text stands in a script as plain ASCII without markup, and parses to itself."""
    written = script_json({"text": text})
    assert written.isascii()
    assert not set("<>&\x00") & set(written)
    assert json.loads(written) == {"text": text}


def test_json_refuses_nan() -> None:
    """NaN, which JSON lacks, is refused while the view is built and not by the reader's browser."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json([float("nan")])


def test_escaped_text_is_visible_and_inert() -> None:
    """Markup, null bytes, direction marks and lone surrogates are shown, not obeyed."""
    assert escape("<a b='c'>") == "&lt;a b=&#x27;c&#x27;&gt;"
    assert escape("\x00\u202e\ud800") == "\\x00\\u202e\\ud800"


@pytest.mark.parametrize("text", [*HOSTILE, "\ud800 lone \udfff"])
def test_a_fragment_has_one_script_whatever_its_text(text: str) -> None:
    """No text adds a script element or ends the one there is, in the fragment or the page."""
    view = _view(text)
    assert view._repr_html_() == view.html
    for form in (view.html, view.page()):
        assert len(re.findall("<script", form)) == 1
        assert len(re.findall("</script", form)) == 1
        form.encode("utf-8")


def test_a_page_names_no_other_host() -> None:
    """Apart from the name of the SVG namespace, a page holds no URL at all."""
    urls = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[\w/.]*", _view().page()))
    assert urls == {"http://www.w3.org/2000/svg"}


def test_a_page_is_the_same_each_time() -> None:
    """The same view is the same bytes, so that pages can be compared."""
    assert _view().page() == _view().page()


def test_the_script_never_parses_markup() -> None:
    """The scripts make text nodes; none of the functions that parse markup occurs in them."""
    for path in (Path(__file__).parents[2] / "actstore/view/static").glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|srcdoc",
            path.read_text(encoding="utf-8"),
        )


def test_saving_to_a_place_that_is_not_there_says_so(tmp_path: Path) -> None:
    """A missing folder, or a folder instead of a file, is named with what was expected."""
    with pytest.raises(ArgumentError, match=r"nowhere, which does not exist; expected the name"):
        _view().to_html(tmp_path / "nowhere" / "page.html")
    with pytest.raises(ArgumentError, match=r"is a folder; expected the name of a file"):
        _view().to_html(tmp_path)
    assert _view().to_html(tmp_path / "page.html").read_text("utf-8") == _view().page()
