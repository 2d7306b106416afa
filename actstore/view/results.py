"""Results that can be looked at: the decompositions and similarities below, with their views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actstore import decompose
from actstore.view.factors import factor_view
from actstore.view.notebook import factors_notebook, similarity_notebook
from actstore.view.page import View
from actstore.view.similarity import similarity_view


class Factors(decompose.Factors):
    """Factors of some sites of a store, and their views; opening them computes nothing.

    See Also
    --------
    actstore.decompose.Factors : loadings, scores, tables and summary.
    """

    def view(self, document: int | Sequence[int] | None = None, *, max_documents: int = 50) -> View:
        """Return the factor view: all factors, and texts shaded by their scores.

        Parameters
        ----------
        document : int or sequence of int, optional
            The documents to show; by default up to `max_documents`, spread evenly over the store.
        max_documents : int, default 50
            How many documents at most, where `document` does not name them.

        Raises
        ------
        ArgumentError, RowNotFound
            If no document is asked for, or the store has none of that number.
        """
        return factor_view(self.store, self, document, max_documents)

    def to_html(
        self,
        path: str | Path,
        document: int | Sequence[int] | None = None,
        *,
        max_documents: int = 50,
    ) -> Path:
        """Write the factor view as one HTML file that makes no request; parameters as `view`."""
        return self.view(document, max_documents=max_documents).to_html(path)

    def to_notebook(self, path: str | Path) -> Path:
        """Write an executed notebook that opens the store again and shows these factors."""
        return factors_notebook(self.store.path, self.name, path)


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

    def to_notebook(self, path: str | Path) -> Path:
        """Write an executed notebook that opens the store again and shows this similarity."""
        return similarity_notebook(self.store.path, self.name, path)
