"""Training predicted by the kernel: docs/mathematics.md §6.2, §6.3. Oracles: loops, matrix exponentials, linear solves,
and neural-tangents."""

from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg

from ntk.analytic import propagate
from ntk.analytic.constant_correlation import ConstantCorrelation
from ntk.analytic.dynamics import TrainingDynamics, training_dynamics
from ntk.errors import AsymmetricKernelError, NonFiniteKernelError, PrecisionFloorWarning
from tests.ntk.analytic.cases import Array, constant_half, printed, random_covariance

M, T, C = 7, 3, 2


def problem(seed: int = 0, outputs: tuple[int, ...] = (C,)) -> dict[str, Any]:
    """A joint kernel of M training and T test points, with targets and outputs at the start."""
    joint, generator = random_covariance(M + T, seed), np.random.default_rng(seed + 100)
    draw = lambda rows: generator.standard_normal((rows, *outputs))
    return {
        "ntk": joint[:M, :M],
        "targets": draw(M),
        "initial": draw(M),
        "test_ntk": joint[M:, :M],
        "test_initial": draw(T),
    }


def propagator(given: dict[str, Any], time: float) -> tuple[Array, Array]:
    """Train and test outputs from the matrix exponential of the joint linear system; nothing is inverted."""
    generator = np.zeros((M + T, M + T))
    generator[:M, :M], generator[M:, :M] = -given["ntk"], -given["test_ntk"]
    error = np.concatenate([given["initial"] - given["targets"], given["test_initial"]])
    moved = scipy.linalg.expm(generator * time) @ error
    return moved[:M] + given["targets"], moved[M:]


def descended(given: dict[str, Any], steps: int, rate: float) -> tuple[Array, Array]:
    """Train and test outputs from a loop over the steps."""
    train, test = given["initial"].copy(), given["test_initial"].copy()
    for _ in range(steps):
        error = train - given["targets"]
        train, test = train - rate * given["ntk"] @ error, test - rate * given["test_ntk"] @ error
    return train, test


def near(actual: Array | None, expected: Array) -> None:
    assert actual is not None
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("outputs", [(), (C,)])
@pytest.mark.parametrize("averaged", [False, True])
def test_gradient_flow(outputs: tuple[int, ...], averaged: bool) -> None:
    given, times = problem(outputs=outputs), np.array([0.0, 0.03, 0.4, 5.0])
    flow = training_dynamics(**given, averaged=averaged).gradient_flow(times)
    expected = [propagator(given, time / M if averaged else time) for time in times]
    near(flow.train, np.stack([train for train, _ in expected]))
    near(flow.test, np.stack([test for _, test in expected]))
    one = training_dynamics(**given, averaged=averaged).gradient_flow(0.4)
    near(one.train, flow.train[2])
    assert one.loss.shape == ()
    error = (flow.train - given["targets"]) ** 2
    near(flow.loss, error.reshape(len(times), -1).sum(1) / (2 * M if averaged else 2))


@pytest.mark.parametrize("share", [0.01, 0.7, 0.999, 1.001, 1.5])
@pytest.mark.parametrize("averaged", [False, True])
def test_gradient_descent(share: float, averaged: bool) -> None:
    given, steps = problem(1), [0, 1, 2, 17]
    dynamics = training_dynamics(**given, averaged=averaged)
    rate = share * dynamics.largest_stable_learning_rate
    descent = dynamics.gradient_descent(steps, rate)
    for index, count in enumerate(steps):
        train, test = descended(given, count, rate / M if averaged else rate)
        near(descent.train[index], train)
        near(descent.test[index] if descent.test is not None else None, test)


@pytest.mark.parametrize("time", [0.0, 2.0, np.array([0.1, 1.0, 30.0]), None])
def test_against_neural_tangents(time: Any) -> None:
    from ntk.analytic.compat import nt

    given = problem(2)
    with jax.enable_x64(True):
        # Their loss is averaged over examples and outputs, ours over examples.
        predict = nt.predict.gradient_descent_mse(given["ntk"], given["targets"], learning_rate=float(C))
        expected = predict(time, given["initial"], given["test_initial"], given["test_ntk"])
        train, test = (np.array(part) for part in expected)
    flow = training_dynamics(**given, averaged=True).gradient_flow(np.inf if time is None else time)
    near(flow.train, train)
    near(flow.test, test)


