"""The exception tree.

Every error actstore raises on purpose is an `ActstoreError`; its leaves also subclass the builtin
a caller would catch.  A message says what was wrong (name = value), what was expected, where
(store, site, file) and the remedy, naming a real argument or command.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ActstoreError(Exception):
    """Base of all errors actstore raises on purpose."""

    # KeyError prints its argument quoted and escaped; a sentence should read as one.
    __str__ = Exception.__str__


class ArgumentError(ActstoreError, ValueError):
    """An argument has a value that cannot be used."""


class SiteNotFound(ActstoreError, KeyError):
    """A site, hook point or layer that the model or store does not have."""


class NeuronNotFound(ActstoreError, IndexError):
    """A neuron index outside the width of its site."""


class RowNotFound(ActstoreError, IndexError):
    """A row_id that is a hole, not kept, or not committed."""


class StoreNotFound(ActstoreError, FileNotFoundError):
    """A path that holds no store."""


class StoreMismatch(ActstoreError, ValueError):
    """A store made from another model, tokenizer or plan than the one given."""


class StoreBusy(ActstoreError, BlockingIOError):
    """Another process holds the lock of what was to be written."""


class FormatError(ActstoreError, ValueError):
    """A store of an unknown format version, or metadata that breaks the format."""


class DamagedFile(ActstoreError, OSError):
    """A file that is missing, of the wrong size, or whose checksum does not match."""


class NotWritable(ActstoreError, PermissionError):
    """A place where nothing can be written."""


class NotEnoughDisk(ActstoreError, OSError):
    """The disk cannot hold what is about to be written."""


class BudgetExceeded(ActstoreError, MemoryError):
    """The work cannot be done within the memory budget."""


class CorpusError(ActstoreError, ValueError):
    """A corpus that cannot be found, read or decoded."""


class ModelError(ActstoreError, ValueError):
    """A model that cannot be loaded, or whose structure cannot be captured."""


class NonFiniteActivation(ActstoreError, FloatingPointError):
    """NaN, or a value outside the stored dtype, where the policy is to stop."""


class QueryError(ActstoreError, ValueError):
    """SQL that DuckDB refuses, or that would do more than read the store."""


class ResultExists(ActstoreError, FileExistsError):
    """A result name that is taken; results are never overwritten."""


class ResultNotFound(ActstoreError, KeyError):
    """A result that the store does not have."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
