"""Dual activations: docs/mathematics.md §2 and §4.2, against two-dimensional quadrature and Monte Carlo."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import erf, roots_legendre

from ntk.analytic import dual_activation
from ntk.analytic.activations import DualActivation, leaky_relu, polynomial, sine
from ntk.analytic.closed_forms import Homogeneous
from ntk.analytic.precision import double_precision
from tests.ntk.analytic.cases import EPS, Array, printed, standard_scores

DUALS: dict[str, DualActivation] = {
    **{name: dual_activation(name) for name in ("relu", "abs", "linear", "erf", "gelu", "tanh", "silu", "sine")},
    "leaky": leaky_relu(0.2),
    "fast sine": sine(1.7),
    "polynomial": polynomial((0.3, 1.0, -0.4, 0.2)),
}
NAMES = tuple(DUALS)
SMOOTH = ("erf", "gelu", "tanh", "silu", "sine", "fast sine", "polynomial")
SLOPES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: np.heaviside(z, 0.5)),
    "leaky": (lambda z: np.maximum(z, 0.2 * z), lambda z: 0.2 + 0.8 * np.heaviside(z, 0.5)),
    "abs": (np.abs, np.sign),
    "erf": (erf, lambda z: 2 / np.sqrt(np.pi) * np.exp(-(z**2))),
    "gelu": (
        lambda z: z * (1 + erf(z / np.sqrt(2))) / 2,
        lambda z: (1 + erf(z / np.sqrt(2))) / 2 + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi),
    ),
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
    "silu": (lambda z: z / (1 + np.exp(-z)), lambda z: (1 + np.exp(-z) * (1 + z)) / (1 + np.exp(-z)) ** 2),
    "sine": (np.sin, np.cos),
    "fast sine": (lambda z: np.sin(1.7 * z), lambda z: 1.7 * np.cos(1.7 * z)),
    "polynomial": (lambda z: 0.3 + z - 0.4 * z**2 + 0.2 * z**3, lambda z: 1 - 0.8 * z + 0.6 * z**2),
    "linear": (lambda z: z, np.ones_like),
}
CONSTANTS = {  # mean, second moment, variance, E[φ'²], plain χ1, weight-mean χ1, weight-mean slope at 0
    "relu": "0.3989422804 0.5000000000 0.3408450569 0.5000000000 1.0000000000 1.4669422069 0.7334711035",
    "abs": "0.7978845608 1.0000000000 0.3633802276 1.0000000000 1.0000000000 2.7519383939 0.0000000000",
    "erf": "0.0000000000 0.4645590544 0.4645590544 0.5694100347 1.2257000038 1.2257000038 0.9135828428",
    "tanh": "0.0000000000 0.3942944904 0.3942944904 0.4644029024 1.1778072323 1.1778072323 0.9304699236",
    "sine": "0.0000000000 0.4323323584 0.4323323584 0.5676676416 1.3130352855 1.3130352855 0.8509181282",
    "silu": "0.2066209641 0.3557755198 0.3130832970 0.3794823516 1.0666342412 1.2120811148 0.7985095417",
    "gelu": "0.2820947918 0.4252214826 0.3456440110 0.4558508656 1.0720315984 1.3188449709 0.7232875213",
}
RELU = """
-1   0               0              0              0              -0.466942206924 0
-0.5 0.0544988905221 0.166666666667 0.108997781044 0.333333333333 -0.307048761449 0.488980735641
0    0.159154943092  0.25           0.318309886184 0.5            0               0.733471103462
0.25 0.226654938922  0.290215311628 0.453309877845 0.580430623255 0.198037185702  0.851458179444
0.5  0.304498890522  0.333333333333 0.608997781044 0.666666666667 0.426422342013  0.977961471283
0.75 0.394001053776  0.384973271919 0.788002107552 0.769946543837 0.689011343789  1.12946708223
0.9  0.454769199422  0.428216853436 0.909538398845 0.856433706871 0.867298059159  1.25633875204
1    0.5             0.5            1              1              1               1.46694220692
"""


LEGENDRE = roots_legendre(400)


def gaussian_pair(function: Callable[[Array], Array], rho: float, q1: float, q2: float) -> float:
    """Gauss–Legendre quadrature of E[f(u)f(v)], in both variables broken where a kinked activation has its kink."""
    density = lambda z: np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    sine, nodes, weights = np.sqrt(1 - rho**2), LEGENDRE[0], LEGENDRE[1]
    x = np.concatenate([6 * (nodes - 1), 6 * (nodes + 1)])
    inner = np.zeros_like(x)
    for start, end in ((-12 + 0 * x, -rho * x / sine), (-rho * x / sine, 12 + 0 * x)):
        start, end = np.clip(start, -12, 12), np.clip(end, -12, 12)
        y = (start + end)[:, None] / 2 + (end - start)[:, None] / 2 * nodes
        integrand = function(np.sqrt(q2) * (rho * x[:, None] + sine * y)) * density(y)
        inner += (end - start) / 2 * (integrand @ weights)
    return float(np.sum(6 * np.tile(weights, 2) * function(np.sqrt(q1) * x) * density(x) * inner))


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_the_table(name: str) -> None:
    dual = dual_activation(name)
    slope, moment, variance = dual.derivative_second_moment, dual.second_moment, dual.variance
    values = (dual.mean(), moment, variance, slope, slope / moment, slope / variance, dual.derivative(0.0) / variance)
    for value, text in zip(values, CONSTANTS[name].split(), strict=True):
        printed(float(value), text)


@pytest.mark.parametrize("row", RELU.strip().splitlines())
def test_relu_table(row: str) -> None:
    rho, value, slope, plain, plain_slope, centred, centred_slope = row.split()
    dual = dual_activation("relu")
    weight = 1 / dual.variance
    printed(float(dual.value(float(rho))), value)
    printed(float(dual.derivative(float(rho))), slope)
    printed(2 * float(dual.value(float(rho))), plain)
    printed(2 * float(dual.derivative(float(rho))), plain_slope)
    printed(weight * float(dual.covariance(float(rho))), centred)
    printed(weight * float(dual.derivative(float(rho))), centred_slope)


def test_scalars() -> None:
    dual = dual_activation("relu")
    printed(float(dual.value(0.0)), "0.159154943091895")
    printed(dual.variance, "0.340845056908105")
    printed(np.sqrt(0.5 / dual.variance), "1.21117389623632")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rho", "q1", "q2"), [(0.6, 1.0, 1.0), (-0.35, 0.7, 1.8)])
def test_against_quadrature(name: str, rho: float, q1: float, q2: float) -> None:
    # The rule is converged for these; SciPy's weights of 400 nodes err by 1e-12, and there are two dimensions.
    function, slope = SLOPES[name]
    dual = DUALS[name]
    assert dual.value(rho, q1, q2) == pytest.approx(gaussian_pair(function, rho, q1, q2), rel=4e-12, abs=4e-12)
    assert dual.derivative(rho, q1, q2) == pytest.approx(gaussian_pair(slope, rho, q1, q2), rel=4e-12, abs=4e-12)


@pytest.mark.parametrize("name", NAMES)
def test_against_monte_carlo(name: str) -> None:
    rng, n, rho, q1, q2 = np.random.default_rng(7), 200_000, 0.4, 1.3, 0.6
    x, y = rng.standard_normal((2, n))
    u, v = np.sqrt(q1) * x, np.sqrt(q2) * (rho * x + np.sqrt(1 - rho**2) * y)
    function, slope = SLOPES[name]
    dual = DUALS[name]
    samples = np.stack([function(u) * function(v), function(u), slope(u) * slope(v)], axis=1)
    expected = np.array([dual.value(rho, q1, q2), dual.mean(q1), dual.derivative(rho, q1, q2)])
    random = samples.std(axis=0) > 0  # the slope of the linear activation is not random
    assert np.abs(standard_scores(samples[:, random], expected[random])).max() < 4
    assert np.all(np.abs(samples.mean(axis=0)[~random] - expected[~random]) < n * EPS)


def test_monte_carlo_refuses_the_wrong_variance() -> None:
    x, y = np.random.default_rng(7).standard_normal((2, 200_000))
    samples = np.maximum(x, 0) * np.maximum(0.4 * x + np.sqrt(1 - 0.16) * y, 0)
    assert abs(standard_scores(samples, dual_activation("relu").value(0.4, 1.0, 1.1))) > 4


def test_printed_refuses_a_wrong_digit() -> None:
    with pytest.raises(AssertionError, match="not 0\\.31831 to its printed digits"):
        printed(1 / np.pi + 1e-5, "0.31831")


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_that_of_the_value(name: str) -> None:
    # Price's theorem; central differences of step h err by h²/6 times a third derivative of order one.
    dual, h = DUALS[name], 1e-4
    rho, scale = np.array([-0.6, 0.0, 0.3, 0.8]), np.sqrt(0.7 * 1.9)
    step = h / scale
    slope = (dual.value(rho + step, 0.7, 1.9) - dual.value(rho - step, 0.7, 1.9)) / (2 * h)
    np.testing.assert_allclose(slope, dual.derivative(rho, 0.7, 1.9), rtol=0, atol=20 * h**2)


@pytest.mark.parametrize("name", NAMES)
def test_covariance_is_value_less_means(name: str) -> None:
    dual, rho = DUALS[name], np.linspace(-1, 1, 41)
    difference = dual.value(rho, 0.7, 1.9) - dual.mean(0.7) * dual.mean(1.9)
    np.testing.assert_allclose(dual.covariance(rho, 0.7, 1.9), difference, rtol=0, atol=16 * EPS)


@pytest.mark.parametrize("name", ["relu", "abs", "leaky", "gelu", "silu", "polynomial"])
def test_covariance_keeps_its_relative_precision(name: str) -> None:
    # Around zero it is a_1² ρ (1 + O(ρ)), or O(ρ²) for the even activation; the difference of moments would give noise.
    dual, rho = DUALS[name], 1e-12
    leading = rho**2 / np.pi if name == "abs" else rho * float(dual.derivative(0.0))
    assert dual.covariance(rho) == pytest.approx(leading, rel=1e-11, abs=0)
    assert dual.value(rho) - dual.mean() ** 2 != pytest.approx(leading, rel=1e-8, abs=0)


@pytest.mark.parametrize("name", NAMES)
def test_curvature_is_twice_the_derivative_in_the_variance(name: str) -> None:
    # At a fixed covariance k, ∂E[φ(u)φ(v)]/∂q1 = E[φ''(u)φ(v)]/2; central differences as above.
    dual, h, k, q2 = DUALS[name], 1e-4, np.array([-0.6, 0.0, 0.5]), 1.9
    value = lambda q1: dual.value(k / np.sqrt(q1 * q2), q1, q2)
    slope = (value(0.7 + h) - value(0.7 - h)) / (2 * h)
    curvature = dual.curvature(k / np.sqrt(0.7 * q2), 0.7, q2)
    np.testing.assert_allclose(slope, curvature / 2, rtol=0, atol=20 * h**2)


@pytest.mark.parametrize("name", ["relu", "abs", "leaky", "linear"])
def test_diagonal_is_exact(name: str) -> None:
    moment = {"relu": 0.5, "leaky": 0.52}.get(name, 1.0)
    dual = DUALS[name]
    assert dual.value(1.0, 3.0, 3.0) == pytest.approx(3 * moment, rel=2 * EPS)
    assert dual.derivative(1.0, 3.0, 3.0) == pytest.approx(moment, rel=EPS)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_broadcast(name: str) -> None:
    dual = DUALS[name]
    for method in (dual.value, dual.derivative, dual.covariance, dual.curvature):
        assert method([[0.5], [0.1]], 2.0, [2.0, 3.0, 4.0]).shape == (2, 3)
        assert method(0.5, [2.0, 3.0]).dtype == np.float64
    assert dual.mean([1.0, 2.0]).shape == (2,)


@pytest.mark.parametrize("name", ["tanh", "silu"])
@pytest.mark.parametrize(("q", "rho"), [(3.0, 1.0), (20.0, 1.0), (20.0, 0.5)])
def test_mixtures_at_large_variance(name: str, q: float, rho: float) -> None:
    function, slope = SLOPES[name]
    dual = DUALS[name]
    if rho == 1.0:
        density = lambda x: np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
        expected = quad(lambda x: slope(np.sqrt(q) * x) ** 2 * density(x), -12, 12, epsabs=1e-13, limit=200)[0]
        assert dual.derivative(rho, q, q) == pytest.approx(expected, abs=1e-12)
    else:
        assert dual.value(rho, q, q) == pytest.approx(gaussian_pair(function, rho, q, q), abs=1e-12)


@pytest.mark.parametrize("name", ["tanh", "silu"])
def test_mixtures_are_the_functions(name: str) -> None:
    # The rule is one of 28 terms for every z; relative to the size of its terms it errs by a few roundings.
    forms, z = DUALS[name].forms, np.linspace(-60, 60, 4001)
    total = sum(w * forms.base.function(z / s) for w, s in zip(forms.weights, forms.scales, strict=True))
    np.testing.assert_allclose(total, SLOPES[name][0](z), rtol=0, atol=8 * EPS * np.maximum(1, np.abs(z)).max())
    coarse = sum(2 * w * forms.base.function(z / s) for w, s in zip(forms.weights[::2], forms.scales[::2], strict=True))
    assert np.abs(coarse - SLOPES[name][0](z)).max() > 1e-10  # every second term is not enough


def test_limit_of_infinite_variance() -> None:
    rho = np.linspace(-1, 1, 9)
    sign = (2 / np.pi) * np.arcsin(rho)
    np.testing.assert_allclose(DUALS["tanh"].value(rho, 1e12, 1e12), sign, rtol=0, atol=1e-5)
    for name in ("gelu", "silu"):
        dual, asymptote = DUALS[name], DUALS[name].asymptote
        assert asymptote == Homogeneous(0.0)
        np.testing.assert_allclose(dual.derivative(rho, 1e12, 1e12), asymptote.derivative(rho, 1.0, 1.0), atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_function(name: str) -> None:
    z = np.linspace(-3, 3, 13)
    np.testing.assert_allclose(DUALS[name].function(z), SLOPES[name][0](z), rtol=8 * EPS, atol=EPS)
    with double_precision():
        np.testing.assert_allclose(np.asarray(DUALS[name].function(jnp.asarray(z))), SLOPES[name][0](z), atol=8 * EPS)


@pytest.mark.parametrize("name", NAMES)
def test_forms_under_jit_are_those_of_numpy(name: str) -> None:
    dual = DUALS[name]
    rho, q1, q2 = np.array([-1, -0.7, 0, 0.3, 0.999, 1]), np.linspace(0.3, 3, 6), np.linspace(2, 0.5, 6)
    forms = dual.forms
    both = lambda rho, q1, q2: (forms.value(rho, q1, q2), forms.derivative(rho, q1, q2), forms.covariance(rho, q1, q2))
    with double_precision():
        traced = [np.asarray(item) for item in jax.jit(both)(*map(jnp.asarray, (rho, q1, q2)))]
    for mine, theirs in zip((dual.value, dual.derivative, dual.covariance), traced, strict=True):
        np.testing.assert_allclose(theirs, mine(rho, q1, q2), rtol=0, atol=16 * EPS * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["relu", "abs", "leaky", "erf", "gelu", "tanh"])
def test_jax_gradient_of_the_value_is_price_also_at_one(name: str) -> None:
    dual, rho = DUALS[name], np.array([-1.0, -0.3, 0.0, 0.8, 1.0])
    with double_precision():
        gradient = jax.grad(lambda c: dual.forms.value(c, jnp.asarray(1.3), jnp.asarray(0.6)))
        slope = jax.jit(jax.vmap(gradient))(jnp.asarray(rho))
    expected = np.sqrt(1.3 * 0.6) * dual.derivative(rho, 1.3, 0.6)
    np.testing.assert_allclose(np.asarray(slope), expected, rtol=0, atol=64 * EPS)
    naive = lambda c: jnp.sqrt(1 - c**2) + c * jnp.arcsin(c)
    assert not np.isfinite(jax.grad(naive)(1.0))  # what the guard in the sine is for


def test_homogeneous_family() -> None:
    assert [dual_activation(name).negative_slope for name in ("relu", "abs", "linear", "gelu")] == [0, -1, 1, None]
    assert dual_activation("leaky_relu") == leaky_relu(0.01)
    assert dual_activation("leaky_relu").name == "leaky_relu(0.01)"
    assert leaky_relu(0.2).homogeneous
    assert not sine().homogeneous
    rho = np.linspace(-1, 1, 5)
    np.testing.assert_array_equal(leaky_relu(0.0).value(rho), dual_activation("relu").value(rho))


def test_dual_activation_returns_what_it_is_given() -> None:
    dual = leaky_relu(0.2)
    assert dual_activation(dual) is dual


def test_polynomial_of_degree_one_is_linear() -> None:
    rho = np.linspace(-1, 1, 5)
    np.testing.assert_array_equal(
        polynomial((0, 1)).value(rho, 0.7, 1.9), dual_activation("linear").value(rho, 0.7, 1.9)
    )


def test_hermite_polynomial_has_one_power() -> None:
    # φ = z³ − 3z is √6 h_3: φ̂(ρ) = 6ρ³ at unit variance (docs/mathematics.md §2.1).
    rho = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(polynomial((0, -3, 0, 1)).value(rho), 6 * rho**3, rtol=0, atol=32 * EPS)


@pytest.mark.parametrize("make", [leaky_relu, sine, lambda c: polynomial((0.0, c))])
def test_parameters_must_be_finite(make: Callable[[float], DualActivation]) -> None:
    with pytest.raises(
        ValueError, match=r"(negative_slope|frequency|coefficients): must be a finite.* received nan\. It"
    ):
        make(np.nan)


def test_sine_of_no_frequency() -> None:
    with pytest.raises(ValueError, match=r"frequency: must not be zero, as the activation would be.* take 1\."):
        sine(0.0)


@pytest.mark.parametrize("coefficients", [(), (1.0,), (1.0, 0.0)])
def test_constant_polynomial(coefficients: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"coefficients: must hold a non-zero c_j.*constant.*Put the constant first"):
        polynomial(coefficients)


def test_identity_is_linear() -> None:
    rho = np.linspace(-1, 1, 5)
    np.testing.assert_array_equal(dual_activation("identity").value(rho), dual_activation("linear").value(rho))


def test_unknown_activation() -> None:
    with pytest.raises(
        ValueError,
        match=r"activation: must be one of 'relu'.*received 'rellu'. Nearest: 'relu'.*Take one of these, or leaky_relu",
    ):
        dual_activation("rellu")


@pytest.mark.parametrize("rho", [1.5, np.nan])
def test_impossible_correlation(rho: float) -> None:
    with pytest.raises(ValueError, match=r"rho: must be a correlation in \[-1, 1\]; received (1\.5|nan)\. Divide"):
        dual_activation("relu").value([0.5, rho])


@pytest.mark.parametrize("q", [-1.0, np.inf])
def test_impossible_variance(q: float) -> None:
    with pytest.raises(ValueError, match=r"q2: must be a finite, non-negative variance; received (-1\.0|inf)\. Pass"):
        dual_activation("relu").value(0.5, 1.0, q)