def test_modes_decay_by_themselves() -> None:
    given = problem(3)
    dynamics = training_dynamics(**given)
    values, vectors = dynamics.eigenvalues, dynamics.eigenvectors
    assert np.all(np.diff(values) < 0)
    near(given["ntk"] @ vectors, vectors * values)
    start = vectors.T @ (given["initial"] - given["targets"])
    flow, descent = dynamics.gradient_flow(0.3), dynamics.gradient_descent(5, 0.02)
    near(flow.mode_residuals, np.exp(-0.3 * values)[:, None] * start)
    near(descent.mode_residuals, (1 - 0.02 * values)[:, None] ** 5 * start)
    for trajectory in (flow, descent):
        near(trajectory.mode_residuals, vectors.T @ (trajectory.train - given["targets"]))


def test_small_steps_follow_the_flow() -> None:
    # Euler's method: the error is first order in the step.
    dynamics = training_dynamics(**problem(4))
    flow = dynamics.gradient_flow(1.0)
    errors = [np.abs(dynamics.gradient_descent(n, 1 / n).test - flow.test).max() for n in (1000, 100_000)]
    assert np.log10(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)


def test_one_kernel_per_output() -> None:
    first, second = problem(5, ()), problem(6, ())
    stacked = {name: np.stack([first[name], second[name]], axis=0 if "ntk" in name else -1) for name in first}
    both = training_dynamics(**stacked)
    separate = [training_dynamics(**first), training_dynamics(**second)]
    assert both.rates.shape == (2, M)
    assert both.largest_stable_learning_rate == min(one.largest_stable_learning_rate for one in separate)
    rate = 0.3 * both.largest_stable_learning_rate
    for name in ("train", "test", "mode_residuals"):
        alone = [getattr(one.gradient_descent([2, 9], rate), name) for one in separate]
        together = getattr(both.gradient_descent([2, 9], rate), name)
        np.testing.assert_allclose(np.abs(together), np.abs(np.stack(alone, axis=-1)), atol=1e-12)
    near(both.mean_predictor(), np.stack([one.mean_predictor() for one in separate], axis=-1))
    near(both.gradient_descent(2, rate).loss, sum(one.gradient_descent(2, rate).loss for one in separate))


def test_mean_predictor() -> None:
    given = problem(7)
    dynamics = training_dynamics(**given)
    weights = np.linalg.solve(given["ntk"], given["test_ntk"].T).T
    near(dynamics.label_weights, weights)
    near(dynamics.mean_predictor(), weights @ given["targets"])
    near(dynamics.gradient_flow(np.inf).test, given["test_initial"] + weights @ (given["targets"] - given["initial"]))
    near(dynamics.gradient_flow(np.inf).train, given["targets"])
    near(training_dynamics(**given, averaged=True).label_weights, weights)
    started_at_zero = training_dynamics(given["ntk"], given["targets"], test_ntk=given["test_ntk"])
    near(started_at_zero.gradient_flow(np.inf).test, dynamics.mean_predictor())


@pytest.mark.parametrize("averaged", [False, True])
def test_the_bound_separates_decay_from_growth(averaged: bool) -> None:
    given = problem(8)
    dynamics = training_dynamics(**given, averaged=averaged)
    largest = np.linalg.eigvalsh(given["ntk"])[-1]
    assert dynamics.largest_stable_learning_rate == pytest.approx(2 * (M if averaged else 1) / largest, rel=1e-13)
    for share, grows in ((0.999, False), (1.001, True)):
        rate = share * dynamics.largest_stable_learning_rate
        leading = np.abs(dynamics.gradient_descent(np.arange(50), rate).mode_residuals[:, 0])
        np.testing.assert_allclose(leading[1:] / leading[:-1], 2 * share - 1, rtol=1e-11)
        assert np.all((np.diff(leading, axis=0) > 0) == grows)


def test_best_learning_rate() -> None:
    dynamics = training_dynamics(random_covariance(M, 9), np.ones(M))
    worst = lambda rate: np.abs(1 - rate * dynamics.rates).max()
    best = dynamics.best_learning_rate
    assert worst(best) == pytest.approx(dynamics.convergence_factor, rel=1e-12)
    assert dynamics.condition_number == pytest.approx(np.linalg.cond(random_covariance(M, 9)), rel=1e-10)
    assert worst(best) < min(worst(0.99 * best), worst(1.01 * best))


def low_rank(rank: int) -> dict[str, Any]:
    features = np.random.default_rng(10).standard_normal((M + T, rank))
    joint = features @ features.T
    return problem(10) | {"ntk": joint[:M, :M], "test_ntk": joint[M:, :M]}


