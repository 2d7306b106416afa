"""Promoted tokens as views show them: of factors, whose neurons write together, and of a neuron."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.decompose import Factors
from actstore.errors import ArgumentError
from actstore.query import promoted
from actstore.site import Site, summarize
from actstore.store import CoreStore
from actstore.view.cut import cut

if TYPE_CHECKING:
    from actstore.models import LanguageModel

SHOWN = 10
_SHOWN_OF_SITE = 5


def factor_weights(factors: Factors) -> dict[Site, npt.NDArray[np.float64]]:
    """Return the activations that a score of 1 stands for, (k, width), of each FFNN site.

    The loadings over the scale that the site was multiplied by.

    Raises
    ------
    ArgumentError
        If none of the sites is one of ``mlp_post``: only their neurons have output weights.
    """
    sites = [info.site for info in factors.sites if info.site.hook == "mlp_post"]
    if not sites:
        raise ArgumentError(
            f"model was given, but factors {factors.name!r} are of "
            f"{summarize(info.site for info in factors.sites)}; expected sites of mlp_post, whose "
            "neurons have output weights. Leave out model=."
        )
    scales = factors.summary["site_scales"]
    return {
        site: factors.loadings_of(site).astype(np.float64) / scales[str(site)] for site in sites
    }


def neuron_weights(
    store: CoreStore, site: Site, neuron: int
) -> dict[Site, npt.NDArray[np.float64]]:
    """Return an activation of 1 of one neuron, (1, width)."""
    active = np.zeros((1, store.site(site).width))
    active[0, neuron] = 1
    return {site: active}


def promoted_entries(
    store: CoreStore,
    model: LanguageModel,
    weights: dict[Site, npt.NDArray[np.float64]],
) -> list[dict[str, Any]]:
    """Return what a view shows of each set of neurons.

    Returns
    -------
    list of dict
        ``all``: promoted and suppressed tokens as [token, deviations, effect].  ``sites``: the
        same with the site's name in front and fewer tokens; empty where there is but one site.
    """
    table = promoted(store, model, weights, SHOWN)
    (n_sets,) = {len(rows) for rows in weights.values()}
    found: list[dict[str, Any]] = [{"all": [[], []], "sites": []} for _ in range(n_sets)]
    by_site: list[dict[str, list[Any]]] = [{} for _ in range(n_sets)]
    for row in table.to_pylist():
        entry = [cut(row["token"]), _short(row["deviations"]), _short(row["effect"])]
        side = int(row["side"] == "suppressed")
        if row["site"] is None:
            found[row["number"]]["all"][side].append(entry)
        elif len(weights) > 1 and row["rank"] <= _SHOWN_OF_SITE:
            lists = by_site[row["number"]].setdefault(row["site"], [row["site"], [], []])
            lists[1 + side].append(entry)
    for entry_of, lists_of in zip(found, by_site, strict=True):
        entry_of["sites"] = list(lists_of.values())
    return found


def promoted_table(
    store: CoreStore,
    model: LanguageModel,
    weights: dict[Site, npt.NDArray[np.float64]],
    k: int,
    column: str,
) -> pa.Table:
    """Return `actstore.query.promoted` with its first column called after what the sets are."""
    table = promoted(store, model, weights, k)
    return table.rename_columns([column, *table.column_names[1:]])


def _short(value: float) -> float:
    return float(f"{value:.3g}")
