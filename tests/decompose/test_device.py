"""Products made on another device, or with copies, are those of this process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actstore.decompose import bound, device, exact, moments, online
from actstore.decompose.engine import Engine
from actstore.decompose.matrix import Matrix
from actstore.decompose.scan import Form, Scan
from tests.synthetic import synthetic_store

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WORKS = ["online", "sixteen bits", "signed", "exact", "gram", "products"]


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """Two sites of a few blocks in three segments."""
    rng = np.random.default_rng(0)
    values = {f"mlp_post.{i}": rng.normal(size=(2500, width)) for i, width in enumerate((41, 29))}
    store = synthetic_store(tmp_path_factory.mktemp("device") / "store", values)
    return Scan(store, store.select(None), store.rows(), budget_bytes=2**27)


def work_of(name, scan, folder):
    """Return a work, and the form of the blocks that it takes."""
    torch.manual_seed(0)
    n_active = 2 if name == "signed" else None
    matrix = Matrix.scaled(scan, (0.5, 3.0), n_active is not None)
    found = [torch.rand(k, scan.width) for k in (3, 5)]
    form = Form("bfloat16" if name == "sixteen bits" else "float32", n_active is None)
    if name == "gram":
        return bound._Gram(matrix), Form()
    if name == "products":
        shift, scale = torch.rand(scan.width), torch.rand(scan.width)
        sites = tuple(scan.columns.values())
        frame = moments.Frame(shift, torch.ones(scan.width), scale)
        return moments.Products(((sites[0], sites[0]), (sites[0], sites[1])), sites, frame), Form()
    if name == "exact":
        unit = [x / x.norm(dim=1, keepdim=True) for x in found]
        mean = torch.rand(scan.width)
        rows = scan.store.meta.segment_rows
        return exact.ExactWork.of(matrix, unit, [None, None], mean, folder, rows), Form()
    dictionaries = [online.Dictionary(x, n_active) for x in found]
    return online.SurrogateWork.of(dictionaries, matrix, form, 6), form


def sums_of(name, scan, folder):
    """Return what all rows add, the scores that were written among it."""
    work, form = work_of(name, scan, folder)
    sums = Engine.local().total(scan, work, list(scan.ordered_ranges()), form=form)
    scores = {path.name: torch.from_numpy(np.load(path)) for path in folder.glob("scores-*")}
    return {**sums, **scores}


class Elsewhere(torch.Tensor):
    """A tensor of another device, but in name: nothing takes it together with one of this process.

    NumPy does not see it, and what is made of it is there too.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Do what is asked, unless it needs what is here."""
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:
            return True
        given = [*args, *kwargs.values()]
        given = [y for x in given for y in (x if isinstance(x, (list, tuple)) else [x])]
        mixed = {type(x) for x in given if isinstance(x, torch.Tensor)} - {cls}
        if mixed or func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise RuntimeError(f"{func} of tensors here and elsewhere")
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("name", WORKS)
def test_products_made_elsewhere_are_the_same(scan, tmp_path, monkeypatch, name):
    """A work multiplies only what was put elsewhere, and its sums come back, with the same bits."""
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    wanted = sums_of(name, scan, tmp_path)
    for module in (bound, exact, moments, online):
        monkeypatch.setattr(module, "there", lambda x: x.clone().as_subclass(Elsewhere))
        monkeypatch.setattr(module, "here", lambda x: x.as_subclass(torch.Tensor).clone())
    found = sums_of(name, scan, tmp_path)

    with pytest.raises(RuntimeError, match="here and elsewhere"):
        _ = torch.ones(2).as_subclass(Elsewhere) + torch.ones(2)
    for key, value in wanted.items():
        assert type(found[key]) is torch.Tensor, key
        # Here NumPy makes Grams, with half the work.
        torch.testing.assert_close(found[key], value, rtol=1e-6 if name == "gram" else 0, atol=0)


@pytest.mark.cuda
@no_gpu
@pytest.mark.parametrize("name", WORKS)
def test_cuda_gives_the_same_to_rounding(scan, tmp_path, monkeypatch, name):
    """Sums come back to this process in their dtypes, as near as the products' rounding."""
    monkeypatch.setattr(device, "device", lambda: torch.device("cuda"))
    found = sums_of(name, scan, tmp_path)
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    wanted = sums_of(name, scan, tmp_path)

    for key, value in wanted.items():
        assert (found[key].device, found[key].dtype) == (value.device, value.dtype), key
        error = (found[key] - value).abs().max()
        assert error <= (2e-2 if name == "sixteen bits" else 1e-4) * value.abs().max(), key