def test_null_directions_stay() -> None:
    given = low_rank(4)
    dynamics = training_dynamics(**given)
    assert dynamics.rank == 4
    inverse = np.linalg.pinv(given["ntk"], rcond=1e-10, hermitian=True)
    stay = np.eye(M) - given["ntk"] @ inverse
    assert np.isfinite(dynamics.condition_number)
    for time in (1e12, np.inf):  # neither drifts nor warns
        flow = dynamics.gradient_flow(time)
        near(flow.train, given["targets"] + stay @ (given["initial"] - given["targets"]))
        near(flow.test, given["test_initial"] + given["test_ntk"] @ inverse @ (given["targets"] - given["initial"]))
    near(dynamics.label_weights, given["test_ntk"] @ inverse)
    train, test = propagator(given, 0.2)
    near(dynamics.gradient_flow(0.2).train, train)
    near(dynamics.gradient_flow(0.2).test, test)
    rate = 0.3 * dynamics.largest_stable_learning_rate
    near(dynamics.gradient_descent(40, rate).test, descended(given, 40, rate)[1])


def smooth() -> dict[str, Any]:
    """Points on a line under a Gaussian kernel, whose eigenvalues fall through the precision of float64."""
    position = np.linspace(-1, 1, M + T)
    joint = np.exp(-((position[:, None] - position) ** 2) / 200)
    return problem(11) | {"ntk": joint[:M, :M], "test_ntk": joint[M:, :M]}


def test_inverse_beyond_precision() -> None:
    dynamics = training_dynamics(**smooth())
    message = r"test predictions at time inf depend on \d eigenvalues .* below 1/5\.4e\+12 .*coincide"
    with pytest.warns(PrecisionFloorWarning, match=message) as caught:
        dynamics.gradient_flow(np.inf)
    assert caught[0].filename == __file__
    with pytest.warns(PrecisionFloorWarning, match=message) as caught:
        dynamics.mean_predictor()
    train, test = propagator(smooth(), 100.0)  # a finite time needs no inverse, and does not warn
    near(dynamics.gradient_flow(100.0).train, train)
    near(dynamics.gradient_flow(100.0).test, test)
    rate = dynamics.largest_stable_learning_rate / 3
    near(dynamics.gradient_descent(100, rate).test, descended(smooth(), 100, rate)[1])


def test_single_precision_kernel_has_a_higher_floor() -> None:
    given = low_rank(4)
    exact = training_dynamics(**given)
    single = training_dynamics(**(given | {"ntk": given["ntk"].astype(np.float32)}))
    assert exact.rank == single.rank == 4
    mixed = given["ntk"].astype(np.float32).astype(np.float64)  # the same values, their precision forgotten
    assert training_dynamics(given["ntk"] + 1e-9 * np.eye(M), given["targets"]).rank == M
    assert training_dynamics(mixed + 1e-6 * np.eye(M), given["targets"]).rank > 4


LARGEST_EIGENVALUE = """
10    2.817/3.181 4.798/14.89 7.024/144.4 8.459/668.8 18.74/6.57e7
256   2.477/1.471 4.135/1.227 5.959/5.796 7.120/26.18 15.30/2.57e6
50000 2.463/1.402 4.108/0.675 5.916/0.190 7.066/0.190 15.16/1.31e4
"""


def of_pair(depth: int, norm: str, m: int) -> ConstantCorrelation:
    kernel = propagate(constant_half(2), depth, norm, every_depth=False).ntk
    return ConstantCorrelation(kernel[0, 0], kernel[0, 1], m)


@pytest.mark.parametrize("norm", ["none", "weight_mean"])
def test_closed_form_is_the_spectrum(norm: str) -> None:
    for m, depth in ((10, 5), (256, 10)):
        kernel = propagate(constant_half(m + 1), depth, norm, every_depth=False).ntk
        closed = of_pair(depth, norm, m)
        near(closed.matrix(), kernel[:m, :m])
        dynamics = training_dynamics(kernel[:m, :m], np.ones(m), test_ntk=kernel[m:, :m])
        assert dynamics.largest_stable_learning_rate == pytest.approx(closed.largest_stable_learning_rate, rel=1e-12)
        assert dynamics.condition_number == pytest.approx(closed.condition_number, rel=1e-11)
        np.testing.assert_allclose(dynamics.label_weights, closed.label_weight, rtol=1e-11)
        np.testing.assert_allclose(dynamics.mean_predictor(), closed.total_label_weight, rtol=1e-11)


def test_negative_correlation() -> None:
    closed = ConstantCorrelation(1.0, -0.1, 8)
    spectrum = np.linalg.eigvalsh(closed.matrix())
    assert closed.condition_number == pytest.approx(spectrum[-1] / spectrum[0], rel=1e-13)
    assert closed.largest_stable_learning_rate == pytest.approx(2 / spectrum[-1], rel=1e-13)
    assert ConstantCorrelation(1.0, 1.0, 4).condition_number == np.inf


