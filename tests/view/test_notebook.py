from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

import actstore
from actstore.decompose import Factors
from actstore.errors import ActstoreError, ArgumentError
from actstore.store import CoreStore
from actstore.view import factors_notebook, to_notebook


def test_a_notebook_is_run_by_this_interpreter_in_its_folder(tmp_path: Path) -> None:
    """Cells run in order in one kernel of the running interpreter; their outputs are kept."""
    cells = [
        ("markdown", "Some *words*."),
        ("code", "import os, sys\nx = 6 * 7"),
        ("code", "print(x, sys.executable, os.path.basename(os.getcwd()))"),
        ("code", "class V:\n    def _repr_html_(self): return '<b>shown</b>'\nV()"),
    ]
    path = to_notebook(tmp_path / "run.ipynb", cells, "A title")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source == "# A title"
    printed = notebook.cells[3].outputs[0].text
    assert printed == f"42 {sys.executable} {tmp_path.name}\n"
    assert notebook.cells[4].outputs[0].data["text/html"] == "<b>shown</b>"


def test_a_failing_cell_leaves_no_notebook(tmp_path: Path) -> None:
    """An error in a cell is passed on with its text, and nothing is written."""
    with pytest.raises(
        ActstoreError,
        match=r"was not written, since a cell of it failed with ZeroDivisionError: division by",
    ):
        to_notebook(tmp_path / "fails.ipynb", [("code", "1 / 0")], "Fails")
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused_before_a_kernel_starts(tmp_path: Path) -> None:
    """A name without .ipynb, a folder that is missing and an unknown kind are named."""
    with pytest.raises(ArgumentError, match=r"expected a file name that ends in .ipynb"):
        to_notebook(tmp_path / "notes.txt", [], "x")
    with pytest.raises(ArgumentError, match=r"in a folder that exists"):
        to_notebook(tmp_path / "nowhere" / "notes.ipynb", [], "x")
    with pytest.raises(ArgumentError, match=r"'prose' was given; expected markdown or code"):
        to_notebook(tmp_path / "notes.ipynb", [("prose", "x")], "x")


def test_the_notebook_of_factors_opens_the_store_and_shows_the_view(
    store: CoreStore, factors: Factors
) -> None:
    """Run in a fresh kernel, it opens the store beside it by the public face and draws the view."""
    path = factors_notebook(store.path, factors.name, store.path.parent / "factors.ipynb")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code)
    assert "actstore.open('store')" in "".join(code[0]["source"])
    html = ["".join(o["data"].get("text/html", "")) for c in code for o in c["outputs"]]
    assert any("data-actstore-view" in page for page in html)


def test_notebooks_of_a_neuron_and_of_a_store_show_their_views(
    hostile_store: actstore.Store,
) -> None:
    """Run in fresh kernels, both keep their views, and no text of the corpus became markup."""
    folder = hostile_store.path.parent
    neuron = hostile_store.neuron("mlp_post.1", 7, by="position % 2")
    for made in (
        neuron.to_notebook(folder / "neuron.ipynb"),
        hostile_store.to_notebook(folder / "overview.ipynb"),
    ):
        notebook = nbformat.read(made, as_version=4)
        pages = [o.data.get("text/html", "") for c in notebook.cells for o in c.get("outputs", [])]
        (page,) = [page for page in pages if "data-actstore-view" in page]
        assert page.count("<script") == 1
    assert "by='position % 2'" in (folder / "neuron.ipynb").read_text(encoding="utf-8")


def test_no_kernel_is_left_running(tmp_path: Path) -> None:
    """The kernel ends with the notebook, whether its cells succeed or fail."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    to_notebook(tmp_path / "good.ipynb", [("code", "1 + 1")], "Good")
    with pytest.raises(ActstoreError):
        to_notebook(tmp_path / "bad.ipynb", [("code", "1 / 0")], "Bad")
    after = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    assert [c for c in after if c.status() != psutil.STATUS_ZOMBIE] == []
