"""What a similarity leaves behind: values, intervals, nulls and ranks of all pairs of sites."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.site import Site, summarize
from actstore.store import CoreStore, Result, SiteInfo

if TYPE_CHECKING:
    import pandas as pd

Float64 = npt.NDArray[np.float64]

_NAMES = {"cka": "CKA", "cca": "mean CCA", "svcca": "SVCCA", "pwcca": "PWCCA"}
_STOPPED = {
    "tolerance": "stopped once all intervals were within ± {tolerance}",
    "max_batches": "stopped at max_batches",
    "rows": "stopped when all rows were read",
}


class Similarity:
    """Similarities of all pairs of sites; opening them computes nothing.

    Parameters
    ----------
    store : CoreStore
        The store that holds them.
    result : Result
        A result of the kind ``similarity``.

    See Also
    --------
    actstore.decompose.similarity.similarity : computes them.
    """

    def __init__(self, store: CoreStore, result: Result) -> None:
        self.store = store
        self.result = result

    @classmethod
    def open(cls, store: CoreStore, name: str | None = None) -> Self:
        """Open similarities by name; without one, the newest.

        Raises
        ------
        ResultNotFound
            If the store has none.
        """
        return cls(store, store.result("similarity", name))

    def __repr__(self) -> str:
        known = self.summary
        sites = summarize(info.site for info in self.sites)
        if known.get("other"):
            sites += f" with {summarize(self.other_sites)} of {known['other']['path']}"
        said = [
            f"{self.title} of {sites} over {known['n_rows_read']:,} of {known['n_rows']:,} rows "
            f"({known['rows']}) of {self.store.path}"
        ]
        if "stopped" in known:
            why = _STOPPED[known["stopped"]].format(tolerance=known.get("tolerance"))
            said.append(f"± {known['half_width']:.4f} for this store, {why}")
        for site, why in known["undefined"].items():
            said.append(f"{site} {why}")
        if "warning" in known:
            said.append(known["warning"])
        return f"<Similarity {self.name!r}: {'; '.join(said)}>"

    @property
    def name(self) -> str:
        """Name of the result."""
        return self.result.name

    @property
    def title(self) -> str:
        """What was measured, in words: ``"CKA, exact"``."""
        known = self.summary
        title = _NAMES[known["measure"]]
        if known["measure"] == "cka":
            title += f", {known['method']}"
        if known.get("variant", "paper") != "paper":
            title += f" as in {known['variant']}"
        return f"{title}, standardized" if known["standardize"] else title

    @cached_property
    def summary(self) -> dict[str, Any]:
        """How the similarities were computed, and why it stopped."""
        return {key: value for key, value in self.result.document.items() if key != "files"}

    @cached_property
    def sites(self) -> list[SiteInfo]:
        """The sites, in the order of rows."""
        return [self.store.site(name) for name in self.summary["sites"]]

    @cached_property
    def other_sites(self) -> list[Site]:
        """The sites in the order of columns: the same, or those of the other store."""
        other = self.summary.get("other") or self.summary
        return [Site.parse(name) for name in other["sites"]]

    def to_arrow(self) -> pa.Table:
        """Return one row for every ordered pair of sites, the diagonal included."""
        return self.result.table("similarity")

    def df(self) -> pd.DataFrame:
        """Return the same as a pandas DataFrame."""
        return self.to_arrow().to_pandas()

    @property
    def matrix(self) -> Float64:
        """The similarities, ``(n_sites, n_other_sites)``; NaN where a site is constant."""
        return self._table("value")

    @property
    def low(self) -> Float64:
        """Lower ends of the 95 % intervals for this store; the values where all rows were read."""
        return self._table("low")

    @property
    def high(self) -> Float64:
        """Upper ends of them."""
        return self._table("high")

    @property
    def text_low(self) -> Float64:
        """Lower ends of the 95 % intervals for text like this; NaN where they are not given."""
        return self._table("text_low")

    @property
    def text_high(self) -> Float64:
        """Upper ends of them."""
        return self._table("text_high")

    @property
    def null_mean(self) -> Float64:
        """The mean with one side shifted by whole documents; NaN where there are too few."""
        return self._table("null_mean")

    @property
    def null_p95(self) -> Float64:
        """The 95th percentile of that."""
        return self._table("null_p95")

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Directions that were kept of each site, by its name; empty for CKA."""
        table = self.to_arrow()
        pairs = zip(table["site_a"].to_pylist(), table["rank_a"].to_pylist(), strict=True)
        return {site: rank for site, rank in pairs if rank is not None}

    def _table(self, column: str) -> Float64:
        values: Float64 = self.to_arrow().column(column).to_numpy()
        return values.reshape(len(self.summary["sites"]), -1)
