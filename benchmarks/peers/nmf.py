"""Peers of NMF: HALS of nmf-torch and of overcomplete, of a matrix in memory, from their own start.

``python -m benchmarks.peers.nmf PEER MATRIX LOADINGS K ITERATIONS THREADS`` in the peer's
interpreter: writes the loadings, prints the seconds of the fit.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import types

import numpy as np
import torch


def _nmf_torch(matrix: torch.Tensor, k: int, iterations: int) -> np.ndarray:
    from nmf import run_nmf

    # It stops by `tol` only where it looks at the error, every ten iterations.
    return run_nmf(matrix, k, algo="hals", init="nndsvda", tol=0, batch_max_iter=iterations)[1]


def _overcomplete(matrix: torch.Tensor, k: int, iterations: int) -> np.ndarray:
    # Its NMF alone: the rest of the package needs torchvision, timm and OpenCV.
    package = types.ModuleType("overcomplete")
    package.__path__ = list(importlib.util.find_spec("overcomplete").submodule_search_locations)
    sys.modules["overcomplete"] = package
    from overcomplete.optimization import NMF

    return NMF(k, solver="hals", tol=0).fit(matrix, max_iter=iterations)[1].numpy()


def main() -> None:
    """Run the job."""
    peer, source, target, k, iterations, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    matrix = torch.from_numpy(np.load(source))
    began = time.perf_counter()
    fit = {"nmf-torch": _nmf_torch, "overcomplete": _overcomplete}[peer]
    with torch.no_grad():
        loadings = fit(matrix, int(k), int(iterations))
    seconds = time.perf_counter() - began
    np.save(target, np.asarray(loadings, np.float32))
    print(seconds)


if __name__ == "__main__":
    main()
