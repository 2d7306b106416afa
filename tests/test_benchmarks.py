"""Every benchmark runs in its tiny size, so that none rots."""

import importlib
import pkgutil

import pytest

import benchmarks

NAMES = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_size_runs_and_prints_a_table(name, capsys):
    """`python -m benchmarks.<name> --tiny` prints a table with figures in it."""
    importlib.import_module(f"benchmarks.{name}").main(["--tiny"])

    assert any(character.isdigit() for character in capsys.readouterr().out)
