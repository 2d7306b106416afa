"""Folds: mergeable one-pass summaries of a site.

`base` says what a fold is; each other module is one fold, defined in NumPy float64 (`moments`,
`topk`), and `cpu` runs all of them over a band in one compiled pass.  A new fold is a new file and
a row in `FOLDS`.
"""

from collections.abc import Mapping
from typing import Any

from actstore.folds.base import Fold
from actstore.folds.moments import Moments
from actstore.folds.topk import TopK

FOLDS: Mapping[str, Fold[Any]] = {fold.name: fold for fold in (Moments(), TopK())}
"""The folds every capture runs, by name, with their default parameters."""

__all__ = ["FOLDS", "Fold", "Moments", "TopK"]
