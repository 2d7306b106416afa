"""Folds: mergeable one-pass summaries of a site.

`base` says what a fold is; each other module is one fold, defined in NumPy float64 (`moments`,
`topk`, `window_top`, `histogram`, `zones`, `sample`, `gram`), and `cpu` runs all of them over a
band in one compiled pass.  A new fold is a new file and a row in `FOLDS`.
"""

from collections.abc import Mapping
from typing import Any

from actstore.folds.base import Fold
from actstore.folds.gram import Gram
from actstore.folds.histogram import Histogram
from actstore.folds.moments import Moments
from actstore.folds.sample import Sample
from actstore.folds.topk import TopK
from actstore.folds.window_top import WindowTop
from actstore.folds.zones import Zones

FOLDS: Mapping[str, Fold[Any]] = {
    fold.name: fold
    for fold in (Moments(), TopK(), WindowTop(), Histogram(), Zones(), Sample(), Gram())
}
"""All folds by name, with their default parameters; a capture runs `Gram` where it is asked for."""

__all__ = [
    "FOLDS",
    "Fold",
    "Gram",
    "Histogram",
    "Moments",
    "Sample",
    "TopK",
    "WindowTop",
    "Zones",
]
