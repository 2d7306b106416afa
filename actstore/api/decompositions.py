"""Decompositions and similarities of a store's sites, and its rows for other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.api.arguments import Sites, listed
from actstore.api.questions import Questions
from actstore.site import Site
from actstore.store import CoreStore, Rows
from actstore.store.budget import Progress, as_count, parse_budget

if TYPE_CHECKING:
    import dask.array

    from actstore.decompose import Loader, Stability
    from actstore.view import Factors, Similarity


class Decompositions(Questions):
    """A store whose sites can be factorised, compared and read in mixed order."""

    def nmf(
        self,
        sites: Sites = "mlp_post",
        n_components: int | Sequence[int] = 10,
        *,
        scale: str | None = "site",
        mode: str | None = None,
        signed: bool = False,
        active: float | None = None,
        rows: str = "content",
        seed: int | Sequence[int] = 0,
        passes: int | None = None,
        tolerance: float | None = None,
        max_passes: int = 100,
        start: npt.ArrayLike | None = None,
        bound: str | None = None,
        workers: int | None = None,
        scheduler: str | None = None,
        client: Any = None,
        name: str | None = None,
        budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> Factors | list[Factors]:
        """Factorise sites as one non-negative matrix, out of core, and keep the result.

        `workers` processes of this machine read the store and share the budget; or those of a
        running Dask `scheduler`, an address, or `client`, a ``distributed.Client``, where the
        budget is that of each.  The loadings are the same.  All other parameters are those of the
        function.

        See Also
        --------
        actstore.decompose.nmf : the algorithm, all parameters, references.
        sklearn.decomposition.NMF : in memory.
        """
        sites = listed(sites)
        from actstore.decompose import nmf
        from actstore.decompose.engine import Engine
        from actstore.view import Factors

        with Engine.on(client, workers, scheduler) as engine:
            result = nmf(
                self,
                sites,
                n_components,
                scale=scale,
                mode=mode,
                signed=signed,
                active=active,
                rows=self._rows_at(rows, sites),
                seed=seed,
                passes=1 if passes is None else as_count("passes", passes, 0),
                tolerance=tolerance,
                max_passes=max_passes,
                start=start,
                bound=bound,
                engine=engine,
                name=name,
                budget=parse_budget(budget),
                progress=progress,
            )
        if isinstance(result, list):
            return [Factors(self, each.result) for each in result]
        return Factors(self, result.result)

    def pca(
        self,
        sites: Sites = "mlp_post",
        n_components: int = 10,
        *,
        scale: str | None = None,
        rows: str = "content",
        name: str | None = None,
        budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> Factors:
        """Find the principal components of sites, exactly, and keep them.

        See Also
        --------
        actstore.decompose.pca : cost, all parameters.
        sklearn.decomposition.PCA : in memory.
        """
        sites = listed(sites)
        from actstore.decompose import pca
        from actstore.view import Factors

        found = pca(
            self,
            sites,
            as_count("n_components", n_components, 1),
            scale=scale,
            rows=self._rows_at(rows, sites),
            name=name,
            budget=budget,
            progress=progress,
        )
        return Factors(self, found.result)

    def ica(
        self,
        sites: Sites = "mlp_post",
        n_components: int = 10,
        *,
        scale: str | None = None,
        rows: str = "content",
        seed: int = 0,
        max_iterations: int = 200,
        tolerance: float = 1e-4,
        name: str | None = None,
        budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> Factors:
        """Find independent components of sites by FastICA, and keep them.

        See Also
        --------
        actstore.decompose.ica : cost, all parameters.
        sklearn.decomposition.FastICA : in memory.
        """
        sites = listed(sites)
        from actstore.decompose import ica
        from actstore.view import Factors

        found = ica(
            self,
            sites,
            as_count("n_components", n_components, 1),
            scale=scale,
            rows=self._rows_at(rows, sites),
            seed=as_count("seed", seed, 0),
            max_iterations=as_count("max_iterations", max_iterations, 1),
            tolerance=tolerance,
            name=name,
            budget=budget,
            progress=progress,
        )
        return Factors(self, found.result)

    def factors(self, name: str | None = None, kind: str = "nmf") -> Factors:
        """Return the factors of an earlier `nmf`, `pca` or `ica` by name; by default the newest.

        Parameters
        ----------
        name : str, optional
            Name of the result.
        kind : {"nmf", "pca", "ica"}
            What computed them.

        Raises
        ------
        ResultNotFound
            If there are none.
        """
        from actstore.view import Factors

        return Factors.open(self, name, kind)

    def similarity(
        self,
        sites: Sites = None,
        *,
        measure: str = "cka",
        method: str | None = None,
        tolerance: float = 0.005,
        rows: str = "content",
        standardize: bool = False,
        other: CoreStore | str | Path | None = None,
        variant: str = "paper",
        share: float | None = None,
        principal: float = 0.99,
        batch_rows: int | None = None,
        max_batches: int = 4096,
        seed: int = 0,
        name: str | None = None,
        budget: int | str | None = None,
        workers: int | None = None,
        scheduler: str | None = None,
        client: Any = None,
        progress: Progress | None = None,
    ) -> Similarity:
        """Compare all pairs of sites by CKA, CCA, SVCCA or PWCCA, and keep the result.

        CKA is estimated from mixed rows, or exact from all of them with ``method="exact"``; the
        others are exact.  With `other` the sites are compared with those of another store.
        `workers`, `scheduler` and `client` are as for `nmf`.

        See Also
        --------
        actstore.decompose.similarity : all parameters, what they cost, references.
        """
        sites = listed(sites)
        from actstore.decompose import similarity
        from actstore.decompose.engine import Engine
        from actstore.view import Similarity

        with Engine.on(client, workers, scheduler) as engine:
            result = similarity(
                self,
                sites,
                measure=measure,
                method=method,
                tolerance=tolerance,
                rows=rows if rows in ("content", "all") else self._rows_at(rows, sites),
                standardize=standardize,
                other=other,
                variant=variant,
                share=share,
                principal=principal,
                batch_rows=None if batch_rows is None else as_count("batch_rows", batch_rows, 8),
                max_batches=as_count("max_batches", max_batches, 2),
                seed=as_count("seed", seed, 0),
                name=name,
                budget=parse_budget(budget),
                engine=engine,
                progress=progress,
            )
        return Similarity(self, result.result)

    def similarity_result(self, name: str | None = None) -> Similarity:
        """Return an earlier `similarity` by name; without one, the newest.

        Raises
        ------
        ResultNotFound
            If there are none.
        """
        from actstore.view import Similarity

        return Similarity.open(self, name)

    def stability_result(self, name: str | None = None) -> Stability:
        """Return an earlier `Factors.stability` by name; without one, the newest.

        Raises
        ------
        ResultNotFound
            If there are none.
        """
        from actstore.decompose import Stability

        return Stability(self, self.result("stability", name))

    def loader(
        self,
        sites: Sites,
        batch_rows: int = 4096,
        *,
        rows: str = "content",
        seed: int = 0,
        epochs: int | None = 1,
        dtype: Any = None,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        budget: int | str | None = None,
    ) -> Loader:
        """Return a torch IterableDataset of batches mixed across documents, for training on rows.

        A batch is ``(values, row_ids)``: a tensor where one site is named, else a dict by site.

        See Also
        --------
        actstore.decompose.Loader : all parameters, workers, ranks, going on after a stop.
        """
        sites = listed(sites)
        from actstore.decompose import Loader

        return Loader(
            self,
            sites,
            as_count("batch_rows", batch_rows, 1),
            rows=self._rows_at(rows, sites),
            seed=as_count("seed", seed, 0),
            epochs=None if epochs is None else as_count("epochs", epochs, 1),
            dtype=dtype,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            budget=budget,
        )

    def shuffle(
        self,
        sites: Sites,
        to: str | Path,
        *,
        rows: str = "content",
        seed: int = 0,
        budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Write a uniformly permuted copy of the rows of some sites, out of core, as Zarr.

        See Also
        --------
        actstore.decompose.shuffle : all parameters, what is written.
        """
        sites = listed(sites)
        from actstore.decompose import shuffle

        return shuffle(
            self,
            sites,
            to,
            rows=self._rows_at(rows, sites),
            seed=as_count("seed", seed, 0),
            budget=budget,
            progress=progress,
        )

    def _rows_at(self, rows: str, sites: Sites) -> Rows:
        """Return the rows of a rule in the space of some sites, which all sites of a call share."""
        return self._rows(rows, self.select(sites)[0].site.space)

    def dask(self, site: str | Site) -> tuple[dask.array.Array, npt.NDArray[np.int64]]:
        """Return a site as a plain dask array, and the row_id of each of its rows.

        Holes and rows that are not stored are dropped: row i of the array is the token
        ``row_ids[i]``.  One chunk a segment, read when computed.

        Returns
        -------
        array : dask.array.Array, shape (rows, width), stored dtype
        row_ids : ndarray of int64, shape (rows,)
        """
        import dask.array as da

        path, info = self.path.absolute(), self.site(site)
        alive = _Alive(self)  # a temporary store lives as long as what will read it
        layout = self.layout(info)
        counts = {s: len(self.stored_offsets(info, s)) for s in self.committed}

        def read(segment: int, n_rows: int) -> npt.NDArray[Any]:
            assert alive is not None
            store = CoreStore(path)  # opened where the task runs
            return store.read(store.site(info.site), segment, 0, n_rows)

        blocks = [
            da.from_delayed(
                _delayed(read)(segment, n_rows), (n_rows, layout.width), layout.numpy_dtype
            )
            for segment, n_rows in counts.items()
            if n_rows
        ]
        if not blocks:
            return da.empty((0, layout.width), dtype=layout.numpy_dtype), self[site].row_ids()
        return da.concatenate(blocks), self[site].row_ids()


class _Alive:
    """Holds a store in this process; elsewhere it is nothing."""

    def __init__(self, store: CoreStore | None = None) -> None:
        self._store = store

    def __reduce__(self) -> tuple[type[_Alive], tuple[()]]:
        return _Alive, ()


def _delayed(function: Any) -> Any:
    import dask

    return dask.delayed(function, pure=True)
