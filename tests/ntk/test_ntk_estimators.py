"""Estimates from random vectors: exact where they must be, within four standard errors elsewhere."""

import re

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

import ntk
from ntk import errors
from tests.ntk.oracle import build
from tests.ntk.test_ntk_lanczos import last_batch_norm
from tests.ntk.test_ntk_spectrum import rotated

DECAY = [1 / (1 + i) for i in range(150)]
"""Eigenvalues whose tail carries a good part of the trace."""

SPECTRA = {
    "harmonic": DECAY,
    "geometric": list(0.9 ** np.arange(150)),
    "step at the number of vectors": [1.0] * 30 + [0.01] * 120,
    "flat": list(np.linspace(1, 0.5, 150)),
}
"""For XTrace, fixed with 100 seeds and 60 products before any figure was seen; at the step its estimates share most."""


def signs(seed: int, *shapes: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.choice([-1.0, 1.0], size=shape) for shape in shapes]


def test_trace_is_the_algorithm_of_its_source() -> None:
    matrix = rotated(DECAY)
    sketch, rest = signs(3, (150, 10), (150, 11))
    basis = np.linalg.qr(matrix @ sketch)[0]
    away = np.eye(150) - basis @ basis.T
    samples = [g @ away @ matrix @ away @ g for g in rest.T]
    found = ntk.estimate_trace(aslinearoperator(matrix), products=31, seed=3)
    assert found.value == pytest.approx(np.trace(basis.T @ matrix @ basis) + np.mean(samples), rel=1e-10)
    assert found.standard_error == pytest.approx(np.std(samples, ddof=1) / np.sqrt(11), rel=1e-10)


def test_xtrace_is_the_algorithm_of_its_source() -> None:
    """Each vector with a basis made anew without it, and without the algebra that saves products."""
    matrix = rotated(DECAY)
    (vectors,) = signs(3, (150, 15))

    def estimate(columns: np.ndarray) -> float:
        samples = []
        for i, vector in enumerate(columns.T):
            basis = np.linalg.qr(matrix @ np.delete(columns, i, axis=1))[0]
            away = np.eye(150) - basis @ basis.T
            samples.append(np.trace(basis.T @ matrix @ basis) + vector @ away @ matrix @ away @ vector)
        return float(np.mean(samples))

    found = ntk.estimate_trace(aslinearoperator(matrix), products=31, method="xtrace", seed=3)
    without = [estimate(np.delete(vectors, j, axis=1)) for j in range(15)]
    assert found.value == pytest.approx(estimate(vectors), rel=1e-10)
    assert found.standard_error == pytest.approx(np.sqrt(14 * np.var(without)), rel=1e-8)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_trace_within_four_standard_errors(method: str) -> None:
    """Of an error below that of 60 plain samples z·Θz, whose variance is 2 (‖Θ‖² − Σ Θ_ii²) for signs."""
    matrix = rotated(DECAY)
    found = ntk.estimate_trace(matrix, products=60, method=method)
    assert abs(found.value - sum(DECAY)) <= 4 * found.standard_error
    assert abs(found.value - 1.1 * sum(DECAY)) > 4 * found.standard_error  # control
    plain = 2 * ((matrix**2).sum() - (np.diag(matrix) ** 2).sum())
    assert 0 < found.standard_error < np.sqrt(plain / 60)


