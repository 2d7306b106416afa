"""Promoted tokens: those whose logits output weights raise and lower most by the direct path.

Shown for a neuron, or for many at once that are active together, as a factor's are.  An effect is
of one unit of activation, over what the final norm divides by, so it says which tokens and how
sharply, not how many logits; and it is taken from the mean over all tokens, which moves no
probability.  Where activations or scores are below zero, what is promoted is suppressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore import arrow
from actstore.site import Site
from actstore.store import CoreStore

if TYPE_CHECKING:
    from actstore.models import LanguageModel

_EFFECT_BYTES = 1 << 27  # of effects at once, which are copied once

PROMOTED = pa.schema(
    [
        ("number", pa.int32()),
        ("site", pa.string()),
        ("side", pa.string()),
        ("rank", pa.int32()),
        ("token_id", pa.int32()),
        ("token", pa.string()),
        ("effect", pa.float64()),
        ("deviations", pa.float64()),
    ]
)


def promoted(
    store: CoreStore,
    model: LanguageModel,
    weights: Mapping[Site, npt.NDArray[Any]],
    k: int = 10,
) -> pa.Table:
    """Return the tokens that sets of neurons promote and suppress most, by site and in all.

    One product of the unembedding with a direction for each set and site; memory 4 bytes x channels
    for each of these, and some 256 MB for the effects of as many of them at once as fit there.

    Parameters
    ----------
    store : CoreStore
        The store, whose vocabulary names the tokens.
    model : LanguageModel
        The model it was captured from.
    weights : mapping of Site to ndarray, (n_sets, width)
        How active each neuron of some sites of ``mlp_post`` is, in units of its activation, in each
        of the sets; all sites have as many sets.
    k : int, default 10
        How many tokens on either side.

    Returns
    -------
    pyarrow.Table
        number (the set), site (null for all sites together), side ("promoted" or "suppressed"),
        rank from 1, token_id, token, effect, and deviations: the effect in standard deviations of
        all tokens'.  Tokens with equal effects are in the order of their ids; ids that no token
        uses are left out.  Of a set that writes nothing there is none.

    Raises
    ------
    ModelError
        If the model has no direct path, or a site has no output weights.

    See Also
    --------
    actstore.models.direct_path : what the direct path is, how it is proved, references.
    """
    path = model.direct_path
    sites = sorted(weights)
    by_site = np.stack([model.written(site, weights[site]) for site in sites])
    places: list[str | None] = [None, *map(str, sites)]
    n_sets = by_site.shape[1]
    directions = np.concatenate([by_site.sum(axis=0), *by_site])
    n_tokens = len(path.unembedding)
    token_ids = _used(store, n_tokens)
    step = max(1, _EFFECT_BYTES // (4 * n_tokens))
    pieces = []
    for start in range(0, len(directions), step):
        rows = []
        for i, of in enumerate(path.effects(directions[start : start + step]), start):
            held = of[token_ids].astype(np.float64)
            held -= held.mean()
            deviation = held.std()
            if not deviation > 0:
                continue
            for side, sign in (("promoted", -1.0), ("suppressed", 1.0)):
                best = _lowest(sign * held, k)
                texts = store.texts_of(token_ids[best]).to_pylist()
                for rank, (at, text) in enumerate(zip(best, texts, strict=True), 1):
                    rows.append(
                        {
                            "number": i % n_sets,
                            "site": places[i // n_sets],
                            "side": side,
                            "rank": rank,
                            "token_id": int(token_ids[at]),
                            "token": text,
                            "effect": float(held[at]),
                            "deviations": float(held[at] / deviation),
                        }
                    )
        pieces.append(pa.Table.from_pylist(rows, schema=PROMOTED))
    return pa.concat_tables(pieces)


def _lowest(values: npt.NDArray[np.float64], k: int) -> list[int]:
    """Return where the k lowest values are, lowest first, equal ones in order."""
    k = min(k, len(values))
    few = np.flatnonzero(values <= np.partition(values, k - 1)[k - 1])
    found: list[int] = few[np.argsort(values[few], kind="stable")][:k].tolist()
    return found


def _used(store: CoreStore, n_tokens: int) -> npt.NDArray[np.int64]:
    """Return the ids of the tokens that are in the vocabulary and have a logit, ascending."""
    vocabulary = store.vocabulary
    named = vocabulary.filter(pc.greater(pc.binary_length(vocabulary.column("piece")), 0))
    ids = np.sort(arrow.numbers(named.column("token_id"))).astype(np.int64)
    return ids[ids < n_tokens]
