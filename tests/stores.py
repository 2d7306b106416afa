"""Fixtures: small captured stores, and what they were captured from."""

import shutil

import pytest

import actstore
from tests.toys import TEXT, toy_model


@pytest.fixture(scope="session")
def texts():
    """Documents shorter and longer than a window of 16 tokens."""
    words = TEXT.split()
    return [
        " ".join(words[start % 50 : start % 50 + length])
        for start, length in ((0, 40), (7, 5), (11, 90), (3, 1), (20, 60), (30, 33))
    ]


@pytest.fixture(scope="session")
def texts_folder(texts, tmp_path_factory):
    """The documents as files."""
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A three-layer GPT-2 with its tokenizer, as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("model")
    module, tokenizer = toy_model("gpt2")
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made_store(texts, tmp_path_factory):
    """A captured store of a three-layer GPT-2 with an NMF and a similarity; only to be read."""
    module, tokenizer = toy_model("gpt2")
    path = tmp_path_factory.mktemp("stores") / "small"
    store = actstore.capture(module, text=texts, store=path, tokenizer=tokenizer, context=16)
    store.nmf("mlp_post", 2, name="first")
    store.similarity(name="first", tolerance=0.5)
    return store


@pytest.fixture
def small_store(made_store, tmp_path_factory):
    """A copy of that store: what a test computes into it no other test finds there."""
    path = tmp_path_factory.mktemp("stores") / "small"
    return actstore.open(shutil.copytree(made_store.path, path))
