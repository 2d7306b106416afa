"""Counts in words."""

import pytest

from actstore.counted import counted


@pytest.mark.parametrize(
    ("n", "words"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12_345, "12,345 rows")]
)
def test_one_thing_is_one_thing(n, words):
    """Of anything but one the noun is in the plural, and thousands are told apart."""
    assert counted(n, "row") == words
