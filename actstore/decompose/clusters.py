"""Clusters of neurons that take part in the same factors."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from actstore.decompose.factors import Factors
from actstore.decompose.write_factors import site_columns
from actstore.errors import ArgumentError


def cluster_neurons(factors: Factors, n_clusters: int, *, seed: int = 0) -> pa.Table:
    """Cluster neurons by their loadings, whatever their size: k-means on unit vectors.

    Cost: ``n_neurons x n_components x n_clusters`` operations an iteration; the loadings in memory
    twice.

    Parameters
    ----------
    factors : Factors
        The factors.
    n_clusters : int
        How many clusters, at most the neurons that have a loading.
    seed : int, default 0
        Where k-means starts.

    Returns
    -------
    Table
        One row a neuron: site, space, hook, layer, neuron, cluster, and cosine, that of its
        loadings with the centre of its cluster.  Clusters are numbered by size, the largest 0; a
        neuron without a loading is in none (NULL).

    Raises
    ------
    ArgumentError
        If `n_clusters` is less than 1 or more than there are neurons with a loading.

    See Also
    --------
    sklearn.cluster.KMeans : the algorithm.
    """
    from sklearn.cluster import KMeans  # a second, which others need not wait

    vectors = factors.loadings.T.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1)
    (loaded,) = np.nonzero(lengths > 0)
    if not 1 <= n_clusters <= len(loaded):
        raise ArgumentError(
            f"n_clusters = {n_clusters} cannot be used; expected 1 … {len(loaded):,}, the neurons "
            f"with a loading in factors {factors.name!r}."
        )
    units = vectors[loaded] / lengths[loaded, None]
    model = KMeans(n_clusters, n_init=4, random_state=seed).fit(units)
    sizes = np.bincount(model.labels_, minlength=n_clusters)
    order = np.argsort(-sizes, kind="stable")
    place = np.empty(n_clusters, np.int32)
    place[order] = np.arange(n_clusters, dtype=np.int32)
    centres = model.cluster_centers_ / np.maximum(
        np.linalg.norm(model.cluster_centers_, axis=1, keepdims=True), 1e-300
    )
    cluster = np.zeros(len(vectors), np.int32)
    cosine = np.zeros(len(vectors))
    cluster[loaded] = place[model.labels_]
    cosine[loaded] = (units * centres[model.labels_]).sum(1)
    widths = [info.width for info in factors.sites]
    missing = lengths == 0
    return pa.table(
        {
            **site_columns(factors.sites, np.repeat(np.arange(len(widths)), widths)),
            "neuron": np.concatenate([np.arange(width, dtype=np.int32) for width in widths]),
            "cluster": pa.array(cluster, mask=missing),
            "cosine": pa.array(cosine, mask=missing),
        }
    )
