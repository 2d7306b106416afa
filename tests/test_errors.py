"""The exception tree: what a caller may catch, and how messages read."""

from __future__ import annotations

import inspect

import pytest

from actstore import errors
from actstore.errors import ActstoreError, did_you_mean

LEAVES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, ActstoreError) and cls is not ActstoreError
]


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_are_also_what_a_caller_would_catch(leaf: type[ActstoreError]) -> None:
    """Every error is an ActstoreError and one builtin, and has a sentence of its own."""
    builtin = [base for base in leaf.__bases__ if base is not ActstoreError]
    assert len(builtin) == 1
    assert builtin[0].__module__ == "builtins"
    assert leaf.__doc__
    with pytest.raises(builtin[0]):
        raise leaf("what happened")
    with pytest.raises(ActstoreError):
        raise leaf("what happened")


@pytest.mark.parametrize("leaf", LEAVES)
def test_messages_read_as_they_were_written(leaf: type[ActstoreError]) -> None:
    """A KeyError would quote its sentence, an OSError number it; ours do not."""
    assert str(leaf("site 'a' is not in b")) == "site 'a' is not in b"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("mlp_pots.5", " Did you mean 'mlp_post.5'?"),
        ("resid", ""),
        ("", ""),
        ("mlp_post.5", " Did you mean 'mlp_post.5'?"),
    ],
)
def test_did_you_mean_names_the_nearest_word_or_nothing(word: str, hint: str) -> None:
    """A hint stands behind the message only where some word is near."""
    assert did_you_mean(word, ["mlp_post.5", "mlp_post.50"]) == hint
    assert did_you_mean(word, []) == ""
