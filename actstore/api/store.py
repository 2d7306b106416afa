"""The store as its users see it: everything it can be asked, on one object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.api.exports import Exports
from actstore.counted import counted
from actstore.site import Site
from actstore.store.budget import Progress
from actstore.store.info import Info, info

if TYPE_CHECKING:
    from actstore.capturing import Timing
    from actstore.view import Neuron, View


class Store(Exports):
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
            f"<Store {self.path}: {self.meta.model['name']}, {counted(self.n_rows(), 'row')} x "
            f"{counted(len(self.sites), 'site')}>"
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
        model : str, Path or torch.nn.Module, optional
            The model the store was captured from.  Of a causal one the view also shows the tokens
            that the neuron's output weights promote and suppress by the direct path.
        tokenizer, device, budget
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
        return Neuron(
            self,
            site,
            neuron,
            database=self._database,
            replay=again,
            by=by,
            model=None if model is None else lambda: self._replayer(model, tokenizer, device).model,
            named=model if isinstance(model, (str, Path)) else None,
        )
