"""Non-negative codes are the least-squares optimum."""

import numpy as np
import pytest
import scipy.optimize
import torch
from actstore.decompose.exemplars import Exemplars

from actstore.decompose.codes import descend, solve_codes


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


def test_exemplars_equal_a_full_sort():
    """The highest positive values of a column, ties by row, however the rows are split."""
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=(997, 3)), 1).astype(np.float32)
    values[:, 2] = np.where(np.arange(997) == 13, 0.5, -1)
    row_ids = np.cumsum(rng.integers(1, 5, 997))
    found = Exemplars(3, k=29)
    for part in np.array_split(np.arange(997), 11):
        found.update(values[part], row_ids[part])

    for j, column in enumerate(values.T):
        order = [i for i in np.lexsort((row_ids, -column)) if column[i] > 0][:29]
        np.testing.assert_array_equal(found.row_ids[j], row_ids[order])
        np.testing.assert_array_equal(found.values[j], column[order])


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
