"""Probes on networks whose answer is known: by hand, by a closed form, or by the slowest correct computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import mimicnorm
from diagnostics.claims.mimicnorm.networks import BATCH_NORM, MIMICNORM, PLAIN, WEIGHT_MEAN, chain, correlated_inputs
from diagnostics.data import constant_correlation, digits_vectors, inputs_of_gram
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement, pool
from diagnostics.probes import (
    ActivationMemory,
    Correlation,
    GradientGrowth,
    KernelEntries,
    KernelSpectrum,
    LearningRateRange,
    ProjectionEquivalence,
    RateStability,
    ScaleInvariance,
    Sharpness,
    TransitionOperator,
    Whitening,
)
from diagnostics.probes.correlation import correlation_matrix, off_diagonal
from diagnostics.probes.kernel import exchangeable_condition_number, ntk_multipliers
from diagnostics.probes.last_batch_norm import last_batch_norm, without_last_batch_norm
from diagnostics.probes.memory import saved_bytes
from diagnostics.subject import Subject
from ntk.analytic import correlation_map, gradient_growth, propagate

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=F64)


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A Linear with the given weight [out, in]."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def orthogonal(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def by_hand_jacobian(
    network: nn.Module, x: torch.Tensor, projection: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Jacobian of each parameter [examples · outputs, entries]: one backward pass per output, nothing clever."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name, _ in network.named_parameters()}
    for output in network(x).flatten():
        gradients = torch.autograd.grad(output, list(network.parameters()), retain_graph=True)
        for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
            project = projection is not None and parameter.ndim > 1
            rows[name].append((projection(gradient) if project else gradient).flatten())
    return {name: torch.stack(all_of_them) for name, all_of_them in rows.items()}


def center(weight: torch.Tensor) -> torch.Tensor:
    return weight - weight.mean(dim=1, keepdim=True)


def within_four_standard_errors(pooled: Measurement, expected: float, **where: object) -> bool:
    chosen = pooled.select(**where)
    return abs(float(chosen.estimate) - expected) < 4 * float(chosen.standard_error)


# Correlation and whitening.


def identity_network(n: int) -> nn.Sequential:
    """Passes its inputs on, rotated, to two activations that do nothing to positive numbers."""
    return nn.Sequential(linear(torch.eye(n, dtype=F64)), nn.ReLU(), linear(torch.eye(n, dtype=F64)), nn.ReLU())


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_correlation_of_a_network_that_changes_nothing_is_that_of_its_inputs(rho):
    x = inputs_of_gram(constant_correlation(6, rho))
    for depth in (0, 1):
        measured = Correlation().measure(Subject(identity_network(6), x))
        assert measured.axes["depth"] == (0, 1)
        expected = rho if depth == 0 else correlation_by_hand(x.clamp(min=0)).mean()
        assert measured.value(depth=depth, statistic="mean") == pytest.approx(expected, abs=1e-14)
    assert measured.value(depth=0, statistic="std") < 1e-14
    assert measured.value(depth=0, statistic="rms") == pytest.approx(rho, abs=1e-14)


def correlation_by_hand(x: torch.Tensor) -> np.ndarray:
    """Cosines of all pairs of rows, one by one."""
    rows = x.flatten(1).numpy()
    n = len(rows)
    return np.array(
        [
            rows[i] @ rows[j] / math.sqrt((rows[i] @ rows[i]) * (rows[j] @ rows[j]))
            for i in range(n)
            for j in range(i + 1, n)
        ]
    )


def test_mean_spread_and_rms_are_over_pairs_and_the_place_is_the_one_asked_for():
    x = normal(5, 7)
    network = nn.Sequential(linear(normal(9, 7, seed=1)), nn.ReLU(), linear(normal(4, 9, seed=2)))
    before = network[0](x).detach()
    for where, units in (("pre", before), ("post", before.clamp(min=0))):
        pairs = correlation_by_hand(units)
        measured = Correlation(where).measure(Subject(network, x))
        expected = [pairs.mean(), pairs.std(ddof=1), math.sqrt((pairs**2).mean())]
        assert np.allclose(measured.estimate, [expected], rtol=1e-12)


def test_correlation_of_images_takes_every_pixel_for_a_unit():
    units = normal(4, 2, 3, 3)
    assert np.allclose(off_diagonal(correlation_matrix(units)), correlation_by_hand(units), rtol=1e-12)


@pytest.mark.parametrize("n", [2, 5, 16])
def test_orthogonal_examples_are_white(n):
    x = orthogonal(n, 0) * torch.linspace(1, 3, n, dtype=F64)[:, None]
    measured = Whitening().measure(Subject(nn.Sequential(nn.ReLU()), x)).select(depth=0, where="pre")
    assert np.allclose(measured.estimate, [0.0, 1.0, 1.0], atol=1e-14)


@pytest.mark.parametrize("n", [2, 5, 16])
def test_identical_examples_have_one_direction(n):
    x = normal(1, 8).expand(n, 8)
    measured = Whitening().measure(Subject(nn.Sequential(nn.ReLU()), x))
    for where in ("pre", "post"):
        assert np.allclose(measured.select(depth=0, where=where).estimate, [1.0, 0.0, 1 / n], atol=1e-12)


def test_whitening_of_constant_correlation_is_in_closed_form():
    n, rho = 6, 0.5
    x = inputs_of_gram(constant_correlation(n, rho))
    measured = Whitening().measure(Subject(nn.Sequential(nn.ReLU()), x)).select(depth=0, where="pre")
    weights = np.array([1 + (n - 1) * rho] + [1 - rho] * (n - 1)) / n
    rank = np.exp(-(weights * np.log(weights)).sum()) / n
    assert np.allclose(measured.estimate, [rho, 1 - rho, rank], rtol=1e-12)


# Order and chaos.


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.3])
def test_gradients_of_a_deep_linear_network_grow_by_the_square_of_its_scale(scale):
    layers = [linear(scale * orthogonal(6, seed)) for seed in range(8)]
    subject = Subject(nn.Sequential(*layers), normal(5, 6))
    measured = GradientGrowth().measure(subject)
    assert measured.axes["layer"] == (3, 4, 5)
    assert np.allclose(measured.estimate, scale**2, rtol=1e-12)
    every = GradientGrowth(skip=0).measure(subject)
    assert every.axes["layer"] == (1, 2, 3, 4, 5, 6, 7)
    assert np.allclose(every.estimate, scale**2, rtol=1e-12)


def test_layer_l_is_the_growth_from_layer_l_plus_one_to_layer_l():
    scales = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    layers = [linear(scale * orthogonal(4, seed)) for seed, scale in enumerate(scales)]
    measured = GradientGrowth(skip=1).measure(Subject(nn.Sequential(*layers), normal(3, 4)))
    for layer in measured.axes["layer"]:
        assert measured.value(layer=layer) == pytest.approx(scales[layer] ** 2, rel=1e-12)


def test_too_few_layers_for_a_growth_are_refused():
    layers = [linear(orthogonal(4, seed)) for seed in range(5)]
    with pytest.raises(UsageError, match="model must have at least 6 linear or convolutional layers, got 5"):
        GradientGrowth().measure(Subject(nn.Sequential(*layers), normal(3, 4)))


def pooled(measure: Callable[[Subject], Measurement], subjects: Sequence[Subject]) -> Measurement:
    return pool([measure(subject) for subject in subjects])


SEEDS = range(16)
RHO = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.9, 1.0)


@pytest.fixture(scope="module")
def transitions() -> dict[str, Measurement]:
    """The measured map of one layer of sixteen plain and sixteen weight-mean networks."""
    x = correlated_inputs(4)
    return {
        method.name + str(getattr(method, "weight_mean", "")): pooled(
            TransitionOperator(RHO, 96).measure, [chain(seed, 256, 4, method, x) for seed in SEEDS]
        )
        for method in (PLAIN, WEIGHT_MEAN)
    }


@pytest.mark.parametrize("rho", RHO)
@pytest.mark.parametrize(("network", "norm"), [("none", "none"), ("mimicnormTrue", "weight_mean")])
def test_the_measured_transition_is_the_correlation_map(transitions, network, norm, rho):
    expected = float(correlation_map(norm)(rho))
    measured = transitions[network].select(rho=rho, statistic="correlation")
    if rho == 1.0:
        assert float(measured.estimate) == pytest.approx(1.0, abs=1e-12)
    else:
        assert within_four_standard_errors(measured, expected)
        assert float(measured.standard_error) < 0.01
    assert within_four_standard_errors(transitions[network], 1.0, rho=rho, statistic="variance")


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize(("network", "norm"), [("none", "weight_mean"), ("mimicnormTrue", "none")])
def test_the_other_map_is_rejected(transitions, network, norm, rho):
    other = float(correlation_map(norm)(rho))
    assert not within_four_standard_errors(transitions[network], other, rho=rho, statistic="correlation")


def test_a_transition_needs_two_activations():
    network = nn.Sequential(linear(orthogonal(4, 0)), nn.ReLU(), linear(orthogonal(4, 1)))
    with pytest.raises(UsageError, match="model must have at least 2 activation modules for a transition, got 1"):
        TransitionOperator().measure(Subject(network, normal(3, 4)))


@pytest.mark.parametrize(("method", "norm", "batch"), [(PLAIN, "none", None), (BATCH_NORM, "batch_norm", 8)])
def test_gradient_growth_is_that_of_theory(method, norm, batch):
    x = correlated_inputs(8, 0.0)
    measured = [GradientGrowth().measure(chain(seed, 256, 10, method, x)) for seed in range(10)]
    by_network = pool([replace(m, estimate=m.estimate.mean(), axes={}) for m in measured])
    assert within_four_standard_errors(by_network, gradient_growth(norm, batch))
    assert not within_four_standard_errors(by_network, gradient_growth("weight_mean"))


# Kernels.


def small_network() -> nn.Sequential:
    return nn.Sequential(
        linear(normal(5, 4, seed=1), normal(5, seed=2)),
        nn.Tanh(),
        linear(normal(6, 5, seed=3)),
        nn.Tanh(),
        linear(normal(2, 6, seed=4)),
    )


def statistics_by_hand(kernel: torch.Tensor) -> list[float]:
    m = len(kernel)
    off = [float(kernel[i, j]) for i in range(m) for j in range(m) if i != j]
    eigenvalues = torch.linalg.eigvalsh(kernel)
    return [
        float(kernel.diagonal().mean()),
        sum(off) / len(off),
        float(eigenvalues[-1] / eigenvalues[0]),
        float(eigenvalues[-1]),
    ]


def trace_over_outputs(jacobian: torch.Tensor, m: int, outputs: int) -> torch.Tensor:
    """Mean over outputs of the diagonal of J Jᵀ [m · outputs, m · outputs]."""
    blocks = (jacobian @ jacobian.T).reshape(m, outputs, m, outputs)
    return sum(blocks[:, o, :, o] for o in range(outputs)) / outputs


def test_kernel_entries_are_those_of_the_jacobian_by_hand():
    network, x = small_network(), normal(5, 4)
    jacobians = by_hand_jacobian(network, x)
    kernel = sum(trace_over_outputs(jacobian, 5, 2) for jacobian in jacobians.values())
    measured = KernelEntries(parametrization="standard").measure(Subject(network, x))
    assert measured.axes["statistic"] == ("diagonal", "off_diagonal", "condition_number", "largest")
    assert np.allclose(measured.estimate, statistics_by_hand(kernel), rtol=1e-10)
    spectrum = KernelSpectrum().measure(Subject(network, x))
    eigenvalues = torch.linalg.eigvalsh(kernel).flip(0).numpy()
    assert spectrum.axes["rank"] == (1, 2, 3, 4, 5)
    assert np.allclose(spectrum.estimate, eigenvalues / eigenvalues.mean(), rtol=1e-10)


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("parametrization", ["ntk", "standard"])
def test_projected_kernels_are_those_of_the_jacobian_by_hand(parametrization, projected):
    subject = chain(3, 7, 2, WEIGHT_MEAN, normal(5, 4))
    network = subject.network()
    first, *rest = by_hand_jacobian(network, subject.x).values()
    weights = [p.detach() for p in network.parameters()]
    jacobians = [first, *([center(j.reshape(-1, 7)).reshape(j.shape) for j in rest] if projected else rest)]
    scales = [1.0] * 3
    if parametrization == "ntk":
        scales = [float((w**2).mean()) * (1.0 if i == 0 else 7 / 6) for i, w in enumerate(weights)]
    kernel = sum(scale * j @ j.T for scale, j in zip(scales, jacobians, strict=True))
    measured = KernelEntries(parametrization=parametrization, projected=projected).measure(subject)
    assert np.allclose(measured.estimate, statistics_by_hand(kernel), rtol=1e-10)
    other = KernelEntries(parametrization=parametrization, projected=not projected).measure(subject)
    assert not np.allclose(other.estimate, measured.estimate, rtol=1e-2)


def test_the_nngp_is_the_second_moment_of_the_outputs():
    network, x = small_network(), normal(5, 4)
    network = nn.Sequential(*network[:4], linear(normal(11, 6, seed=4)))
    outputs = network(x).detach()
    measured = KernelEntries(kind="nngp").measure(Subject(network, x))
    assert np.allclose(measured.estimate, statistics_by_hand(outputs @ outputs.T / 11), rtol=1e-9)


@pytest.mark.parametrize(
    ("method", "norm"), [(PLAIN, "none"), (WEIGHT_MEAN, "weight_mean"), (BATCH_NORM, "batch_norm")]
)
def test_the_kernel_of_wide_networks_is_the_analytic_one(method, norm):
    m, depth = 8, 2
    x = correlated_inputs(m)
    measured = pooled(KernelEntries().measure, [chain(seed, 256, depth, method, x) for seed in SEEDS])
    gram = constant_correlation(m, 0.5).numpy()
    he = 2.0 if norm == "batch_norm" else None  # theory takes 1 where BatchNorm cancels it; the last layer has He's 2
    kernel = propagate(gram, depth, norm, sigma_w2=he).ntk
    off = (kernel.sum() - np.trace(kernel)) / (m * (m - 1))
    assert within_four_standard_errors(measured, kernel[0, 0], statistic="diagonal")
    assert within_four_standard_errors(measured, off, statistic="off_diagonal")
    if norm == "weight_mean":
        raw = propagate(gram, depth, norm, projected=False).ntk
        assert not within_four_standard_errors(measured, raw[0, 0], statistic="diagonal")
        unprojected = pooled(
            KernelEntries(projected=False).measure, [chain(seed, 256, depth, method, x) for seed in SEEDS]
        )
        assert within_four_standard_errors(unprojected, raw[0, 0], statistic="diagonal")


def test_multipliers_are_the_variances_of_the_weights():
    n = 500
    network = nn.Sequential(
        linear(3.0 * normal(400, n), torch.zeros(400, dtype=F64)),
        nn.BatchNorm1d(400, dtype=F64),
        linear(center(2.0 * normal(400, 400, seed=1))),
    )
    multipliers = ntk_multipliers(network, {"2.weight": center})
    assert set(multipliers) == {"0.weight", "2.weight"}, "biases and affine parameters have none"
    # The second moment of N Gaussian entries of variance v has the standard error v √(2/N).
    assert abs(multipliers["0.weight"] - 9.0) < 4 * 9.0 * math.sqrt(2 / (400 * n))
    assert abs(multipliers["2.weight"] - 4.0) < 4 * 4.0 * math.sqrt(2 / (400 * 399))
    uncorrected = ntk_multipliers(network, {})["2.weight"]
    assert multipliers["2.weight"] == pytest.approx(uncorrected * 400 / 399, rel=1e-12)


@pytest.mark.parametrize(("p", "o"), [(1.0, 0.5), (1.0, 0.0), (2.0, -0.3), (1.0, 0.99)])
def test_the_exchangeable_condition_number_is_that_of_its_matrix(p, o):
    matrix = (p - o) * np.eye(5) + o
    assert exchangeable_condition_number(p, o, 5) == pytest.approx(np.linalg.cond(matrix), rel=1e-10)


# The last BatchNorm.


def digits_subject(method: mimicnorm.Method, *, width: int = 12, depth: int = 3, n: int = 16) -> Subject:
    x, y = digits_vectors(dtype=F64)
    return chain(2, width, depth, method, x[:n], y=y[:n], outputs=10)


@pytest.mark.parametrize("steps", [0, 3])
def test_gradients_of_a_bias_free_chain_are_orthogonal_to_their_weights(steps):
    measured = ScaleInvariance(steps=steps).measure(digits_subject(MIMICNORM))
    assert measured.axes["layer"] == (1, 2, 3, 4)
    assert np.abs(measured.estimate).max() < 1e-12


def test_without_the_last_batch_norm_they_are_not():
    measured = ScaleInvariance(steps=0).measure(digits_subject(replace(MIMICNORM, last_batch_norm=False)))
    assert np.abs(measured.estimate).min() > 1e-3


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_what_epsilon_breaks_of_the_invariance_is_exact(eps):
    """Scaling any layer scales the logits f, and dz/dlog α = z · ε/(σ² + ε) for z = (f − μ)/√(σ² + ε)."""
    subject = digits_subject(replace(MIMICNORM, eps=eps))
    network = subject.network()
    name = last_batch_norm(network)
    logits = without_last_batch_norm(network)(subject.x)
    variance = logits.var(dim=0, correction=0)
    z = ((logits - logits.mean(dim=0)) / (variance + eps).sqrt()).detach().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(z, subject.y), z)
    inner = float(((z * slope).sum(dim=0) @ (eps / (variance + eps))).detach())
    nn.functional.cross_entropy(network(subject.x), subject.y).backward()
    expected = [inner / float(p.detach().norm() * p.grad.norm()) for p in network.parameters()]
    measured = ScaleInvariance(steps=0).measure(subject)
    assert np.allclose(measured.estimate, expected, rtol=1e-7)
    assert np.abs(measured.estimate).min() > 1e-9, f"{name} must break the invariance"


def test_scale_invariance_needs_labels():
    with pytest.raises(
        UsageError, match="y must be given to take the gradient of a loss, got None; pass class indices"
    ):
        ScaleInvariance().measure(replace(digits_subject(MIMICNORM), y=None))


def jacobian_of_batch_norm(f: torch.Tensor, eps: float) -> torch.Tensor:
    """∂z/∂f [m, m] of z = (f − μ)/s, s = √(σ² + ε): (I − 11ᵀ/m − zzᵀ/m)/s."""
    m = len(f)
    s = (f.var(correction=0) + eps).sqrt()
    z = (f - f.mean()) / s
    return (torch.eye(m, dtype=F64) - 1 / m - torch.outer(z, z) / m) / s


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("depth", [1, 4])
def test_sharpness_is_that_of_the_kernel_seen_through_batch_norm(depth, outputs, eps):
    m = 6
    method = mimicnorm.MimicNorm(linear=True, bias=False, eps=eps)
    subject = chain(1, 10, depth, method, normal(m, 5), outputs=outputs)
    plain = without_last_batch_norm(subject.network())
    rows = by_hand_jacobian(plain, subject.x)
    for name, weight in list(plain.named_parameters())[1:]:  # All but the first are trained with rows of mean zero.
        by_row = rows[name].reshape(-1, *weight.shape)
        rows[name] = (by_row - by_row.mean(dim=2, keepdim=True)).flatten(1)
    jacobian = torch.cat(list(rows.values()), dim=1)
    kernel = jacobian @ jacobian.T
    seen_through = torch.zeros(m, outputs, m, outputs, dtype=F64)
    logits = plain(subject.x).detach()
    for output in range(outputs):
        seen_through[:, output, :, output] = jacobian_of_batch_norm(logits[:, output], eps)
    through = seen_through.reshape(m * outputs, m * outputs)
    largest = [float(torch.linalg.eigvalsh(k)[-1]) for k in (through @ kernel @ through.T, kernel)]
    measured = Sharpness().measure(subject).value()
    assert 10**measured == pytest.approx(largest[0] / largest[1], rel=1e-8)


def test_statistics_taken_for_constants_would_give_another_sharpness():
    subject = chain(1, 10, 1, MIMICNORM, normal(6, 5))
    plain = without_last_batch_norm(subject.network())
    sigma = plain(subject.x).std(correction=0)
    assert 10 ** Sharpness().measure(subject).value() != pytest.approx(float(1 / sigma.detach() ** 2), rel=1e-2)


def test_sharpness_needs_a_last_batch_norm():
    with pytest.raises(UsageError, match="model must end in a BatchNorm behind its last linear layer; convert it"):
        Sharpness().measure(chain(0, 8, 2, BATCH_NORM, normal(6, 5)))


def test_taking_the_last_batch_norm_out_leaves_the_network_as_it_is():
    network = digits_subject(MIMICNORM).network()
    x = digits_subject(MIMICNORM).x
    name = last_batch_norm(network)
    bare = without_last_batch_norm(network)
    assert isinstance(network.get_submodule(name), nn.modules.batchnorm._BatchNorm)
    f = bare(x)
    assert torch.allclose((f - f.mean(dim=0)) / f.std(dim=0, correction=0), network(x), rtol=1e-9, atol=1e-9)


# Learning rates.


def test_the_critical_rate_separates_decay_from_growth_exactly():
    """On a linear model the residual of gradient descent is (1 − ηΘ)ᵗ r₀ with Θ = XXᵀ."""
    m, steps = 6, 25
    x = normal(m, 9)
    network = nn.Sequential(linear(normal(1, 9, seed=1)))
    multiples = (0.25, 0.9, 0.999, 1.001, 1.1)
    subject = Subject(network, x, seed=4)
    measured = RateStability(multiples, steps).measure(subject)
    target = torch.randn(m, 1, generator=subject.generator(3), dtype=F64)
    target = (target - target.mean()) / target.std(correction=0)
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T)
    start = vectors.T @ (network(x) - target).detach()
    for multiple in multiples:
        rate = multiple * 2 / eigenvalues[-1]
        end = ((1 - rate * eigenvalues) ** steps)[:, None] * start
        expected = math.log10(float(end.square().sum() / start.square().sum()))
        assert measured.value(multiple=multiple, statistic="loss") == pytest.approx(expected, abs=1e-8)
        solution = network[0].weight.detach().T + x.T @ vectors @ ((end - start) / eigenvalues[:, None])
        growth = math.log10(float(solution.norm() / network[0].weight.detach().norm()))
        assert measured.value(multiple=multiple, statistic="norm") == pytest.approx(growth, abs=1e-8)


def test_along_the_sharpest_direction_the_critical_rate_is_the_boundary():
    x = torch.ones(5, 1, dtype=F64) * torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    measured = RateStability((0.99, 1.01, 1.5), 400).measure(Subject(nn.Sequential(linear(normal(1, 1))), x))
    fitted = [measured.value(multiple=multiple, statistic="loss") for multiple in (0.99, 1.01, 1.5)]
    assert fitted[0] < 0 < fitted[1]
    assert fitted[2] == RateStability.DIVERGED


def test_a_descent_that_overflows_is_recorded_as_diverged():
    subject = chain(0, 16, 3, PLAIN, correlated_inputs(6))
    measured = RateStability((1e12,), 20).measure(subject)
    assert measured.value(multiple=1e12, statistic="loss") == RateStability.DIVERGED
    assert np.isfinite(measured.estimate).all()


def separable() -> Subject:
    """Three classes far apart, forty examples each."""
    y = torch.arange(120) % 3
    x = 10.0 * torch.eye(3)[y] + 0.1 * torch.randn(120, 3, generator=generator())
    model = mimicnorm.models.fcnn(3, 16, 1, 3, generator=generator())
    return Subject(model, x, y, mimicnorm.NoNorm(), seed=1)


def test_a_separable_problem_is_learned_at_a_good_rate_and_at_no_absurd_one():
    probe = LearningRateRange(rates=(1e-12, 0.01, 1e6), epochs=5, batch_size=15, weight_decay=0.0)
    measured = probe.measure(separable())
    assert measured.axes == {"rate": (1e-12, 0.01, 1e6)}
    untrained = separable().network()
    with torch.no_grad():
        right = (untrained(separable().x[90:]).argmax(dim=1) == separable().y[90:]).double().mean()
    assert measured.value(rate=1e-12) == pytest.approx(100 * float(right))
    assert measured.value(rate=0.01) == 100.0
    assert measured.value(rate=1e6) < 50.0


def test_the_examples_that_test_are_not_trained_on():
    """With the labels of the last quarter rotated, what is learned from the rest is wrong on all of it."""
    subject = separable()
    rotated = torch.cat([subject.y[:90], (subject.y[90:] + 1) % 3])
    probe = LearningRateRange(rates=(0.01,), epochs=5, batch_size=15)
    assert probe.measure(replace(subject, y=rotated)).value(rate=0.01) < 100 / 3


def test_a_range_of_rates_needs_labels():
    with pytest.raises(UsageError, match="y must be given to train, got None; pass class indices"):
        LearningRateRange().measure(replace(separable(), y=None))


# Memory.


def chain_of(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def test_bytes_of_a_chain_by_hand():
    n, w = 10, 7
    x = torch.zeros(n, 5)
    network = chain_of(nn.Linear(5, w), nn.ReLU(), nn.Linear(w, 3))
    # The ReLU keeps its output, which is the second Linear's input; the first Linear keeps x, which is there anyway.
    assert saved_bytes(network, x) == n * w * 4
    assert saved_bytes(network.double(), x.double()) == n * w * 8


def test_bytes_of_batch_norm_by_hand():
    n, w = 10, 7
    x = torch.randn(n, 5, generator=generator())
    network = chain_of(nn.Linear(5, w), nn.BatchNorm1d(w), nn.ReLU(), nn.Linear(w, 3))
    # Besides the ReLU's output, BatchNorm keeps its input and, per unit, the mean and the inverse deviation.
    assert saved_bytes(network, x) == 2 * n * w * 4 + 2 * w * 4
    assert saved_bytes(network.eval(), x) < 2 * n * w * 4 + 2 * w * 4


def test_bytes_of_a_max_pool_are_its_input_and_its_indices():
    x = torch.randn(2, 3, 8, 8, generator=generator())
    network = chain_of(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2))
    assert saved_bytes(network, x) == 2 * 4 * 64 * 4 + 2 * 4 * 16 * 8


class Squared(nn.Module):
    """Multiplies each of its inputs' views by itself: one storage, saved many times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * x).sum() + (x.T * x.T).sum() + (x[:2] * x[:2]).sum()