@pytest.mark.parametrize("row", LARGEST_EIGENVALUE.strip().splitlines())
def test_table_of_learning_rates(row: str) -> None:
    size, *columns = row.split()
    m = int(size)
    for depth, column in zip((5, 10, 16, 20, 50), columns, strict=True):
        for norm, text in zip(("none", "weight_mean"), column.split("/"), strict=True):
            printed(2 / of_pair(depth, norm, m).largest_stable_learning_rate / m, text)


@pytest.mark.parametrize(("m", "first"), [(10, 1), (256, 17), (50_000, 32)])
def test_depth_from_which_weight_mean_needs_the_smaller_step(m: int, first: int) -> None:
    smaller = lambda depth: (
        of_pair(depth, "weight_mean", m).largest_stable_learning_rate
        < of_pair(depth, "none", m).largest_stable_learning_rate
    )
    assert [depth for depth in range(1, 34) if smaller(depth)] == list(range(first, 34))


def test_table_of_label_weights() -> None:
    for depth, weight_mean, plain in ((5, "0.4405", "0.874"), (10, "0.0451", "0.856"), (20, "8.4e-5", "0.835")):
        printed(of_pair(depth, "weight_mean", 10).total_label_weight, weight_mean)
        printed(of_pair(depth, "none", 10).total_label_weight, plain)
    for depth, text in ((10, "0.9958"), (16, "0.8485"), (20, "0.296"), (50, "8.6e-10")):
        printed(of_pair(depth, "weight_mean", 50_000).total_label_weight, text)


def test_deep_plain_networks() -> None:
    """κ → (m + 3)/3 and the weight of a label → 1/(m + 3), both as ln D/D.

    At D = 10^5, 1 − c = 4.4e-9 has taken as many roundings of 1e-16 as there are layers, and κ is right to 1e-4 only.
    """
    by_depth = propagate(constant_half(2), 10_000).ntk_by_depth
    at = lambda depth: ConstantCorrelation(*by_depth[depth, 0], 10)
    for depth, text in ((10, "6.96135"), (100, "4.84404"), (1000, "4.40128"), (10_000, "4.34167")):
        printed(at(depth).condition_number, text)
    scaled = lambda value, limit: [abs(value(at(d)) / limit - 1) * d / np.log(d) for d in (1000, 10_000)]
    for value, limit in ((lambda k: k.condition_number, 13 / 3), (lambda k: k.label_weight, 1 / 13)):
        near_deep, deeper = scaled(value, limit)
        assert deeper == pytest.approx(near_deep, rel=0.1)  # while ln D/D itself falls sevenfold
        assert scaled(value, 1.1 * limit)[1] > 5 * near_deep


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ntk": np.ones((M, M + 1))}, AsymmetricKernelError, r"ntk: must be square.* received shape \(7, 8\)"),
        ({"ntk": np.ones((M, M, C, C))}, AsymmetricKernelError, r"\(7, 7, 2, 2\).* pass kernel\.flatten\(\)"),
        ({"ntk": np.triu(np.ones((M, M)))}, AsymmetricKernelError, "ntk: must be symmetric.* by up to 1 .*Pass the"),
        ({"ntk": np.full((M, M), np.nan)}, NonFiniteKernelError, "ntk: must be finite; 49 of its 49 .*overflows"),
        ({"ntk": np.eye(M) - 0.5}, ValueError, "ntk: must be positive semi-definite.* between -2.5 and 1 .*Pass Θ"),
        ({"ntk": np.zeros((M, M))}, ValueError, "ntk: must be positive semi-definite and not zero"),
        ({"targets": np.ones(M + 1)}, ValueError, r"targets: must be \[m\] or \[m, C\].* each of the 7 rows.*\(8,\)"),
        ({"targets": np.full((M, C), np.inf)}, ValueError, "targets: must be finite; NaN or infinity.*upstream"),
        ({"initial": np.ones(M)}, ValueError, r"initial: must have shape \[7, 2\] to fit.* received shape \(7,\)"),
        ({"test_ntk": np.ones((M, T))}, ValueError, r"test_ntk: must have shape \[7, 7\].*training points in its col"),
        ({"test_ntk": np.ones(M)}, ValueError, r"test_ntk: must have shape \[t, 7\].* received shape \(7,\)"),
        ({"test_initial": np.ones((M, C))}, ValueError, r"test_initial: must have shape \[3, 2\]"),
        ({"test_initial": None}, ValueError, r"test_initial: required along with initial.*Pass them, .* \(3, 2\)"),
        ({"test_ntk": None}, ValueError, r"test_initial: requires test_ntk, .*\[t, m\]\. Pass it too"),
        ({"ntk": np.stack([np.eye(M)] * 3)}, ValueError, r"targets: must be \[m, C\] .* each of the 3 kernels"),
    ],
)
def test_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        training_dynamics(**(problem() | changed))


