"""Which rows are stored: fractions as people write them, and the sample that each stands for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import ArgumentError
from actstore.store.stored_rows import (
    MAX_EXPONENT,
    hash_rows,
    keep_text,
    parse_keep,
    sample,
    sample_name,
    shard_rows,
)

EXPONENTS = st.integers(1, MAX_EXPONENT)


@given(EXPONENTS)
def test_fractions_are_read_as_they_are_written(j: int) -> None:
    """A power of two as a number, a quotient or a power is the same, and is printed as one."""
    forms = [2.0**-j, f"1/{2**j}", f"2^-{j}", str(2.0**-j), f" 2 / {2 ** (j + 1)}"]
    assert {parse_keep(form) for form in forms} == {2.0**-j}
    assert keep_text(2.0**-j) == f"1/{2**j}"
    assert sample_name("", 2.0**-j, 7) == f"stored_rows/{j}/00000007.npy"
    assert sample_name("encoder", 2.0**-j, 7) == f"stored_rows/encoder/{j}/00000007.npy"


def test_all_and_none_are_fractions_too() -> None:
    """Everything and nothing, in words and in numbers."""
    assert [parse_keep(form) for form in ("all", 1, 1.0, "1", "1/1")] == [1.0] * 5
    assert [parse_keep(form) for form in ("none", 0, 0.0, "0")] == [0.0] * 4
    assert (keep_text(1.0), keep_text(0.0)) == ("all", "none")


@pytest.mark.parametrize(
    "keep",
    [
        "some",
        "",
        "1/3",
        "0.3",
        "1/0",
        "1/2/4",
        "2^",
        "0^-1",
        "²",
        "10^400",
        "nan",
        3,
        -0.5,
        True,
        None,
        [0.5],
        2**-17,
    ],
)
def test_other_fractions_are_refused(keep: object) -> None:
    """What is no power of two is named, with what there is."""
    with pytest.raises(ArgumentError, match=r"^keep = .* is not 'all', 'none' or a power of two"):
        parse_keep(keep)


@given(st.sets(st.integers(0, 4095), max_size=300), st.integers(0, 2**40), EXPONENTS, EXPONENTS)
def test_samples_are_exact_in_size_nested_and_a_function_of_the_rows(
    offsets: set[int], segment: int, j: int, i: int
) -> None:
    """ceil(n / 2^j) of the content rows, ascending, whatever the others are; the smaller inside."""
    content = np.array(sorted(offsets), dtype=np.int64)
    first, keep = segment * 4096, 2.0**-j
    found = sample(content, first, keep, seed=3)
    assert len(found) == math.ceil(len(content) / 2**j)
    assert len(found) <= shard_rows(4096, keep)
    assert (np.diff(found) > 0).all()
    assert set(found) <= offsets
    smaller = sample(content, first, min(keep, 2.0**-i), seed=3)
    assert set(smaller) <= set(found)
    ranked = sorted(offsets, key=lambda offset: int(hash_rows(np.array([first + offset]), 3)[0]))
    assert set(found) == set(ranked[: len(found)])


def test_the_hash_is_splitmix64() -> None:
    """The published sequence from seed 0, whose n-th number is the hash of n - 1 steps."""
    golden = 0x9E3779B97F4A7C15
    steps = np.array([0, golden, 2 * golden % 2**64], dtype=np.uint64).view(np.int64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash_rows(steps, 0).tolist() == expected
    assert hash_rows(steps ^ 77, 77).tolist() == expected


def test_samples_are_spread_evenly() -> None:
    """Every sixteenth of a segment has its share, and every segment and seed another choice."""
    content = np.arange(65_536)
    samples = [sample(content, segment * 65_536, 2.0**-6, 0) for segment in range(40)]
    counts = np.bincount(np.concatenate(samples) // 4096, minlength=16)
    expected = 40 * 1024 / 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # chi-square, 15 degrees, 0.1 %
    assert len({tuple(found) for found in samples}) == 40
    assert set(sample(content, 0, 2.0**-6, 1)) != set(samples[0])