def test_a_storage_that_is_saved_often_counts_once():
    x = torch.randn(6, 5, generator=generator())
    network = chain_of(nn.Linear(5, 4), Squared())
    assert saved_bytes(network, x) == 6 * 4 * 4
    handed_over: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: handed_over.append(t.numel() * 4) or t, lambda t: t):
        network(x)
    assert sum(handed_over) > 2 * 6 * 4 * 4, "a sum over what autograd saves must count it several times"


class Chained(nn.Module):
    """Applies exp, whose output is saved, often enough that freed memory would be used again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = torch.exp(-x)
        return x


def test_storages_that_live_at_the_same_time_are_not_taken_for_one():
    x = torch.randn(50, 5, generator=generator())
    assert saved_bytes(chain_of(nn.Linear(5, 4), Chained()), x) == 20 * 50 * 4 * 4


def test_counting_leaves_the_network_as_it_was():
    network = chain_of(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    saved_bytes(network, torch.randn(10, 5, generator=generator()))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_memory_is_per_example_in_train_mode():
    network = chain_of(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).eval()
    measured = ActivationMemory().measure(Subject(network, torch.randn(10, 5, generator=generator())))
    assert measured.unit == "MiB"
    assert measured.value() == pytest.approx((2 * 10 * 7 * 4 + 2 * 7 * 4) / 10 / 2**20, rel=1e-12)


# Projections.


@pytest.mark.parametrize(("optimizer", "equal"), [("sgd", True), ("momentum", True), ("adam", False)])
def test_projecting_after_the_step_or_in_the_forward_pass_is_the_same_for_sgd_and_not_for_adam(optimizer, equal):
    subject = digits_subject(WEIGHT_MEAN)
    measured = ProjectionEquivalence(optimizer).measure(subject).value()
    assert (measured <= -12.0) if equal else (measured > -3.0)


@pytest.mark.parametrize("changes", [{"method": None}, {"method": PLAIN}, {"y": None}])
def test_the_equivalence_is_about_projected_weights(changes):
    with pytest.raises(
        UsageError, match="subject must have labels and a method that projects weights; use method='mim"
    ):
        ProjectionEquivalence().measure(replace(digits_subject(WEIGHT_MEAN), **changes))


@pytest.mark.parametrize(
    "probe", [RateStability(multiples=(0.5,), steps=3), ScaleInvariance(steps=3)], ids=lambda probe: probe.name
)
def test_probes_that_train_keep_the_weight_mean(probe, monkeypatch):
    networks = []
    attach = Subject.attach

    def watched(self, network, optimizer):
        networks.append(network)
        attach(self, network, optimizer)

    subject = digits_subject(MIMICNORM)
    monkeypatch.setattr(Subject, "attach", watched)
    probe.measure(subject)
    assert networks
    for network in networks:
        for weight in list(network.parameters())[1:]:
            assert float(weight.detach().mean(dim=1).abs().max()) < 1e-15

    networks.clear()
    monkeypatch.setattr(Subject, "attach", lambda self, network, optimizer: networks.append(network))
    probe.measure(subject)
    assert max(float(w.detach().mean(dim=1).abs().max()) for n in networks for w in list(n.parameters())[1:]) > 1e-12
