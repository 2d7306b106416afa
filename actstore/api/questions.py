"""Questions to a store: SQL, the strongest rows of a neuron, and rows computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.api.arguments import Sites
from actstore.errors import ArgumentError
from actstore.site import Site
from actstore.store import CoreStore, Rows
from actstore.store.budget import Progress, as_count, parse_budget

if TYPE_CHECKING:
    import duckdb

    from actstore.capturing import Replayed, Replayer, Verification
    from actstore.query import Activations, Answer, Top

_REPLAYED_ROWS = 4096  # at a time, where one neuron of them is wanted


class Questions(CoreStore):
    """A store that answers questions about its rows."""

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

    def _again(
        self, site: str | Site, model: Any, tokenizer: Any, device: str, budget: int | str | None
    ) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]:
        """Return what computes rows of a site again."""

        def computed(row_ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
            options = {"model": model, "tokenizer": tokenizer, "device": device}
            return self.replay(row_ids, site, budget=budget, **options)[self.site(site).site]

        return computed

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
