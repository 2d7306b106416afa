"""Every block of code in README and docs runs, and every file they name exists."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from actstore.cli import main
from actstore.query import VIEWS
from docs import notebooks, reference
from tests.toys import toy_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    """Return the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def test_the_readme_runs(tmp_path, monkeypatch, model_folder, texts_folder):
    """The ten lines of Python in the README run as they stand, on a toy model and its texts."""
    (block,) = blocks(ROOT / "README.md", "python")
    (tmp_path / "speeches").symlink_to(texts_folder)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)

    exec(compile(block, "README.md", "exec"), {})

    assert (tmp_path / "factors.html").exists()


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_python_in_the_docs_runs(page, small_store):
    """Python blocks of a page run one after the other, over a store with results."""
    model, tokenizer = toy_model("gpt2")
    names = {"store": small_store, "model": model, "tokenizer": tokenizer}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sql_in_the_docs_runs(page, small_store):
    """SQL blocks of a page are answered, with rows but for what a small store does not have."""
    for block in blocks(page, "sql"):
        answer = small_store.sql(block)
        silent_or_twins = "share_positive = 0" in block or "twin" in block
        assert len(answer) > 0 or silent_or_twins or "' war'" in block, block


def test_the_reference_is_what_the_code_says():
    """docs/sql.md names every view, macro and column with its meaning: python -m docs.reference."""
    text = (ROOT / "docs/sql.md").read_text(encoding="utf-8")

    assert text == reference.page()
    for view in VIEWS.values():
        for column in view.columns:
            assert f"| {column.name} | {column.type} | {column.comment} |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_links_exist(page):
    """Links to files of the repository lead somewhere."""
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_command_is_in_the_readme():
    """A command that the README does not name is a command nobody finds."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    for name in set(main.commands) - {"finish"}:
        assert f"actstore {name}" in text or f"make {name}" in text, name


def test_the_examples_run(model_folder, small_store, tmp_path):
    """Each script in examples/ runs as its first lines say."""
    copy = shutil.copytree(small_store.path, tmp_path / "store")
    arguments = {
        "one_prompt.py": [model_folder, "The keys to the cabinet are on the table"],
        "layers_alike.py": [copy],
    }
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(arguments)
    for name, given in arguments.items():
        command = [sys.executable, str(ROOT / "examples" / name), *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) >= 3


def test_the_notebook_of_the_examples_is_that_of_its_source():
    """The kept notebook has the cells of `docs.notebooks`, all run, small, and names no folder."""
    text = notebooks.NOTEBOOK.read_text(encoding="utf-8")
    title, *cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]

    assert title["source"] == [f"# {notebooks.TITLE}"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert found == notebooks.CELLS
    assert all(cell["outputs"] and cell["execution_count"] for cell in code)
    assert not re.search(r"/(tmp|home|work|root|Users)/|Error|Warning", text)
    assert len(text) < 1_500_000


def test_the_notebook_of_the_examples_runs(small_store, tmp_path):
    """Its cells run on any store with an FFNN, and nothing in it says where that was."""
    copy = shutil.copytree(small_store.path, tmp_path / "store")
    text = notebooks.write(copy, tmp_path / "made.ipynb").read_text(encoding="utf-8")
    shown = [
        line
        for cell in json.loads(text)["cells"]
        for output in cell.get("outputs", [])
        for line in output.get("text") or output["data"]["text/plain"]
    ]

    assert any("../actstore-demo/store" in line for line in shown)
    assert any("are stable" in line for line in shown)
    assert str(tmp_path) not in text
    assert "/examples/" not in text
