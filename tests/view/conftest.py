from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import actstore
from actstore.decompose import Factors, Similarity, nmf, similarity
from actstore.store import CoreStore
from tests.browser import Browser, find_chromium
from tests.toys import toy_model
from tests.view.text_store import text_store

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src="x" onerror="window.hacked = 2"> <!-- <script> -->',
    "\"quotes\" 'and' `backticks` ${window.hacked = 3} \\u003cscript>",
    "null \x00 bell \x07 escape \x1b[31m line\u2028paragraph\u2029 end ]]>",
    "שלום עולם \u202e reversed \u202c العربية 中文字符 \U0001f600\U0001f468\u200d\U0001f469 done",
]
"""Texts that try to become code, or to break the page around them."""

PLAIN = [
    "The keys to the cabinet are on the table, and the cabinet is locked.\n\n\tNobody knows why.",
    "A factor is high at words of one length; so the shading of this text can be foretold.",
    "Unfathomable circumstances notwithstanding, the committee recommended reconsideration.",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium for all tests; without one they are skipped, except in CI."""
    if find_chromium() is None:
        reason = "no chromium is installed; `apt-get install chromium` brings one"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser() as started:
        yield started


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> CoreStore:
    """A store of plain and hostile texts at four sites."""
    texts = [(f"plain-{i}.txt", text) for i, text in enumerate(PLAIN)]
    texts += [(text, text) for text in HOSTILE]
    path: Path = tmp_path_factory.mktemp("view") / "store"
    return text_store(
        path,
        texts,
        {"mlp_post.0": 24, "mlp_post.1": 24, "mlp_post.10": 24, "resid_post.1": 12},
        model="<script>window.hacked = 4</script>",
    )


@pytest.fixture(scope="session")
def hostile_store(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    """A store captured from hostile texts, with hostile sources and metadata, and factors."""
    module, tokenizer = toy_model("gpt2")
    module.config._name_or_path = "<script>window.hacked = 5</script>"
    documents = [
        {"text": text, "source": HOSTILE[i % len(HOSTILE)], "note": HOSTILE[0]}
        for i, text in enumerate([*PLAIN, *HOSTILE])
    ]
    path = tmp_path_factory.mktemp("hostile") / "store"
    made = actstore.capture(module, documents, path, tokenizer=tokenizer, context=64)
    made.nmf("mlp_post", 3, name="words")
    return made


@pytest.fixture(scope="session")
def factors(store: CoreStore) -> Factors:
    """Four factors of the store's three FFNN sites."""
    return nmf(store, ["mlp_post"], 4, name="words")


@pytest.fixture(scope="session")
def alike(store: CoreStore) -> Similarity:
    """The similarity of the store's sites."""
    return similarity(store, ["mlp_post", "resid_post"], batch_rows=8, name="alike")
