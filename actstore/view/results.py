"""Results that can be looked at: the decompositions and similarities below, with their views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from actstore import decompose
from actstore.decompose import Projection, Stability
from actstore.errors import ArgumentError
from actstore.query import Answer, Condition, Database
from actstore.store import Rows
from actstore.store.budget import Progress, as_count
from actstore.view.factor_table import factor_table, headline
from actstore.view.factors import factor_view
from actstore.view.notebook import factors_notebook, similarity_notebook
from actstore.view.page import View, file_to_be
from actstore.view.promoted import factor_weights, promoted_table
from actstore.view.similarity import similarity_view

if TYPE_CHECKING:
    from actstore.models import LanguageModel


class Factors(decompose.Factors):
    """Factors of some sites of a store, and their views; opening them computes nothing.

    See Also
    --------
    actstore.decompose.Factors : loadings, scores, tables and summary.
    """

    def view(
        self,
        document: int | Sequence[int] | None = None,
        *,
        max_documents: int = 50,
        compare: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
    ) -> View:
        """Return the factor view: all factors, and texts shaded by their scores.

        Parameters
        ----------
        document : int or sequence of int, optional
            The documents to show; by default up to `max_documents`, spread evenly over the store.
        max_documents : int, default 50
            How many documents at most, where `document` does not name them.
        compare : str, optional
            Name of another decomposition of the same sites: each factor then shows its nearest
            there.
        model : str, Path or torch.nn.Module, optional
            The causal model the store was captured from: each factor then shows the tokens that its
            output weights promote and suppress, as `promoted` has them.
        tokenizer : optional
            Needed where `model` is a module.
        device : str, default "auto"
            Where `model` is loaded to.

        Raises
        ------
        ArgumentError, RowNotFound, ResultNotFound
            If no document is asked for, the store has none of that number, or no such result.
        ModelError, StoreMismatch
            If the model cannot be loaded, is another, or has no direct path to its logits.
        """
        other = None
        if compare is not None:
            other = decompose.Factors(self.store, self.store.result(self.result.kind, compare))
        loaded = None if model is None else self._model(model, tokenizer, device)
        return factor_view(self.store, self, document, max_documents, other=other, model=loaded)

    def promoted(
        self, k: int = 10, *, model: Any = None, tokenizer: Any = None, device: str = "auto"
    ) -> Answer:
        """Return the tokens whose logits each factor raises and lowers most by the direct path.

        The direct path: a score of 1 stands for activations of the factor's FFNN neurons; what
        their output weights write into the residual stream goes straight through the final norm's
        linear part and the unembedding.  What later layers make of it is not in it.

        Parameters
        ----------
        k : int, default 10
            How many tokens on either side.
        model : str, Path or torch.nn.Module, optional
            The causal model the store was captured from; default where its name in the store leads.
        tokenizer : optional
            Needed where `model` is a module.
        device : str, default "auto"
            Where the model is loaded to.

        Returns
        -------
        Answer
            factor, site (null for all together), side ("promoted", "suppressed"), rank, token_id,
            token, effect (from the mean over all tokens, without the norm's division), deviations
            (the same in standard deviations of all tokens').

        Raises
        ------
        ArgumentError
            If no site is one of ``mlp_post``.
        ModelError, StoreMismatch
            If the model cannot be loaded, is another, is not causal, or has no direct path.

        See Also
        --------
        actstore.query.promoted : cost.
        actstore.models.direct_path : references, what is proved of the model.
        """
        weights = factor_weights(self)
        loaded = self._model(model, tokenizer, device)
        k = as_count("k", k, 1)
        return Answer(promoted_table(self.store, loaded, weights, k, "factor"))

    def _model(self, model: Any, tokenizer: Any, device: str) -> LanguageModel:
        # Here: it loads transformers, which a look at factors does not need.
        from actstore.capturing import model_of

        return model_of(self.store, model, tokenizer, device)

    def __repr__(self) -> str:
        return f"{headline(self)}\n{factor_table(self)!r}"

    def project(
        self,
        rows: Rows | str | npt.ArrayLike = "content",
        *,
        budget: int | str | None = None,
    ) -> Projection:
        """Return the scores of rows of the store, whether the factors were made from them or not.

        Parameters
        ----------
        rows : str, Rows or sequence of int, default "content"
            Row ids, in any order; ``"content"``, ``"all"``, or an SQL condition on tokens and
            documents: as far as they are stored, in row order.
        budget : int or str, optional
            Memory it may take.

        See Also
        --------
        actstore.decompose.project : cost, errors.
        """
        if isinstance(rows, str) and rows not in ("content", "all"):
            space = self.sites[0].site.space
            rows = Condition(Database(self.store), self.store, rows, space, "rows").rows()
        return decompose.project(self, rows, budget=budget)

    def transform(
        self,
        text: str | Iterable[str],
        *,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
        budget: int | str | None = None,
    ) -> Projection:
        """Return the scores of new text: captured as the store was, into a temporary store.

        One forward pass of the text, and one read of what it gives.

        Parameters
        ----------
        text : str or iterable of str
            Documents.
        model, tokenizer, device
            The model the store was captured from; default where its name in the store leads.
        budget : int or str, optional
            Peak memory beyond the model.

        Returns
        -------
        Projection
            Content rows of the documents, which are numbered from 0 in the order given: ``.df()``
            has token, document and position beside the scores.

        Raises
        ------
        ModelError, StoreMismatch
            If the model cannot be loaded, or is another.
        ArgumentError
            If the text has no content row.
        """
        # Here: it loads transformers, which a look at factors does not need.
        from actstore.capturing import capture_alike

        sites = [info.site for info in self.sites]
        options = {"model": model, "tokenizer": tokenizer, "device": device, "budget": budget}
        store = capture_alike(self.store, text, sites, **options)
        rule = "all" if self.summary["rows"] == "all" else "content"
        if not store.rows(rule, sites[0].space).n_rows:
            raise ArgumentError(
                f"text = {str(text)[:40]!r} has {store.n_rows(sites[0].space)} tokens, and none of "
                "content; expected one that is neither special nor the first of its document. "
                "Give a longer text."
            )
        return decompose.project(self, rule, store=store, budget=budget)

    def clusters(self, n_clusters: int, *, seed: int = 0) -> Answer:
        """Cluster neurons that take part in the same factors: site, neuron, cluster, cosine.

        See Also
        --------
        actstore.decompose.cluster_neurons : how.
        """
        return Answer(decompose.cluster_neurons(self, n_clusters, seed=seed))

    # What the base class gives as Arrow is printed, and looked at in a notebook, as answers are.

    def top_neurons(self, factor: int, k: int = 20) -> Answer:
        """Return the neurons with a factor's largest loadings."""
        return Answer(super().top_neurons(factor, k))

    def top_tokens(self, factor: int, k: int = 20, side: str = "top") -> Answer:
        """Return the rows with a factor's highest scores, with the text of their tokens.

        See Also
        --------
        actstore.decompose.Factors.top_tokens : parameters, cost, columns.
        """
        return Answer(super().top_tokens(factor, k, side))

    def token_types(self, factor: int, k: int = 20, by: str = "mean") -> Answer:
        """Return the token types on which a factor is highest, with their text.

        See Also
        --------
        actstore.decompose.Factors.token_types : parameters, columns.
        """
        return Answer(super().token_types(factor, k, by))

    def top_documents(self, factor: int, k: int = 20, by: str = "mean") -> Answer:
        """Return the documents in which a factor is highest, with their source.

        See Also
        --------
        actstore.decompose.Factors.top_documents : parameters, columns.
        """
        return Answer(super().top_documents(factor, k, by))

    def top_positions(self, factor: int, k: int = 20, by: str = "share") -> Answer:
        """Return the positions at which a factor is highest: position, n, mean, share.

        See Also
        --------
        actstore.decompose.Factors.top_positions : parameters.
        """
        return Answer(super().top_positions(factor, k, by))

    def stability(
        self,
        *,
        seeds: int = 5,
        splits: int = 2,
        nulls: int = 2,
        seed: int = 0,
        name: str | None = None,
        budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> Stability:
        """Fit again from other seeds and on other documents; say which factors come back.

        See Also
        --------
        actstore.decompose.stability : what is compared, parameters, cost.
        """
        options = {"seeds": seeds, "splits": splits, "nulls": nulls, "seed": seed}
        return decompose.stability(self, **options, name=name, budget=budget, progress=progress)

    def to_html(
        self,
        path: str | Path,
        document: int | Sequence[int] | None = None,
        *,
        max_documents: int = 50,
        compare: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
    ) -> Path:
        """Write the factor view as one HTML file that makes no request; parameters as `view`."""
        file_to_be(path)  # refused before the work
        view = self.view(
            document,
            max_documents=max_documents,
            compare=compare,
            model=model,
            tokenizer=tokenizer,
            device=device,
        )
        return view.to_html(path)

    def _repr_html_(self) -> str:
        return self.view().html

    def to_notebook(
        self,
        path: str | Path,
        *,
        compare: str | None = None,
        model: str | Path | None = None,
    ) -> Path:
        """Write an executed notebook that opens the store again and shows these factors.

        `model` is the name or the path of the store's model, which the notebook loads.
        """
        kind = self.result.kind
        return factors_notebook(
            self.store.path, self.name, path, kind=kind, compare=compare, model=model
        )


class Similarity(decompose.Similarity):
    """The similarity of all pairs of sites of a store, and its views.

    See Also
    --------
    actstore.decompose.Similarity : matrix, intervals, table and summary.
    """

    def view(self) -> View:
        """Return the similarity view: a heat map of all pairs of sites."""
        return similarity_view(self.store, self)

    def to_html(self, path: str | Path) -> Path:
        """Write the similarity view as one HTML file that makes no request."""
        return self.view().to_html(path)

    def _repr_html_(self) -> str:
        return self.view().html

    def to_notebook(self, path: str | Path) -> Path:
        """Write an executed notebook that opens the store again and shows this similarity."""
        return similarity_notebook(self.store.path, self.name, path)
