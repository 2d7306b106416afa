"""Exports of a store for the tools that people already use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from actstore.api.arguments import Sites, shown
from actstore.api.decompositions import Decompositions
from actstore.site import Site
from actstore.store import Rows
from actstore.store.budget import Progress


class Exports(Decompositions):
    """A store that writes features and slices of itself as files."""

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
            If the store has no index, `form` needs values that are not known, or the folder of `to`
            does not exist.

        See Also
        --------
        actstore.exporting.feature : the fields, and where they are from.
        """
        from actstore.exporting import check_form, neuron_feature, new_json

        check_form(form)
        path = new_json(to)
        computed = self._again(site, model, tokenizer, device, budget) if replay else None
        how = shown(k, n_bins, n_each, n_random, before, after)
        return neuron_feature(self, site, neuron, how, replay=computed).write(path, form)

    def export_factor(
        self,
        factor: int,
        to: str | Path,
        *,
        name: str | None = None,
        kind: str = "nmf",
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
        kind : {"nmf", "pca", "ica"}
            What computed it.
        form, k, n_bins, n_each, n_random, before, after
            As for `export_neuron`.

        Raises
        ------
        ResultNotFound
            If there are no factors.
        ResultExists
            If there is something at `to`.
        ArgumentError
            If there is no such factor, or the folder of `to` does not exist.
        """
        from actstore.exporting import check_form, factor_feature, new_json

        check_form(form)
        path = new_json(to)
        how = shown(k, n_bins, n_each, n_random, before, after)
        return factor_feature(self.factors(name, kind), factor, how).write(path, form)

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
            chosen = self.rows_stored(self._rows(rows, infos[0].site.space), infos)
        else:
            ids = as_row_ids(rows)
            chosen = Rows.from_row_ids(f"{len(ids)} row ids", self.meta.segment_rows, ids)
        names = [info.site for info in infos]
        return export_slice(self, names, chosen, to, budget=budget, progress=progress)