def many(matrix: np.ndarray, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Traces and standard errors of 60 products, for 100 seeds."""
    found = [ntk.estimate_trace(matrix, products=60, method=method, seed=seed) for seed in range(100)]
    values, reported = np.array(found).T
    return values, reported


def scatter_over(reported: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Scatter of 100 values over the root mean square of their standard errors, and the standard error of that.

    The logarithm of the scatter is known to 1/sqrt(2 * 99), and that of the root mean square from the scatter of the
    squares.
    """
    squares = reported**2
    ratio = values.std(ddof=1) / np.sqrt(squares.mean())
    return ratio, ratio * np.sqrt(1 / 198 + (squares.std(ddof=1) / squares.mean() / 2) ** 2 / 100)


def test_standard_error_of_hutch_is_the_scatter_between_seeds() -> None:
    values, reported = many(rotated(DECAY), "hutch++")
    assert abs(values.mean() - sum(DECAY)) <= 4 * values.std(ddof=1) / 10
    for factor, right in ((1, True), (2, False), (0.5, False)):  # the latter two are controls
        ratio, error = scatter_over(factor * reported, values)
        assert (abs(ratio - 1) <= 4 * error) == right


NOT_TOO_SMALL = np.sqrt(30 / 29)
"""Largest ratio of the scatter of XTrace, from 30 vectors, to the root mean square of its standard error.

By Efron and Stein (1981) the square of the jackknife is, on average, at least 29/30 of the variance from 29 vectors,
which is no less than that from 30. They give no limit on the other side.
"""


@pytest.mark.parametrize("name", SPECTRA)
def test_standard_error_of_xtrace_is_not_too_small(name: str) -> None:
    truth = sum(SPECTRA[name])
    values, reported = many(rotated(SPECTRA[name]), "xtrace")
    assert abs(values.mean() - truth) <= 4 * values.std(ddof=1) / 10
    # Of 100 values with an error from 30 samples, two or more lie beyond four standard errors with odds below 0.001.
    assert (abs(values - truth) > 4 * reported).sum() <= 1
    ratio, error = scatter_over(reported, values)
    assert ratio - 4 * error <= NOT_TOO_SMALL


def test_the_scatter_of_the_correlated_estimates_is_too_small() -> None:
    """Control of the test above: the error that the source of XTrace reports."""
    matrix = rotated(DECAY)
    values, _ = many(matrix, "xtrace")
    ratio, error = scatter_over(np.array([naive(matrix, seed) for seed in range(100)]), values)
    assert ratio - 4 * error > NOT_TOO_SMALL


def naive(matrix: np.ndarray, seed: int) -> float:
    """Standard error of XTrace from 30 vectors, as if its estimates were independent."""
    (vectors,) = signs(seed, (len(matrix), 30))
    q, r = np.linalg.qr(matrix @ vectors)
    s = np.linalg.inv(r).T
    s /= np.linalg.norm(s, axis=0)
    samples = []
    for i in range(30):
        basis = q @ (np.eye(30) - np.outer(s[:, i], s[:, i])) @ q.T
        rest = vectors[:, i] - basis @ vectors[:, i]
        samples.append(np.sum(basis * matrix) + rest @ matrix @ rest)
    return float(np.std(samples, ddof=1) / np.sqrt(30))


def test_xtrace_is_the_sharper_one_where_eigenvalues_decay() -> None:
    matrix = rotated(list(0.8 ** np.arange(100)))
    scatter = {
        method: np.std([ntk.estimate_trace(matrix, products=36, method=method, seed=s).value for s in range(20)])
        for method in ("hutch++", "xtrace")
    }
    assert scatter["xtrace"] < scatter["hutch++"] / 2


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_trace_of_a_kernel_of_low_rank_is_exact(method: str) -> None:
    for count in (12, 40):
        found = ntk.estimate_trace(rotated([3.0, 2.0, 1.0, *[0.0] * 50]), products=count, method=method)
        assert found.value == pytest.approx(6, rel=1e-12)
        assert found.standard_error < 1e-12
    assert ntk.estimate_trace(np.diag([1.0, 2.0]), method=method) == pytest.approx((3, 0))
    assert ntk.estimate_trace(np.zeros((60, 60)), method=method) == pytest.approx((0, 0))


def test_density_is_the_quadratic_form_of_its_vectors() -> None:
    """With as many steps as rows there is no quadrature error: each vector gives z·f(A)z / n."""
    eigenvalues = np.geomspace(2, 1e-3, 40)
    matrix = rotated(list(eigenvalues))
    (vectors,) = signs(5, (40, 6))
    found = ntk.spectral_density(aslinearoperator(matrix), probes=6, steps=99, seed=5)
    values, basis = np.linalg.eigh(matrix)
    for function in (np.sqrt, np.square, lambda t: 1 / (1 + t), lambda t: t * np.log(np.maximum(t, 1e-300))):
        form = basis @ (function(values)[:, None] * (basis.T @ vectors))
        samples = (vectors * form).sum(0) / 40
        result = found.mean(function)
        assert result.value == pytest.approx(samples.mean(), rel=1e-10)
        assert result.standard_error == pytest.approx(samples.std(ddof=1) / np.sqrt(6), rel=1e-8)
    assert found.weights.sum(1) == pytest.approx(np.ones(6), rel=1e-12)
    assert not found.nodes.flags.writeable


def test_few_steps_are_exact_for_polynomials() -> None:
    matrix = rotated(DECAY)
    few, many = (ntk.spectral_density(matrix, probes=4, steps=steps) for steps in (5, 150))
    for power, exact in ((9, True), (40, False)):
        f = lambda t, power=power: (1.5 * t) ** power
        assert (abs(few.mean(f).value / many.mean(f).value - 1) < 1e-10) is exact


def test_figures_within_four_standard_errors() -> None:
    matrix = rotated(DECAY)
    found = ntk.spectral_density(matrix, probes=32)
    assert found.nodes.shape == (32, 64)
    every = ntk.spectrum(matrix)
    for estimate, truth, wrong in (
        (found.mean(np.sqrt), np.mean(np.sqrt(DECAY)), np.mean(np.cbrt(DECAY))),
        (found.fraction_below(0.0101), np.mean(np.array(DECAY) <= 0.0101), 0.6),
        (found.effective_rank, every.effective_rank, 0.6 * every.effective_rank),
    ):
        assert abs(estimate.value - truth) <= 4 * estimate.standard_error
        assert abs(estimate.value - wrong) > 4 * estimate.standard_error  # control


def test_standard_error_of_the_effective_rank_is_the_scatter_between_seeds() -> None:
    matrix = rotated(DECAY[:60])
    found = [ntk.spectral_density(matrix, probes=12, steps=60, seed=seed).effective_rank for seed in range(60)]
    values, reported = np.array(found).T
    assert abs(values.mean() - ntk.spectrum(matrix).effective_rank) <= 4 * values.std(ddof=1) / np.sqrt(60)
    # Known to 1/sqrt(2 * 59) from the scatter; the jackknife of 12 vectors adds a bias of its own, below 1/12.
    assert values.std(ddof=1) / np.sqrt((reported**2).mean()) == pytest.approx(1, abs=4 / np.sqrt(118) + 1 / 12)


def test_smoothed_density() -> None:
    found = ntk.spectral_density(rotated(DECAY), probes=8)
    points = np.linspace(-1, 2, 601)
    values, standard_errors = found.density(points, 0.05)
    assert np.trapezoid(values, points) == pytest.approx(1, rel=1e-6)
    spread = np.exp(-(((points[:, None] - DECAY) / 0.05) ** 2) / 2).mean(1) / (0.05 * np.sqrt(2 * np.pi))
    at_the_mode = values.argmax()
    assert abs(values - spread)[at_the_mode] <= 4 * standard_errors[at_the_mode]


def test_null_space_shows_as_weight_at_zero() -> None:
    model, x = last_batch_norm()
    operator = ntk.NtkOperator(model, x)
    found = ntk.spectral_density(operator, probes=64, steps=60)
    floor = ntk.spectrum(operator, k=(1, 1)).error_estimate
    null = found.fraction_below(floor)
    assert abs(null.value - 6 / 60) <= 4 * null.standard_error
    assert abs(null.value) > 4 * null.standard_error  # control
    assert found.effective_rank.value < 54


@pytest.mark.parametrize("reduce", ["none", "trace"])
def test_estimates_of_a_network(reduce: str) -> None:
    model, x, _ = build("conv with BatchNorm", n1=24)
    kernel = ntk.empirical_ntk(model, x, reduce=reduce)
    matrix, operator = kernel.flatten(), ntk.NtkOperator(model, x, reduce=reduce)
    trace = ntk.estimate_trace(operator, products=21)
    assert abs(trace.value - np.trace(matrix)) <= 4 * trace.standard_error
    density = ntk.spectral_density(operator, probes=16, steps=30)
    rank = density.effective_rank
    assert abs(rank.value - ntk.spectrum(kernel).effective_rank) <= 4 * rank.standard_error
    assert density.source == operator.describe()
    assert ntk.estimate_trace(kernel, products=21).value == pytest.approx(trace.value, rel=1e-10)


def test_float32() -> None:
    model, x, _ = build("mlp", n1=20)
    single = ntk.spectral_density(ntk.NtkOperator(model, x, dtype=torch.float32), probes=4, steps=8)
    double = ntk.spectral_density(ntk.NtkOperator(model, x), probes=4, steps=8)
    assert single.effective_rank.value == pytest.approx(double.effective_rank.value, rel=1e-4)


def test_zero_kernel() -> None:
    zero = np.zeros((9, 9))
    assert ntk.spectral_density(zero).effective_rank == (0, 0)
    assert ntk.estimate_trace(zero, products=6) == (0, 0)
    assert "<svg" in ntk.spectral_density(zero)._repr_html_()


def test_it_draws_itself() -> None:
    found = ntk.spectral_density(rotated(DECAY), probes=3, steps=9)
    assert "150 eigenvalues by 3 vectors of 9 steps" in repr(found)
    drawing = found._repr_html_()
    assert "fraction of eigenvalues" in drawing
    assert drawing == found._repr_html_()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"products must be at least 6.*got 5"):
        ntk.estimate_trace(np.eye(3), products=5)
    with pytest.raises(errors.UnknownNameError, match=r"method: must be one of .*'xtrace'; received 'trace'"):
        ntk.estimate_trace(np.eye(3), method="trace")
    with pytest.raises(ValueError, match=r"probes >= 2.*steps >= 1; got 1 and 64"):
        ntk.spectral_density(np.eye(3), probes=1)
    with pytest.raises(errors.AsymmetricKernelError, match=re.escape("got shape (3, 4)")):
        ntk.estimate_trace(np.zeros((3, 4)))
    model, x1, x2 = build("mlp", n1=4)
    with pytest.raises(errors.AsymmetricKernelError, match="got a cross kernel of shape"):
        ntk.spectral_density(ntk.empirical_ntk(model, x1, x2))
    with pytest.raises(errors.AsymmetricKernelError, match="got a cross kernel of shape"):
        ntk.estimate_trace(ntk.NtkOperator(model, x1, x2))