@pytest.mark.parametrize("time", [-1.0, np.nan, [], [[1.0]], [0.0, -1e-9]])
def test_refused_times(time: Any) -> None:
    with pytest.raises(
        ValueError, match=r"time: must be one non-negative number or a list of them; received .*np\.inf"
    ):
        training_dynamics(**problem()).gradient_flow(time)


@pytest.mark.parametrize("steps", [-1, 1.5, True, [], [[1]], "3"])
def test_refused_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"steps: must be one non-negative integer or a list of them; received"):
        training_dynamics(**problem()).gradient_descent(steps, 0.1)


@pytest.mark.parametrize("rate", [0.0, -0.1, np.nan, np.inf])
def test_refused_learning_rates(rate: float) -> None:
    with pytest.raises(ValueError, match=r"learning_rate: must be positive and finite; received .* lie below 0\.\d+"):
        training_dynamics(**problem()).gradient_descent(3, rate)


def test_divergence_is_named() -> None:
    dynamics = training_dynamics(**problem())
    rate = 10 * dynamics.largest_stable_learning_rate
    with pytest.raises(
        ValueError, match=r"learning_rate: must keep the outputs within float64 over 500 steps.* 10 tim"
    ):
        dynamics.gradient_descent([1, 500], rate)


def test_no_test_points() -> None:
    dynamics = training_dynamics(np.eye(M), np.ones(M))
    assert dynamics.gradient_flow(1.0).test is None
    with pytest.raises(ValueError, match=r"test_ntk: required to predict test points; received None\. Pass the kernel"):
        dynamics.mean_predictor()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.5, 1), "m: must be an integer of at least 2; received 1"),
        ((1.0, 1.5, 4), "off_diagonal: must lie between .* here -0.333333 and 1; received 1.5. Pass ntk"),
        ((1.0, -0.5, 4), "off_diagonal: must lie between"),
        ((0.0, 0.0, 4), "off_diagonal: must lie between .* positive, finite diagonal"),
        ((1.0, np.nan, 4), "off_diagonal: must lie between"),
    ],
)
def test_refused_correlations(arguments: tuple[float, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConstantCorrelation(*arguments)


def test_results_are_frozen_and_draw_themselves() -> None:
    dynamics = training_dynamics(**problem())
    trajectory = dynamics.gradient_descent(np.arange(6), dynamics.best_learning_rate)
    with pytest.raises(AttributeError, match="cannot assign to field"):
        dynamics.averaged = True
    for array in (dynamics.eigenvalues, dynamics.rates, dynamics.label_weights, trajectory.train, trajectory.loss):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert "7 examples, 2 outputs, loss ½ Σ (f − y)²; 7 of 7 modes train" in repr(dynamics)
    assert "/ 7;" in repr(training_dynamics(**problem(), averaged=True))
    assert repr(trajectory).startswith("Trajectory(gradient descent at 0.309866, step 0 to 5; loss ")
    for drawn, axis in ((dynamics, "time"), (trajectory, "step")):
        assert drawn._repr_html_().count("mode ") == 5
        assert f">{axis}</text>" in drawn._repr_html_()


def test_already_at_the_target() -> None:
    dynamics: TrainingDynamics = training_dynamics(np.eye(M), np.ones(M), initial=np.ones(M))
    assert dynamics.gradient_flow([0.0, 1.0]).loss.tolist() == [0, 0]
    assert "<svg" in dynamics.gradient_flow(1.0)._repr_html_()


def test_dataset() -> None:
    dynamics = training_dynamics(**problem())
    data = dynamics.gradient_descent([0, 3, 4], 0.01).to_dataset()
    assert dict(data.sizes) == {"step": 3, "example": M, "output": C, "mode": M, "test_example": T}
    assert data.attrs == {"learning_rate": 0.01}
    near(data.sel(step=3).train.values, dynamics.gradient_descent(3, 0.01).train)
    single = training_dynamics(np.eye(M), np.ones(M)).gradient_flow(1.0).to_dataset()
    assert single.train.dims == ("example",)
    assert "test" not in single


def test_a_pair_of_kernels_is_none() -> None:
    with pytest.raises(TypeError, match=r"ntk: must be an array; received AnalyticKernels.*Pass kernels\.ntk"):
        training_dynamics(propagate(constant_half(4), 2), np.ones(4))
