"""Non-negative codes are the least-squares optimum."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.optimize
import torch

from actstore.decompose.codes import descend, solve_codes, solve_sparse_codes


@pytest.mark.parametrize("k", [1, 7, 64])
def test_codes_equal_those_of_scipy(k):
    """Converged codes are what scipy's active-set solver finds for each row."""
    rng = np.random.default_rng(k)
    components = rng.random((k, 101)) ** 3
    rows = np.maximum(rng.normal(size=(53, 101)), 0)
    expected = np.stack([scipy.optimize.nnls(components.T, row)[0] for row in rows], axis=1)

    codes, n_moving = solve_codes(
        torch.tensor(components @ rows.T),
        torch.tensor(components @ components.T),
        n_sweeps=5000,
        tolerance=1e-8,
    )

    assert n_moving == 0
    np.testing.assert_allclose(codes, expected, atol=1e-5)


def test_a_component_of_length_zero_gets_no_code():
    """Nothing is divided by zero."""
    components = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    rows = torch.tensor([[2.0, 4.0, 9.0]])

    codes, _ = solve_codes(components @ rows.T, components @ components.T, n_sweeps=8)

    np.testing.assert_allclose(codes, [[2.0], [0.0]])


def test_rows_that_still_move_are_counted():
    """With too few sweeps the solver says how many rows have not converged."""
    rng = torch.Generator().manual_seed(0)
    components = torch.rand(16, 20, generator=rng)
    rows = torch.rand(40, 20, generator=rng)

    _, n_moving = solve_codes(
        components @ rows.T, components @ components.T, n_sweeps=2, tolerance=1e-6
    )

    assert n_moving > 0


@pytest.mark.parametrize("k", [1, 6, 33])
@pytest.mark.parametrize("n", [5, 128, 301])
def test_tiles_and_tensors_descend_alike(k, n):
    """The compiled descent gives what the same descent of tensors gives, from any beginning."""
    rng = torch.Generator().manual_seed(k * n)
    components = torch.rand(k, 40, generator=rng)
    components /= components.norm(dim=1, keepdim=True)
    targets = components @ torch.rand(n, 40, generator=rng).T
    begin = torch.rand(k, n, generator=rng)
    compiled, plain = begin.clone(), begin.double()

    n_moving = descend(targets, components @ components.T, compiled, n_sweeps=3, tolerance=1e-3)
    expected = descend(
        targets.double(),
        (components @ components.T).double(),
        plain,
        n_sweeps=3,
        tolerance=1e-3,
    )

    assert n_moving == expected
    np.testing.assert_allclose(compiled, plain, atol=1e-5)


def test_threads_descend_alike():
    """Columns shared out to threads come out as in one."""
    rng = torch.Generator().manual_seed(0)
    components = torch.rand(5, 40, generator=rng)
    targets = components @ torch.rand(5001, 40, generator=rng).T
    one, many = torch.zeros(5, 5001), torch.zeros(5, 5001)

    descend(targets, components @ components.T / 40, one, n_sweeps=3)
    with ThreadPoolExecutor(2) as threads:
        descend(targets, components @ components.T / 40, many, n_sweeps=3, threads=threads)

    assert torch.equal(one, many)


def test_sparse_codes_are_the_best_on_their_components():
    """No row uses more components than allowed, and none could use them better."""
    rng = np.random.default_rng(0)
    components = rng.normal(size=(7, 40)).astype(np.float32)
    rows = rng.normal(size=(60, 40)).astype(np.float32)
    products = torch.from_numpy(components @ rows.T)
    gram = torch.from_numpy(components @ components.T)

    codes, n_moving = solve_sparse_codes(products, gram, 3, n_sweeps=500, tolerance=1e-7)

    assert n_moving == 0
    assert ((codes > 0).sum(0) <= 3).all()
    whole, _ = solve_codes(products, gram, n_sweeps=500, tolerance=1e-7)
    lengths = np.linalg.norm(components, axis=1)
    for row, code, full in zip(rows, codes.T.numpy(), whole.T.numpy(), strict=True):
        chosen = np.argsort(-full * lengths)[:3]
        expected = np.zeros(7)
        expected[chosen] = scipy.optimize.nnls(components[chosen].T, row)[0]
        np.testing.assert_allclose(code, expected, atol=1e-4)
