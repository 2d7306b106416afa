"""The public face: open a store or make one by capture, then ask.

`Store` is the core store with one-line methods that call the packages above it; the same calls
stand behind the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.errors import ArgumentError
from actstore.site import Site
from actstore.store import CoreStore, Rows
from actstore.store.budget import Progress, as_count, parse_budget
from actstore.store.info import Info, info

if TYPE_CHECKING:
    import dask.array
    import duckdb

    from actstore.capturing import Estimate, Replayed, Replayer, Timing, Verification
    from actstore.decompose import Loader
    from actstore.exporting import Shown
    from actstore.query import Activations, Answer, Top
    from actstore.view import Factors, Neuron, Similarity, View

Sites = str | Site | Iterable[str | Site] | None
Keep = str | float | Mapping[str, str | float] | None

_REPLAYED_ROWS = 4096  # at a time, where one neuron of them is wanted


class Store(CoreStore):
    """A store: for every site of a model, a matrix of activations, rows = tokens.

    ``store["mlp_post.5"][row_ids]`` reads rows as NumPy, ``store.sql(…)`` asks in SQL,
    ``store.top(…)``, ``store.nmf(…)`` and ``store.similarity(…)`` compute.

    Parameters
    ----------
    path : str or Path
        Folder of the store.

    Raises
    ------
    StoreNotFound
        If the folder holds no store.

    Examples
    --------
    >>> import actstore
    >>> store = actstore.capture(model, text="The keys to the cabinet", tokenizer=tokenizer)
    >>> store["mlp_post.1"][store["mlp_post.1"].row_ids()].shape
    (5, 64)
    """

    timing: Timing | None = None
    """Where the time of the capture went that returned this store; None if it was opened."""

    def __repr__(self) -> str:
        return (
            f"<Store {self.path}: {self.meta.model['name']}, {self.n_rows():,} rows x "
            f"{len(self.sites)} sites>"
        )

    def info(self) -> Info:
        """Return the store at a glance: model, corpus, rows, sites and their modules, results."""
        return info(self)

    def view(self) -> View:
        """Return the store at a glance, as a notebook shows it: model, corpus, sites, results."""
        from actstore.view import overview

        return overview(self)

    def to_html(self, path: str | Path) -> Path:
        """Write the store at a glance as one HTML file that makes no request."""
        return self.view().to_html(path)

    def to_notebook(self, path: str | Path) -> Path:
        """Write an executed notebook that opens the store again and shows it at a glance."""
        from actstore.view import overview_notebook

        return overview_notebook(self.path, path)

    def _repr_html_(self) -> str:
        return self.view().html

    def finish(self, progress: Progress | None = None) -> None:
        """Compact what is committed into the index; `capture` does so at its end.

        One pass over the partials of segments the index does not cover.
        """
        from actstore.capturing import compact

        compact(self, progress=progress)

    def sql(self, query: str, /, **params: Any) -> Answer:
        """Answer a question in SQL; reads only the files and columns the query needs.

        Parameters
        ----------
        query : str
            One SELECT, or EXPLAIN, DESCRIBE or SUMMARIZE of one, over the views documents, tokens,
            vocabulary, sites, neurons, histograms, exemplars, factors, factor_sites, loadings,
            factor_exemplars, factor_positions, factor_documents, factor_tokens, factor_histograms,
            similarity and results, and the tables ``top_tokens(site, neuron)``,
            ``activations(site, neuron)`` and ``means(site, key)``.
        **params
            Values for ``$name`` in the query.

        Returns
        -------
        Answer
            A table: ``.df()``, ``.to_arrow()``, ``.rows()``.

        Raises
        ------
        QueryError
            If it is not one SELECT, or DuckDB refuses it.

        See Also
        --------
        connect : a DuckDB connection of your own.
        """
        answer: Answer = self._database.sql(query, **params)
        return answer

    def connect(self) -> duckdb.DuckDBPyConnection:
        """Return a DuckDB connection of your own, with the views of the store and no lock on it.

        What `sql` refuses it does: COPY, ATTACH, SET, further files.  It sees what is published
        now; all files behind its views are read once, to compare their checksums.  Close it.

        Examples
        --------
        >>> with store.connect() as connection:
        ...     connection.execute("CREATE TABLE loud AS FROM neurons WHERE max > 9")
        """
        connection: duckdb.DuckDBPyConnection = self._database.connect()
        return connection

    def activations(self, site: str | Site, neuron: int, rows: str = "content") -> Activations:
        """Return a neuron's column, to be read when somebody asks: row_id and value.

        It is an Arrow stream for whoever takes one (DuckDB, Polars, pyarrow), read a segment at a
        time, again for each reader: 2 to 4 bytes a row.  In SQL it is
        ``activations('mlp_post.5', 77)``.

        Parameters
        ----------
        site : str or Site
            Such as ``"mlp_post.5"``.
        neuron : int
            Column of the site.
        rows : str
            ``"content"``, ``"all"``, or an SQL condition on tokens and documents; of these, the
            rows that are stored.

        Returns
        -------
        Activations
            ``.to_arrow()``, ``.df()``, ``len``.

        Raises
        ------
        SiteNotFound, NeuronNotFound
            If there is no such site or neuron.
        RowNotFound
            If no rows of the site are stored.
        """
        from actstore.query import Activations

        return Activations(self, site, neuron, self._rows(rows, self.site(site).site.space))

    @property
    def _database(self) -> Any:
        from actstore.query import Database

        if "_kept_database" not in self.__dict__:
            self.__dict__["_kept_database"] = Database(self)
        return self.__dict__["_kept_database"]

    def top(
        self,
        site: str | Site,
        neuron: int,
        k: int = 20,
        *,
        largest: bool = True,
        where: str | None = None,
        distinct: str | None = None,
        before: int = 8,
        after: int = 8,
        activations: bool = False,
        replay: bool = False,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
    ) -> Top:
        """Return the rows that drive a neuron most, with the text around them.

        Exact for every k and every condition: from the index where it reaches, else by reading the
        chunks of the neuron's column that can matter.  Content rows; order: value descending, row
        ascending.

        Parameters
        ----------
        site : str or Site
            Such as ``"mlp_post.5"``.
        neuron : int
            Column of the site.
        k : int, default 20
            How many rows.
        largest : bool, default True
            False for the lowest values.
        where : str, optional
            SQL condition that the rows meet, over the columns of tokens and source, n_tokens and
            metadata of documents: ``"source LIKE '%Lincoln%'"``, ``"text = ' war'"``.
        distinct : {"window", "document"}, optional
            At most one row of each, its best, so that a repeated sentence does not fill the list.
        before, after : int, default 8
            Tokens of context on either side.
        activations : bool, default False
            Add the columns tokens and values, the neuron over the text around each row (NULL where
            a row is not stored), and place, which of the tokens is the row itself.
        replay : bool, default False
            The same, and values that are not stored are computed again, as by `replay`.
        model, tokenizer, device
            As for `replay`.

        Returns
        -------
        Top
            A table with rank, row_id, value, document, position, token and its context;
            ``.reached`` says how the rows were found.

        Raises
        ------
        SiteNotFound, NeuronNotFound
            If there is no such site or neuron.
        QueryError
            If `where` is not a condition on rows.
        ArgumentError
            If k < 1, or the site does not keep all rows and the index holds fewer than k.
        """
        from actstore.query import top

        before, after = as_count("before", before, 0), as_count("after", after, 0)
        k = as_count("k", k, 1, 2**62)

        def again(row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            values = np.empty(len(row_ids), np.float32)
            for start in range(0, len(row_ids), _REPLAYED_ROWS):
                some = slice(start, start + _REPLAYED_ROWS)
                found = self.replay(
                    row_ids[some], site, model=model, tokenizer=tokenizer, device=device
                )
                values[some] = found[self.site(site).site][:, neuron]
            return values

        return top(
            self,
            site,
            neuron,
            k,
            largest=largest,
            where=where,
            distinct=distinct,
            before=before,
            after=after,
            activations=activations,
            replay=again if replay else None,
            database=self._database,
        )

    def neuron(
        self,
        site: str | Site,
        neuron: int,
        *,
        by: str = "source",
        replay: bool = False,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
        budget: int | str | None = None,
    ) -> Neuron:
        """Return a neuron to be looked at: ``.view()``, ``.to_html(path)``, ``.to_notebook(path)``.

        Its histogram and statistics, its exemplars in context, the factors it loads on, the neurons
        that go with it, and its means in groups.

        Parameters
        ----------
        site : str or Site
            Such as ``"mlp_post.5"``.
        neuron : int
            Column of the site.
        by : str, default "source"
            What means are grouped by: SQL on the columns of tokens, and on source, n_tokens and
            metadata of documents, such as ``"metadata->>'$.party'"``.
        replay : bool
            Compute the values around exemplars again where they are not stored; else only the
            exemplar itself is marked, and the view says so.
        model, tokenizer, device, budget
            As for `replay`.

        Raises
        ------
        SiteNotFound, NeuronNotFound
            If there is no such site or neuron.
        ArgumentError
            If the store has no index.

        See Also
        --------
        export_neuron : the same as JSON for other tools.
        """
        from actstore.view import Neuron

        again = self._again(site, model, tokenizer, device, budget) if replay else None
        return Neuron(self, site, neuron, database=self._database, replay=again, by=by)

    def _again(
        self, site: str | Site, model: Any, tokenizer: Any, device: str, budget: int | str | None
    ) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]:
        """Return what computes rows of a site again."""

        def computed(row_ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
            options = {"model": model, "tokenizer": tokenizer, "device": device}
            return self.replay(row_ids, site, budget=budget, **options)[self.site(site).site]

        return computed

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
        start: npt.ArrayLike | None = None,
        bound: str | None = None,
        client: Any = None,
        name: str | None = None,
        budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> Factors | list[Factors]:
        """Factorise sites as one non-negative matrix, out of core, and keep the result.

        `client`, a ``distributed.Client``, has its workers read the store; without one this process
        does.  All other parameters are those of the function.

        See Also
        --------
        actstore.decompose.nmf : the algorithm, all parameters, references.
        sklearn.decomposition.NMF : in memory.
        """
        from actstore.decompose import nmf
        from actstore.decompose.engine import Engine
        from actstore.view import Factors

        result = nmf(
            self,
            sites,
            n_components,
            scale=scale,
            mode=mode,
            signed=signed,
            active=active,
            rows=self._rows(rows),
            seed=seed,
            passes=1 if passes is None else as_count("passes", passes, 0),
            tolerance=tolerance,
            start=start,
            bound=bound,
            engine=Engine(client),
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
        from actstore.decompose import pca
        from actstore.view import Factors

        found = pca(
            self,
            sites,
            as_count("n_components", n_components, 1),
            scale=scale,
            rows=self._rows(rows),
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
        from actstore.decompose import ica
        from actstore.view import Factors

        found = ica(
            self,
            sites,
            as_count("n_components", n_components, 1),
            scale=scale,
            rows=self._rows(rows),
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

        return Factors(self, self.result(kind, name))

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
        seed: int = 0,
        name: str | None = None,
        budget: int | str | None = None,
        client: Any = None,
        progress: Progress | None = None,
    ) -> Similarity:
        """Compare all pairs of sites by CKA, CCA, SVCCA or PWCCA, and keep the result.

        CKA is estimated from mixed rows, or exact from all of them with ``method="exact"``; the
        others are exact.  With `other` the sites are compared with those of another store.

        See Also
        --------
        actstore.decompose.similarity : all parameters, what they cost, references.
        """
        from actstore.decompose import similarity
        from actstore.view import Similarity

        result = similarity(
            self,
            sites,
            measure=measure,
            method=method,
            tolerance=tolerance,
            rows=rows if rows in ("content", "all") else self._rows(rows),
            standardize=standardize,
            other=other,
            variant=variant,
            share=share,
            principal=principal,
            seed=as_count("seed", seed, 0),
            name=name,
            budget=parse_budget(budget),
            client=client,
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

        return Similarity(self, self.result("similarity", name))

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
        from actstore.decompose import Loader

        return Loader(
            self,
            sites,
            as_count("batch_rows", batch_rows, 1),
            rows=rows if rows in ("content", "all") else self._rows(rows),
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
        from actstore.decompose import shuffle

        return shuffle(
            self,
            sites,
            to,
            rows=rows if rows in ("content", "all") else self._rows(rows),
            seed=as_count("seed", seed, 0),
            budget=budget,
            progress=progress,
        )

    def replay(
        self,
        rows: Any,
        sites: Sites = None,
        *,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
        budget: int | str | None = None,
    ) -> Replayed:
        """Compute activations of any planned rows again, from the stored tokens.

        One forward pass of the windows that hold the rows, whether the rows were kept, or captured
        yet, or not.  Model and windows stay in memory: what was asked for lately costs no forward.

        Parameters
        ----------
        rows : int or sequence of int
            Row ids, as in ``store[site][rows]``.
        sites : str, Site or iterable, optional
            Sites or patterns; default all.
        model : str, Path or torch.nn.Module, optional
            The model the store was captured from; default where its name in the store leads.
        tokenizer : PreTrainedTokenizerFast, optional
            Needed where `model` is a module.
        device : str
            ``"auto"``, ``"cpu"``, ``"cuda"``, ….
        budget : int or str, optional
            Peak memory beyond the model: half for what is returned, a quarter for what is kept.

        Returns
        -------
        Replayed
            ``found[site]``, (n_rows, width) in the stored dtype, in the order of `rows`;
            ``found.row_ids``.  Equal to what is stored within the tolerance of `verify`.

        Raises
        ------
        RowNotFound, SiteNotFound
            If there is no such row or site.
        ModelError, StoreMismatch
            If the model cannot be loaded, or is another.
        BudgetExceeded
            If the rows do not fit into half of the budget.
        """
        n_bytes = parse_budget(budget)
        return self._replayer(model, tokenizer, device).replay(rows, sites, n_bytes)

    def export_neuron(
        self,
        site: str | Site,
        neuron: int,
        to: str | Path,
        *,
        form: str = "neuronpedia",
        k: int = 20,
        n_bins: int = 10,
        n_each: int = 2,
        n_random: int = 20,
        before: int = 32,
        after: int = 32,
        replay: bool = False,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
        budget: int | str | None = None,
    ) -> Path:
        """Write a neuron's statistics and exemplars in context as one JSON file.

        Parameters
        ----------
        site : str or Site
            Such as ``"mlp_post.5"``.
        neuron : int
            Column of the site.
        to : str or Path
            A new ``.json`` file.
        form : {"neuronpedia", "neuron-record"}
            The fields of Neuronpedia, or the ``NeuronRecord`` of automated-interpretability.
        k : int, default 20
            Rows with the highest values, one of a window; the index has up to 100.
        n_bins, n_each : int, default 10 and 2
            Quantile bins of a uniform sample of rows, and rows of each.
        n_random : int, default 20
            Rows drawn uniformly.
        before, after : int, default 32
            Content rows around each of them, as far as its window reaches.
        replay : bool
            Compute the values around rows again where they are not stored; else they are null.
        model, tokenizer, device, budget
            As for `replay`.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        SiteNotFound, NeuronNotFound
            If there is no such site or neuron.
        ResultExists
            If there is something at `to`.
        ArgumentError
            If the store has no index, or `form` needs values that are not known.

        See Also
        --------
        actstore.exporting.feature : the fields, and where they are from.
        """
        from actstore.exporting import check_form, neuron_feature, new_json

        check_form(form)
        path = new_json(to)
        computed = self._again(site, model, tokenizer, device, budget) if replay else None
        shown = _shown(k, n_bins, n_each, n_random, before, after)
        return neuron_feature(self, site, neuron, shown, replay=computed).write(path, form)

    def export_factor(
        self,
        factor: int,
        to: str | Path,
        *,
        name: str | None = None,
        form: str = "neuronpedia",
        k: int = 20,
        n_bins: int = 10,
        n_each: int = 2,
        n_random: int = 20,
        before: int = 32,
        after: int = 32,
    ) -> Path:
        """Write a factor's statistics and exemplars in context as one JSON file.

        Parameters as for `export_neuron`, and

        Parameters
        ----------
        factor : int
            Number of the factor, from 0.
        to : str or Path
            A new ``.json`` file.
        name : str, optional
            Name of the decomposition; default the newest.
        form, k, n_bins, n_each, n_random, before, after
            As for `export_neuron`.

        Raises
        ------
        ResultNotFound
            If there are no factors.
        ResultExists
            If there is something at `to`.
        ArgumentError
            If there is no such factor.
        """
        from actstore.exporting import check_form, factor_feature, new_json

        check_form(form)
        path = new_json(to)
        shown = _shown(k, n_bins, n_each, n_random, before, after)
        return factor_feature(self.factors(name), factor, shown).write(path, form)

    def export_slice(
        self,
        to: str | Path,
        sites: Sites = None,
        *,
        rows: str | npt.ArrayLike = "content",
        budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Write rows of some sites as one ``.parquet`` or ``.safetensors`` file, in row order.

        Parameters
        ----------
        to : str or Path
            A new file.
        sites : str, Site or iterable, optional
            Sites of one space, or patterns; default all.
        rows : str or sequence of int, default "content"
            ``"content"``, ``"all"``, an SQL condition on tokens and documents, or row ids.  Of a
            rule those are written that are stored at all sites; row ids must be.
        budget : int or str, optional
            Peak memory.
        progress : callable, optional
            ``progress(stage, done, total)``.

        Returns
        -------
        Path
            The file.

        See Also
        --------
        actstore.exporting.slice : the columns and tensors, errors.
        Store.shuffle : rows in random order, as Zarr.
        """
        from actstore.exporting import export_slice
        from actstore.store.rows import as_row_ids

        infos = self.select(sites)
        if isinstance(rows, str) and rows in ("content", "all"):
            chosen = self.rows_stored(self.rows(rows, infos[0].site.space), infos)
        elif isinstance(rows, str):
            chosen = self.rows_stored(self._rows(rows), infos)
        else:
            ids = as_row_ids(rows)
            chosen = Rows.from_row_ids(f"{len(ids)} row ids", self.meta.segment_rows, ids)
        names = [info.site for info in infos]
        return export_slice(self, names, chosen, to, budget=budget, progress=progress)

    def verify(
        self,
        n_rows: int = 1000,
        *,
        seed: int = 0,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
        budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> Verification:
        """Check that the store holds what its model computes from its text.

        Tokenises and runs random windows again, in other batches, and compares tokens, stored
        values and exemplars; reads a few columns whole to compare their lists and statistics.

        Parameters
        ----------
        n_rows : int, default 1000
            Windows are drawn until they have so many rows.
        seed : int, default 0
            Which windows are drawn.
        model, tokenizer, device, budget
            As for `replay`.
        progress : callable, optional
            ``progress(stage, done, total)``.

        Returns
        -------
        Verification
            ``.ok``, what was checked, and the first mismatches.

        Raises
        ------
        ModelError, StoreMismatch
            If the model cannot be loaded, or is another.
        """
        from actstore.capturing import run_verify

        return run_verify(
            self,
            self._replayer(model, tokenizer, device).model,
            as_count("n_rows", n_rows, 1, 2**62),
            as_count("seed", seed, 0),
            parse_budget(budget),
            progress,
        )

    def _replayer(self, model: Any, tokenizer: Any, device: str) -> Replayer:
        """Return the kept model of the store, loaded anew if another one is given."""
        from actstore.capturing import Replayer, model_of

        given = (model, tokenizer, device)
        kept: tuple[Any, Replayer] | None = self.__dict__.get("_kept_replayer")
        if kept is None or (given != (None, None, "auto") and given != kept[0]):
            kept = (given, Replayer(self, model_of(self, model, tokenizer, device)))
            self.__dict__["_kept_replayer"] = kept
        return kept[1]

    def _rows(self, rule: str, space: str | None = None) -> Rows:
        """Return the rows of a rule: ``"content"``, ``"all"``, or an SQL condition on tokens."""
        if rule in ("content", "all"):
            return self.rows(rule, space)
        from actstore.query import Condition

        space = self.meta.spaces[0] if space is None else space
        found = Condition(self._database, self, rule, space, "rows").rows()
        if not found.n_rows:
            raise ArgumentError(
                f"rows = {rule!r} holds for no content row of {self.path}; expected 'content', "
                "'all', or an SQL condition on the columns of tokens and documents."
            )
        return found

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

    def __init__(self, store: Store | None = None) -> None:
        self._store = store

    def __reduce__(self) -> tuple[type[_Alive], tuple[()]]:
        return _Alive, ()


def _shown(k: int, n_bins: int, n_each: int, n_random: int, before: int, after: int) -> Shown:
    from actstore.exporting import Shown

    return Shown(
        as_count("k", k, 0),
        as_count("n_bins", n_bins, 1),
        as_count("n_each", n_each, 1),
        as_count("n_random", n_random, 0),
        as_count("before", before, 0),
        as_count("after", after, 0),
    )


def _delayed(function: Any) -> Any:
    import dask

    return dask.delayed(function, pure=True)


def open(path: str | Path) -> Store:
    """Open the store in a folder.

    Raises
    ------
    StoreNotFound
        If the folder holds no store.
    FormatError
        If another version of the format wrote it.
    """
    return Store(path)


def capture(
    model: Any,
    corpus: Any = None,
    store: str | Path | None = None,
    *,
    text: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    sites: Sites = None,
    keep: Keep = None,
    grams: Sites = None,
    dtype: str = "auto",
    context: int | None = None,
    overlap: int | None = None,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
    device: str = "auto",
    budget: int | str | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    on_nan: str = "error",
    on_overflow: str = "count",
    order: str = "corpus",
    add: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    segments: str | slice | None = None,
    progress: Progress | None = None,
) -> Store:
    """Run a corpus through a model once and keep its activations.

    Called again with the same arguments it goes on where it was stopped, and does nothing when all
    is there.  One forward pass of every window; memory is bounded by the budget.

    Parameters
    ----------
    model : str, Path or torch.nn.Module
        Hub name, local directory (safetensors, or one .gguf), or a transformers model.
    corpus : str, Path, dataset or iterable, optional
        A file (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), a directory or glob of them, a
        Hugging Face dataset, streaming or not, or an iterable of str or of
        ``{"text": …, metadata}``.
    store : str or Path, optional
        Folder of the store; without one it is temporary and goes with the returned object.
    text : str or iterable of str, optional
        Documents themselves, instead of `corpus`.
    tokenizer : PreTrainedTokenizerFast, optional
        Needed where `model` is a module.
    sites : str, Site or iterable, optional
        Sites or patterns: ``"mlp_post"``, ``"resid_post.3-5"``; default all ``mlp_post``,
        ``resid_pre.0`` and all ``resid_post``.
    keep : str, float or mapping, optional
        Which rows are stored: ``"all"``, ``"none"``, or a fraction of the content rows that is a
        power of two, such as ``"1/256"``: one seeded sample for all sites.  By site:
        ``{"mlp_post": "1/64", "resid_post": "all"}``.  Default ``"all"``, or 1/256 where that
        would take more than 10 GB, with a warning.  Statistics and exemplars cover every row all
        the same, and `Store.replay` computes any row again.
    grams : str, Site or iterable, optional
        Sites whose Gram matrix is added up too: 8 bytes x width**2 each on disk, and a product of
        ``rows x width**2``.  Default none.
    dtype : {"auto", "float16", "float32", "bfloat16"}
        Stored dtype.  "auto": 16-bit models keep theirs; of float32 models ``mlp_post`` becomes
        float16, and residual sites too unless a probe exceeds 1,000 there.
    context : int, optional
        Tokens of a window, special ones counted; default 512, or the model's limit if less.
    overlap : int, optional
        Leading tokens of a later window that are context only and not stored; default 0.
    batch_tokens : int, optional
        Tokens of one forward pass, padding counted; default 4,096.
    max_tokens, max_document_tokens : int, optional
        Rows wanted in all, and of each document, special tokens counted.  Of a corpus that is
        added, they count for it alone.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ….
    budget : int or str, optional
        Peak memory beyond the model, such as ``"2GB"``; default the smaller of 4 GiB and half of
        what is free.
    encoding, errors : str
        How text files are decoded, as in `open`.
    on_nan, on_overflow : {"error", "count"}
        Whether NaN, and values outside the stored dtype, stop the capture, or are counted (and
        the latter saturated).
    order : {"corpus", "shuffled"}
        "shuffled": documents are taken in a random order, the same every time; while they are
        planned they take disk once more.  With `max_tokens` a random sample of them is captured.
    add : bool
        Add another corpus to a store that has all documents of its own; what is there does not
        change, and rows keep their ids.  A corpus that the store has is not added again.
    workers : int, optional
        Capture with so many processes of this machine, one a GPU, or the CPU's threads divided;
        they share the budget.  `model` must then be a name or directory.  The rows and the index
        are the same for any number.
    scheduler : str, optional
        Capture on the workers of a running Dask scheduler, ``"tcp://host:8786"``, which must see
        the store under its path; the budget is then that of each worker.
    segments : str or slice, optional
        ``"I::N"``: capture only the segments I, I + N, I + 2N, … of the plan, and leave the index
        to `Store.finish`.  For batch systems, which start N processes with one store.
    progress : callable, optional
        ``progress(stage, done, total)``; a total of 0 is not known yet.

    Returns
    -------
    Store

    Raises
    ------
    CorpusError, ModelError, SiteNotFound, StoreMismatch, NotEnoughDisk, ArgumentError
        Before the model runs, with the remedy in the message.
    NonFiniteActivation
        If the model yields NaN, and `on_nan` is "error".
    """
    from actstore.capturing import ORDERS, run_capture

    for name, value in (("on_nan", on_nan), ("on_overflow", on_overflow)):
        if value not in ("error", "count"):
            raise ArgumentError(f"{name} = {value!r} is not 'error' or 'count'.")
    if order not in ORDERS:
        raise ArgumentError(f"order = {order!r} is not one of {', '.join(ORDERS)}.")
    found, timing = run_capture(
        model,
        corpus,
        store,
        text=text,
        tokenizer=tokenizer,
        settings=_settings(
            *(sites, dtype, context, overlap, batch_tokens, max_tokens, max_document_tokens),
            keep,
            grams,
        ),
        device=device,
        budget=budget,
        encoding=encoding,
        errors=errors,
        on_nan=on_nan,  # type: ignore[arg-type]  # checked above
        on_overflow=on_overflow,  # type: ignore[arg-type]
        order=order,
        add=add,
        workers=workers,
        scheduler=scheduler,
        segments=segments,
        progress=progress,
    )
    opened = Store(found.path)
    opened.timing = timing
    # A temporary store lives as long as what made it.
    opened.__dict__["_made_by"] = found
    return opened


def estimate(
    model: Any,
    corpus: Any = None,
    store: str | Path | None = None,
    *,
    text: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    sites: Sites = None,
    keep: Keep = None,
    grams: Sites = None,
    dtype: str = "auto",
    context: int | None = None,
    overlap: int | None = None,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
    device: str = "auto",
    budget: int | str | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    progress: Progress | None = None,
) -> Estimate:
    """Return what `capture` with the same arguments would take: rows, bytes, time, memory.

    Tokenises the corpus once and captures a few batches into a temporary folder.
    """
    from actstore.capturing import run_estimate

    return run_estimate(
        model,
        corpus,
        store,
        text=text,
        tokenizer=tokenizer,
        settings=_settings(
            *(sites, dtype, context, overlap, batch_tokens, max_tokens, max_document_tokens),
            keep,
            grams,
        ),
        device=device,
        budget=budget,
        encoding=encoding,
        errors=errors,
        progress=progress,
    )


def _settings(
    sites: Sites,
    dtype: str,
    context: int | None,
    overlap: int | None,
    batch_tokens: int | None,
    max_tokens: int | None,
    max_document_tokens: int | None,
    keep: Keep,
    grams: Sites,
) -> Any:
    from actstore.capturing import Limits, Settings

    for name, value in (
        ("context", context),
        ("overlap", overlap),
        ("batch_tokens", batch_tokens),
        ("max_tokens", max_tokens),
        ("max_document_tokens", max_document_tokens),
    ):
        if value is not None:
            as_count(name, value, 0, 2**62)
    wanted = [sites] if isinstance(sites, (str, Site)) else sites
    folded = [grams] if isinstance(grams, (str, Site)) else grams or ()
    return Settings(
        None if wanted is None else tuple(wanted),
        dtype,
        context,
        overlap,
        batch_tokens,
        Limits(max_tokens, max_document_tokens),
        keep,
        tuple(map(str, folded)),
    )
