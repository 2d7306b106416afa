"""What similarity is left when nothing is shared: one side shifted by whole documents.

Rows of one document are alike at every layer, so two sites that share nothing but documents are not
at zero, and shuffled rows would hide it.  Rows are put in the order of their documents, and one
side is moved on by some documents, around the end: both sides keep what their documents do to them,
and no row meets its own.

The shift is made in kernels: of a sample of rows the kernel of each site is computed once, and a
shift permutes it.  The sample takes every so-manieth row in the order of documents, so that a shift
of it is the shift of all rows; and a debiased product of kernels is right for any number of rows,
so its answer is that of the store, with some noise.

References
----------
Song et al., JMLR 13 (2012), equation 5.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.engine import Engine, Sums
from actstore.decompose.scan import Block, Scan

Ids = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

N_SHIFTS = 20
"""Shifts, or fewer where there are fewer documents."""

_BLOCK_ROWS = 512
_N_BLOCKS = 4
_MOST_ALIKE = 0.25


def centred_kernels(sites: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the kernel of each site without its diagonal, centred without bias.

    Parameters
    ----------
    sites : sequence of Tensor (n, width of the site)
        Rows, at least 4, with their mean taken off.

    Returns
    -------
    Tensor (sites, n, n), float32
        Rows and columns sum to zero; the inner product of two is ``n (n - 3)`` times Song's
        unbiased HSIC.
    """
    n = len(sites[0])
    kernels = torch.empty(len(sites), n, n)
    for kernel, site in zip(kernels, sites, strict=True):
        torch.mm(site, site.T, out=kernel)
        # Of centred rows the kernel sums to zero with its diagonal, so without it to minus that.
        own = kernel.diagonal().double()
        means = own / (n - 2)
        kernel += (means - own.sum() / ((n - 1) * (n - 2))).float()[:, None]
        kernel += means.float()
        kernel.fill_diagonal_(0)
    return kernels


def shifted_products(
    scan: Scan,
    prepare: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    documents_of: Callable[[Ids], Ids],
) -> Float64:
    """Return the debiased HSIC of all pairs of sites, one side shifted.

    Cost: kernels of 2,048 rows in blocks of 512, and of each a permutation for every shift; two
    passes over the documents of all rows.

    Parameters
    ----------
    scan : Scan
        What reads the rows.
    prepare : callable
        Returns of a block's values the centred columns of each site, ``(n, its width)``.
    documents_of : callable
        Returns the document of each row_id.

    Returns
    -------
    ndarray (shifts, sites, sites)
        The second site is the shifted one.  No shifts if there are too few documents, or one is
        most of the rows.
    """
    ranks, documents = _in_order_of_documents(scan, documents_of, _N_BLOCKS * _BLOCK_ROWS)
    n_blocks = -(-len(ranks) // _BLOCK_ROWS)
    # Each block goes through all documents in steps, so that places agree with those of all rows.
    dealt = [ranks[first::n_blocks] for first in range(n_blocks)]
    firsts = _shifts(documents)
    if not len(firsts):
        return np.empty((0, 0, 0))

    def shifted(blocks: Iterable[Block]) -> Sums:
        total: torch.Tensor | None = None
        for block in blocks:
            kernels = centred_kernels(prepare(block.values))
            n_sites, n = kernels.shape[:2]
            flat = kernels.reshape(n_sites, -1)
            products = []
            for first in np.round(firsts * n).astype(np.int64).tolist():
                moved = torch.cat([kernels[:, first:], kernels[:, :first]], 1)
                moved = torch.cat([moved[:, :, first:], moved[:, :, :first]], 2)
                products.append(flat @ moved.reshape(n_sites, -1).T)
            found = torch.stack(products).double() / (n * (n - 3))
            total = found if total is None else total + found
        assert total is not None
        return {"shifted": total}

    # Here, since it is little, and the documents need not travel.
    sums = Engine.local().total(scan, shifted, [dealt])
    found: Float64 = (sums["shifted"] / len(dealt)).numpy()
    return found


def _in_order_of_documents(
    scan: Scan, documents_of: Callable[[Ids], Ids], n_wanted: int
) -> tuple[Ids, Ids]:
    """Return ranks and documents of every so-manieth row, all rows in the order of documents.

    Cost: two passes over the documents of all rows, a segment at a time.
    """
    n_rows = scan.n_rows
    n_chosen = min(n_wanted, n_rows)
    ranks, documents = np.empty((2, n_chosen), np.int64)
    segments = list(itertools.pairwise(scan.ranked.edges.tolist()))
    counts = np.zeros(scan.store.n_documents, np.int64)
    for first, stop in segments:
        own = documents_of(scan.ranked.row_ids(np.arange(first, stop)))
        counts += np.bincount(own, minlength=len(counts))
    place = np.cumsum(counts) - counts  # of the next row of each document
    for first, stop in segments:
        own = documents_of(scan.ranked.row_ids(np.arange(first, stop)))
        order = np.argsort(own, kind="stable")
        numbers, starts, here = np.unique(own[order], return_index=True, return_counts=True)
        places = np.arange(len(own)) + np.repeat(place[numbers] - starts, here)
        place[numbers] += here
        slots = places * n_chosen // n_rows
        chosen = slots != (places - 1) * n_chosen // n_rows
        ranks[slots[chosen]] = first + order[chosen]
        documents[slots[chosen]] = own[order][chosen]
    return ranks, documents


def _shifts(documents: Ids) -> Float64:
    """Return by which part of the rows to shift, given their documents in order.

    Every shift is by whole documents.  A document longer than the shift meets itself; of all shifts
    those are taken that let the fewest rows do so, as far apart as there are any.
    """
    firsts = np.flatnonzero(np.diff(documents)) + 1
    alike = np.array([np.mean(documents == np.roll(documents, -first)) for first in firsts])
    firsts = firsts[alike <= min(_MOST_ALIKE, alike.min(initial=1.0) + 0.02)]
    places = np.linspace(0, len(firsts) - 1, min(N_SHIFTS, len(firsts))).round()
    chosen: Float64 = firsts[places.astype(np.int64)] / len(documents)
    return chosen
