"""Batches: windows that go through the model together, and which of its rows are kept.

Windows are padded on the right to the longest of them.  Leading context is fed but not stored, so
the rows of a window are those of its special tokens before the context, and those behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore import arrow
from actstore.models import LanguageModel
from actstore.store import CoreStore


@dataclass(frozen=True)
class Batch:
    """Windows that go through the model together."""

    input_ids: torch.Tensor
    """Token ids, padded on the right, (windows, positions)."""
    lengths: list[int]
    """Tokens of each window."""
    skip: list[int]
    """Leading context tokens of each window that are fed but not stored."""
    n_prefix: int
    """Special tokens before the context, which are stored."""
    rows: int
    """Stored rows of the batch."""

    @classmethod
    def of(
        cls,
        windows: Sequence[Mapping[str, Any]],
        token_ids: Sequence[npt.NDArray[np.integer[Any]]],
        model: LanguageModel,
    ) -> Batch:
        """Return the batch of some windows of the plan, given the ids that each of them stores."""
        n_prefix = len(model.prefix_ids)
        fed = [
            np.concatenate([own[:n_prefix], window["context_ids"], own[n_prefix:]])
            for window, own in zip(windows, token_ids, strict=True)
        ]
        lengths = [len(ids) for ids in fed]
        input_ids = np.full((len(fed), max(lengths)), model.pad_id, dtype=np.int64)
        for place, ids in zip(input_ids, fed, strict=True):
            place[: len(ids)] = ids
        return cls(
            torch.from_numpy(input_ids),
            lengths,
            [window["context_tokens"] for window in windows],
            n_prefix,
            sum(map(len, token_ids)),
        )

    def stored(self, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the stored rows ``(n, width)`` of what a site gave, in row order, as views."""
        if len(set(self.lengths)) == 1 and not any(self.skip):
            yield values.flatten(0, 1)
            return
        for i, (length, skip) in enumerate(zip(self.lengths, self.skip, strict=True)):
            head = self.n_prefix if skip else 0
            yield values[i, :head]
            yield values[i, head + skip : length]

    def positions(self) -> npt.NDArray[np.int64]:
        """Return where the rows of `stored` lie in what a site gave, window after window."""
        n_positions = self.input_ids.shape[1]
        rows = []
        for i, (length, skip) in enumerate(zip(self.lengths, self.skip, strict=True)):
            own = np.arange(length)
            # As in `stored`: leading context is no row, the special tokens before it are.
            is_context = (own >= self.n_prefix) & (own < self.n_prefix + skip)
            rows.append(i * n_positions + own[~is_context])
        return np.concatenate(rows)


def batches(store: CoreStore, model: LanguageModel, segment: int) -> Iterator[Batch]:
    """Yield the batches of a segment; at most `batch_tokens` tokens each, padding counted."""
    windows = store.windows(segment).to_pylist()
    ids = arrow.numbers(store.tokens(segment).column("token_id"))
    first = segment * store.meta.segment_rows
    start = 0
    while start < len(windows):
        longest = windows[start]["context_tokens"] + windows[start]["rows"]
        count = max(1, store.meta.batch_tokens // longest)
        chosen = windows[start : start + count]
        own = [ids[w["first_row"] - first :][: w["rows"]] for w in chosen]
        yield Batch.of(chosen, own, model)
        start += count
