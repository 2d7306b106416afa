"""What is compared: sites and rows of a store, and perhaps of another over the same documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.decompose.alignment import Aligned, PairedScan, align
from actstore.decompose.scan import Scan, chosen_rows
from actstore.errors import ArgumentError
from actstore.site import Site, summarize
from actstore.store import CoreStore, Rows, SiteInfo

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """What is compared: sites and rows of a store, and perhaps of another."""

    store: CoreStore
    own: list[SiteInfo]
    rows: Rows
    other: CoreStore | None
    others: list[SiteInfo]
    aligned: Aligned | None
    budget_bytes: int
    seed: int

    @classmethod
    def of(
        cls,
        store: CoreStore,
        sites: str | Site | Iterable[str | Site] | None,
        rows: Rows | str,
        other: CoreStore | None,
        budget_bytes: int,
        seed: int,
    ) -> Subject:
        """Return it checked."""
        if not isinstance(sites, (str, Site)) and sites is not None:
            sites = list(sites)
        own = store.select(sites)
        if other is None:
            if len(own) < 2:
                raise ArgumentError(
                    f"sites = {str(own[0].site)!r} is one site; expected two or more to compare. "
                    f"{store.path} has {summarize(store.sites)}."
                )
            chosen = chosen_rows(store, rows, own)
            return cls(store, own, chosen, None, [], None, budget_bytes, seed)
        others = other.select(sites)
        for infos, of in ((own, store), (others, other)):
            if len({info.site.space for info in infos}) != 1:
                raise ArgumentError(
                    f"sites = {summarize(info.site for info in infos)} do not share rows; expected "
                    f"sites of one space of {of.path}. Name them as 'encoder.mlp_post'."
                )
        chosen = chosen_rows(store, rows, own)
        of_other = chosen_rows(other, "all" if rows == "all" else "content", others)
        spaces = own[0].site.space, others[0].site.space
        aligned = align(store, chosen, other, of_other, spaces, budget_bytes)
        return cls(store, own, aligned.rows, other, others, aligned, budget_bytes, seed)

    @property
    def infos(self) -> list[SiteInfo]:
        """All sites, those of the other store last."""
        return [*self.own, *self.others]

    @property
    def widths(self) -> list[int]:
        """Columns of each."""
        return [info.width for info in self.infos]

    @property
    def held_bytes(self) -> int:
        """What the order of the other store's rows takes of the budget."""
        return self.aligned.order.nbytes if self.aligned else 0

    def label(self, site: int) -> str:
        """Return the name of a site."""
        name = str(self.infos[site].site)
        return name if site < len(self.own) else f"{name} of the other store"

    def of_other(self) -> dict[str, Any]:
        """Return what the result says of the other store."""
        if self.other is None or self.aligned is None:
            return {}
        return {
            "other": {
                "path": str(self.other.path),
                "store_id": self.other.meta.store_id,
                "model": self.other.meta.model.get("name"),
                "sites": [str(info.site) for info in self.others],
            },
            "share_aligned": round(self.aligned.share, 6),
        }

    def scan(self, sites: Sequence[int] | None = None, reserved_bytes: int = 0) -> Scan:
        """Return a scan of some sites, by number and ascending; by default of all."""
        numbers = range(len(self.infos)) if sites is None else sites
        own = [self.own[i] for i in numbers if i < len(self.own)]
        others = [self.others[i - len(self.own)] for i in numbers if i >= len(self.own)]
        options: dict[str, Any] = {
            "budget_bytes": self.budget_bytes,
            "reserved_bytes": reserved_bytes + self.held_bytes,
            "seed": self.seed,
        }
        if self.other is None or self.aligned is None or not others:
            return Scan(self.store, own, self.rows, **options)
        if not own:
            return Scan(self.other, others, self.aligned.other_rows, **options)
        return PairedScan(self.store, own, self.other, others, self.aligned, **options)

    def documents_of(self, row_ids: Ids) -> Ids:
        """Return the document of each of some rows."""
        segments, offsets = np.divmod(row_ids, self.store.meta.segment_rows)
        documents = np.empty(len(row_ids), np.int64)
        space = self.own[0].site.space
        for segment in np.unique(segments).tolist():
            here = segments == segment
            column = self.store.token_column(segment, "document", space)
            documents[here] = column[offsets[here]]
        return documents
