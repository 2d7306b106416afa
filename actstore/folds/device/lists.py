"""The running lists of a site on the device that folds its bands.

A place in a list is one integer, a *key*: ``rank of its value << 32 | 2**32 - 1 - offset``, so that
a larger key is a better place: higher value, then lower row.  Lists of lowest values are those of
the highest of the negated values.

Only what passes a list's *limit*, its last place, is a candidate, but how many do is known on the
device alone, and to ask it there would make both sides wait.  So candidates take three steps:

1. They are *added* with places that are empty between them, as they come out of the screening.
2. Where the count is known, which it is for the next band without waiting, they are *settled*:
   the empty places go.
3. When enough of them are settled, they are *merged*: sorted, dealt to their lists, and the best k
   of each list stay.  The k-th is then the limit.

Limits are a little old for that, and some candidates more are looked at.  No place is lost by it.

Keys of one list are added in the order of their rows.  So a candidate that ties with the limit
comes behind the place that set it, and has lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY = -(2**63)
"""The key of no place."""
LOW = 2**32 - 1

# Keys of a list, empty ones too, that wait for their count; and keys that wait to be merged.
_MOST_ADDED = 64
_MOST_SETTLED = 16
# Keys sorted together when lists are merged.
_MERGED_KEYS = 2**22


def keys_of(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the keys of float32 values, none of them -0.0, and the rows that have them."""
    codes = values.view(torch.int32)
    ranks = codes ^ ((codes >> 31) & 0x7FFFFFFF)
    return (ranks.to(torch.int64) << 32) | (LOW - offsets)


def values_of(keys: Tensor) -> Tensor:
    """Return the values that keys stand for; NaN for no place."""
    ranks = (keys >> 32).to(torch.int32)
    return (ranks ^ ((ranks >> 31) & 0x7FFFFFFF)).view(torch.float32)


def offsets_of(keys: Tensor) -> Tensor:
    """Return the rows that keys stand for."""
    return LOW - (keys & LOW)


def nth_true(ends: Tensor, first: int, last: int) -> Tensor:
    """Return the places of some of the flags that are set, given the running sum over flags.

    As `torch.nonzero`, but the number is known and the device not waited for.
    """
    numbers = torch.arange(first + 1, last + 1, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, numbers)


class DeviceLists:
    """The best k places of some lists, and what may still enter them.

    Memory is at most `list_bytes` a list, 8 x k of it the places.

    Parameters
    ----------
    n_lists : int
        Lists, each of k places.
    k : int
        Places.
    device : torch.device
        Where they are held.
    """

    def __init__(self, n_lists: int, k: int, device: torch.device) -> None:
        self.limits = torch.full((n_lists,), -torch.inf, device=device)
        """Values that a candidate must exceed, (n_lists,)."""
        self.n_loose = torch.zeros((), dtype=torch.int64, device=device)
        """How many of the places that were added last are not empty: what `settle` wants."""
        self._keys = torch.full((n_lists, k), EMPTY, device=device)
        self._added: list[tuple[Tensor, Tensor]] = []
        self._n_added = 0
        self._loose: tuple[Tensor, Tensor, Tensor] | None = None
        self._settled: list[tuple[Tensor, Tensor]] = []
        self._n_settled = 0

    def tensors(self) -> list[Tensor]:
        """Return what takes memory between bands."""
        waiting = [*(self._loose or ()), *(t for pair in self._settled for t in pair)]
        return [self.limits, self._keys, *waiting]

    def add(self, keys: Tensor, lists: Tensor) -> None:
        """Take in keys, `EMPTY` ones between them, and the number of the list of each, int32.

        Where many were added since the last band, their count is waited for.
        """
        if not len(keys):
            return
        self._added.append((keys, lists))
        self._n_added += keys.numel()
        if self._n_added > _MOST_ADDED * len(self._keys):
            self.close()
            self.settle(int(self.n_loose))

    def close(self) -> None:
        """Begin to count what was added; `n_loose` has the count once the device got there."""
        if self._added:
            parts = zip(*self._added, strict=True)
            keys, lists = (part[0] if len(part) == 1 else torch.cat(part) for part in parts)
            ends = (keys != EMPTY).cumsum(0, dtype=torch.int32)
            self._loose = ends, keys, lists
            self.n_loose = ends[-1].to(torch.int64)
            self._added, self._n_added = [], 0

    def settle(self, n: int) -> None:
        """Drop the empty places of what was closed, given how many are not: `n_loose`."""
        if self._loose is None:
            return
        ends, keys, lists = self._loose
        self._loose, self.n_loose = None, torch.zeros_like(self.n_loose)
        if n:
            places = nth_true(ends, 0, n)
            self._settled.append((keys[places], lists[places]))
            self._n_settled += n
        if self._n_settled > _MOST_SETTLED * len(self._keys):
            self._merge()

    def best(self) -> Tensor:
        """Return the best k keys of each list in no order, (n_lists, k); waits for the device."""
        self.close()
        self.settle(int(self.n_loose))
        self._merge()
        return self._keys

    def _merge(self) -> None:
        """Put what is settled into the lists, and raise the limits to their last places."""
        if not self._settled:
            return
        n_lists, k = self._keys.shape
        keys, lists = (torch.cat(part) for part in zip(*self._settled, strict=True))
        self._settled, self._n_settled = [], 0
        keys, order = keys.sort(descending=True)
        lists, order = lists[order].sort(stable=True)
        keys = keys[order]
        nth = torch.arange(len(keys), device=keys.device) - torch.searchsorted(lists, lists)
        # What comes behind the k-th of its list has one place that is thrown away.
        places = torch.where(nth < k, lists.to(torch.int64) * k + nth, n_lists * k)
        dealt = torch.full((n_lists * k + 1,), EMPTY, device=keys.device)
        dealt.scatter_(0, places, keys)
        step = max(1, _MERGED_KEYS // (2 * k))
        new = dealt[:-1].view(n_lists, k)
        for some in (slice(first, first + step) for first in range(0, n_lists, step)):
            both = torch.cat([self._keys[some], new[some]], dim=1)
            self._keys[some] = both.topk(k, dim=1, sorted=False).values
        last = self._keys.amin(1)
        limits = torch.where(last > EMPTY, values_of(last), -torch.inf)
        torch.maximum(self.limits, limits, out=self.limits)


def list_bytes(k: int) -> int:
    """Return the bytes a list takes between bands, at most."""
    places = 8 * k + 4
    # A key and its list's number; of those that wait for their count, the running sum too.
    return places + (8 + 4 + 4) * _MOST_ADDED + (8 + 4) * _MOST_SETTLED
