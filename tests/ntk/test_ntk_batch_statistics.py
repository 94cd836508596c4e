"""Whose statistics BatchNorm layers use, against networks that write them out."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntk
from ntk import errors
from ntk.analytic import propagate
from tests.ntk import modules
from tests.ntk.networks import dense
from tests.ntk.oracle import jacobian, kernel, least_memory, mlp
from tests.ntk.test_ntk_refusals import refused

SIZES = {"as many": 5, "twice as many": 10, "prime": 7, "two": 2}
"""Examples in the reference batch, against 5 and 3 that the kernel is of."""

IMPLEMENTATIONS = ("structured", "jacobian_contraction", "ntk_vector_products")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolutional() -> nn.Module:
    """BatchNorm over positions and over examples only, with and without gain, and behind an in-place activation."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3, momentum=None),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.SyncBatchNorm(6),
        nn.Tanh(),
        nn.Linear(6, 2),
    )


class Called(nn.Module):
    """One BatchNorm, and one weight, called twice, with a weight that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.norm(self.inner(x) * self.scale.exp().T))
        return self.head(x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (convolutional, (2, 5, 5)),
    "called twice": (Called, (4,)),
}


def build(name: str, mode: str = "train") -> tuple[nn.Module, Callable[..., Tensor]]:
    """Network with gains and shifts off their initial values, and a source of batches."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    if mode == "mixed":
        next(module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)).eval()
    return model, lambda n, seed=0: normal(n, *shape, seed=seed)


class Written(nn.Module):
    """Runs a network on reference and examples at once, its BatchNorm written out; returns the examples' outputs."""

    def __init__(self, model: nn.Module, size: int, *, constant: bool) -> None:
        super().__init__()
        self.model, self.size, self.constant = model, size, constant

    def forward(self, both: Tensor) -> Tensor:
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        own = [norm.forward for norm in norms]
        try:
            for norm in norms:
                norm.forward = lambda value, norm=norm: self.normalized(norm, value)
            return self.model(both)[self.size :]
        finally:
            for norm, forward in zip(norms, own, strict=True):
                norm.forward = forward

    def normalized(self, norm: nn.Module, value: Tensor) -> Tensor:
        batch = value[: self.size].transpose(0, 1).flatten(1)
        mean = batch.sum(1) / batch.shape[1]
        variance = ((batch - mean[:, None]) ** 2).sum(1) / batch.shape[1]
        if self.constant:
            mean, variance = mean.detach(), variance.detach()
        shape = (1, -1) + (1,) * (value.ndim - 2)
        value = (value - mean.view(shape)) / (variance + norm.eps).sqrt().view(shape)
        return value if norm.weight is None else value * norm.weight.view(shape) + norm.bias.view(shape)


def written(model: nn.Module, source: Tensor, x: Tensor, *, constant: bool) -> dict[str, Tensor]:
    """Jacobian [n, o, ...] of the examples under the statistics of the source."""
    network = Written(model, len(source), constant=constant)
    names, parameters = zip(*model.named_parameters(), strict=True)
    output = network(torch.cat([source, x]))
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for entry in output.flatten()
    ]
    stacked = [torch.stack(part) for part in zip(*rows, strict=True)]
    return {name: part.reshape(*output.shape, *part.shape[1:]) for name, part in zip(names, stacked, strict=True)}


def error(values: np.ndarray | Tensor, expected: np.ndarray | Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(np.asarray(values) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("choice", ["reference", "frozen_reference"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", NETWORKS)
def test_reference_batch(name: str, size: int, choice: str, implementation: str) -> None:
    model, batch = build(name)
    x1, x2, reference = batch(5, 1), batch(3, 2), batch(size, 3)
    jacobians = [written(model, reference, x, constant=choice == "frozen_reference") for x in (x1, x2)]
    options = {"batch_statistics": choice, "reference": reference, "implementation": implementation}
    cross, gram = ntk.empirical_ntk(model, x1, x2, **options), ntk.empirical_ntk(model, x1, **options)
    assert error(cross.values, kernel(*jacobians)) < 1e-10
    assert error(gram.values, kernel(jacobians[0], jacobians[0])) < 1e-10
    how = "constant" if choice == "frozen_reference" else "differentiated"
    assert cross.statistics == gram.statistics == f"{how}, reference batch of {size}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_frozen(name: str, implementation: str) -> None:
    model, batch = build(name)
    x1, x2 = batch(5, 1), batch(3, 2)
    jacobians = [written(model, x, x, constant=True) for x in (x1, x2)]
    options = {"batch_statistics": "frozen", "implementation": implementation}
    cross, gram = ntk.empirical_ntk(model, x1, x2, **options), ntk.empirical_ntk(model, x1, **options)
    assert error(cross.values, kernel(*jacobians)) < 1e-10
    assert error(gram.values, kernel(jacobians[0], jacobians[0])) < 1e-10
    assert (cross.statistics, gram.statistics) == ("constant, two batches", "constant, one batch")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_oracle_and_the_choices_differ(name: str) -> None:
    """Negative control; and the batch as its own reference has the kernel of the batch."""
    model, batch = build(name)
    x, other = batch(5, 1), batch(5, 3)
    own = kernel(jacobian(model, x), jacobian(model, x))
    through = written(model, x, x, constant=False)
    assert error(own, kernel(through, through)) < 1e-10
    values = [
        ntk.empirical_ntk(model, x, **options).values
        for options in (
            {},
            {"batch_statistics": "frozen"},
            {"batch_statistics": "reference", "reference": other},
            {"batch_statistics": "frozen_reference", "reference": other},
        )
    ]
    assert error(ntk.empirical_ntk(model, x, batch_statistics="reference", reference=x).values, own) < 1e-10
    for i, one in enumerate(values):
        for two in values[:i]:
            assert error(one, two) > 1e-2


@pytest.mark.parametrize("choice", ["reference", "frozen_reference"])
def test_one_kernel_function_of_two_points(choice: str) -> None:
    """Blocks of x1, x2 and both agree, so that the Gram matrix over both is positive semi-definite."""
    model, batch = build("convolutional")
    both, options = batch(6, 1), {"batch_statistics": choice, "reference": batch(8, 3)}
    whole = ntk.empirical_ntk(model, both, **options)
    block = ntk.empirical_ntk(model, both[:1], both[1:], **options)
    assert error(whole.values[:1, 1:], block.values) < 1e-10
    eigenvalues = np.linalg.eigvalsh(whole.flatten())
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()
    apart = ntk.empirical_ntk(model, both[:3], both[3:]).values  # negative control: two batches
    assert error(ntk.empirical_ntk(model, both).values[:3, 3:], apart) > 1e-2


@pytest.mark.parametrize("reduce", ["trace", "sum"])
def test_reductions_layers_projection_and_memory(reduce: str) -> None:
    model, batch = build("convolutional")
    x, reference = batch(5, 1), batch(4, 3)
    rows = written(model, reference, x, constant=False)
    for name in ("0.weight", "3.weight", "6.weight", "9.weight"):
        rows[name] = rows[name] - rows[name].mean(tuple(range(3, rows[name].ndim)), keepdim=True)
    full = kernel(rows, rows)
    expected = full.diagonal(dim1=2, dim2=3).mean(-1) if reduce == "trace" else full.sum((2, 3))
    options = {"batch_statistics": "reference", "reference": reference, "projection": ntk.center_rows, "reduce": reduce}
    assert error(ntk.empirical_ntk(model, x, **options).values, expected) < 1e-10
    compute = partial(ntk.empirical_ntk, model, x, **options)
    assert error(compute(max_memory=least_memory(compute)).values, expected) < 1e-10
    shares = ntk.layerwise_ntk(model, x, **options)
    assert list(shares) == ["0", "1", "3", "6", "7", "9"]
    assert error(sum(share.values for share in shares.values()), expected) < 1e-10


@pytest.mark.parametrize("choice", ["frozen", "reference", "frozen_reference"])
def test_float32(choice: str) -> None:
    model, batch = build("convolutional")
    x, options = batch(5, 1), {"batch_statistics": choice}
    if choice != "frozen":
        options["reference"] = batch(6, 3)
    exact = ntk.empirical_ntk(model, x, **options)
    single = ntk.empirical_ntk(model, x, dtype=torch.float32, **options)
    assert single.dtype == np.float32
    assert error(single.values, exact.values) < 1e-4


@pytest.mark.parametrize("choice", ["frozen", "reference", "frozen_reference"])
def test_layers_in_eval_mode_keep_their_running_statistics(choice: str) -> None:
    model, batch = build("convolutional", "mixed")
    x, reference = batch(5, 1), batch(6, 3)
    options = {"batch_statistics": choice} | ({} if choice == "frozen" else {"reference": reference})
    rows = written(model, x if choice == "frozen" else reference, x, constant="frozen" in choice)
    mixed = ntk.empirical_ntk(model, x, **options)
    assert error(mixed.values, kernel(rows, rows)) < 1e-10
    assert mixed.mode == "mixed"
    assert mixed.statistics.endswith("running in some layers")
    model[4].track_running_stats, model[4].running_mean, model[4].running_var = True, torch.zeros(4), torch.ones(4)
    model.double().eval()  # nothing to exchange
    still = ntk.empirical_ntk(model, x, **options)
    assert (still.mode, still.statistics) == ("eval", "running")
    assert error(still.values, kernel(jacobian(model, x), jacobian(model, x))) < 1e-10


@pytest.mark.parametrize("choice", ["frozen", "reference", "frozen_reference"])
def test_operator_and_linearized_model(choice: str) -> None:
    model, batch = build("called twice")
    x, options = batch(5, 1), {"batch_statistics": choice}
    if choice != "frozen":
        options["reference"] = batch(6, 3)
    exact = ntk.empirical_ntk(model, x, **options)
    operator = ntk.NtkOperator(model, x, **options)
    assert operator.statistics == exact.statistics
    assert error(operator @ np.eye(10), exact.flatten()) < 1e-10
    other = batch(4, 2)
    cross, between = ntk.empirical_ntk(model, x, other, **options), ntk.NtkOperator(model, x, other, **options)
    assert between.statistics == cross.statistics
    assert error(between @ np.eye(8), cross.flatten()) < 1e-10
    assert error(between.T @ np.eye(10), cross.flatten().T) < 1e-10
    linear = ntk.linearize(model, **options)
    rows = jacobian(linear, x)
    assert error(exact.values, kernel(rows, rows)) < 1e-10
    linear.values[0].data.add_(0.1)  # linear in its weights, so that the kernel stays
    moved = jacobian(linear, x)
    assert error(exact.values, kernel(moved, moved)) < 1e-10


@pytest.mark.parametrize("choice", ["reference", "frozen_reference"])
def test_the_reference_batch_is_that_of_the_moment_of_construction(choice: str) -> None:
    model, batch = build("called twice")
    x, reference = batch(5, 1), batch(6, 3)
    options = {"batch_statistics": choice, "reference": reference}
    operator, linear = ntk.NtkOperator(model, x, **options), ntk.linearize(model, **options)
    tracker = ntk.NtkTracker(model, x, **options)
    before, output = operator @ np.eye(10), linear(x)
    tracker.record(0)
    reference.add_(1)
    assert error(ntk.NtkOperator(model, x, **options) @ np.eye(10), before) > 1e-3
    assert np.array_equal(operator @ np.eye(10), before)
    assert torch.equal(linear(x), output)
    tracker.record(1)
    assert tracker.result.relative_change[1] == 0
    assert operator.statistics in tracker.result.source


WIDTH, SEEDS = 1024, range(12)
"""Monte Carlo, fixed beforehand."""


@pytest.mark.parametrize(("choice", "statistics"), [("reference", "differentiated"), ("frozen_reference", "constant")])
def test_against_points_beyond_the_batch(choice: str, statistics: str) -> None:
    """docs/mathematics.md §5.3: the infinitely wide network, batch of 8 and 3 points that borrow its statistics."""
    points = normal(11, 12)
    analytic = propagate((points @ points.T / 12).numpy(), 1, "batch_norm", n_statistics=8, statistics=statistics)
    other = propagate(
        (points @ points.T / 12).numpy(),
        1,
        "batch_norm",
        n_statistics=8,
        statistics="constant" if statistics == "differentiated" else "differentiated",
    )
    drawn = []
    for seed in SEEDS:
        net = dense("batch_norm", 1, 12, width=WIDTH, seed=seed, dtype=torch.float64)
        measured = ntk.empirical_ntk(
            net.model, points[8:], params=net.multipliers, reduce="sum", batch_statistics=choice, reference=points[:8]
        )
        drawn.append(measured.values)
    mean, standard_error = np.mean(drawn, 0), np.std(drawn, 0, ddof=1) / np.sqrt(len(SEEDS))
    assert (np.abs(mean - analytic.ntk[8:, 8:]) <= 4 * standard_error).all()
    assert not (np.abs(mean - other.ntk[8:, 8:]) <= 4 * standard_error).all()  # negative control


class Own(nn.Module):
    """Keeps running statistics, and normalizes by arithmetic of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Ghost(nn.Module):
    """Normalizes by pairs of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.split(2)])


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Own, ("module '1' (Own)", "without torch.nn.functional.batch_norm", "batch_statistics='batch'")),
        (Centred, ("kernel of two examples", "on x1 changes", "batch_statistics='batch'")),
        (Ghost, ("normalizes otherwise on x1", "calls of batch_norm", "batch_statistics='batch'")),
    ],
)
@pytest.mark.parametrize("choice", ["reference", "frozen_reference"])
def test_statistics_that_cannot_be_exchanged(choice: str, layer: type[nn.Module], words: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(mlp(), layer()).double(), normal(6, 4)
    with refused(errors.StatisticsError, *words):
        ntk.empirical_ntk(model, x, batch_statistics=choice, reference=normal(8, 4, seed=1))
    assert error(ntk.empirical_ntk(model, x).values, kernel(jacobian(model, x), jacobian(model, x))) < 1e-10


class Functional(nn.Module):
    """Standardizes its weight by `batch_norm` with one leading row, as weight standardization is written."""

    def __init__(self, call: Callable) -> None:
        super().__init__()
        self.weight, self.call = nn.Parameter(torch.randn(3, 4)), call

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight[None], None, None, training=True).squeeze(0)
        return self.call(x @ weight.T)


@pytest.mark.parametrize(
    "call",
    [
        lambda y: F.batch_norm(y, None, None, training=True),
        lambda y: torch.batch_norm(y, None, None, None, None, True, 0.1, 1e-5, False),
    ],
    ids=["torch.nn.functional", "torch"],
)
def test_calls_outside_of_modules(call: Callable) -> None:
    torch.manual_seed(0)
    model, x, reference = Functional(call).double(), normal(4, 4), normal(6, 4, seed=1)

    def explicit(y: Tensor) -> Tensor:
        mean, variance = y[:6].mean(0), y[:6].var(0, correction=0)
        return (y[6:] - mean) / (variance + 1e-5).sqrt()

    oracle = Functional(explicit).double()
    oracle.weight = model.weight
    gradients = [
        torch.autograd.grad(entry, model.weight, retain_graph=True)[0]
        for entry in oracle(torch.cat([reference, x])).flatten()
    ]
    rows = {"weight": torch.stack(gradients).reshape(4, 3, 3, 4)}
    found = ntk.empirical_ntk(model, x, batch_statistics="reference", reference=reference)
    assert error(found.values, kernel(rows, rows)) < 1e-10


def test_arguments_that_do_not_fit() -> None:
    model, batch = build("called twice")
    x = batch(5)
    with refused(errors.UnknownNameError, "batch_statistics", "'reference'", "received 'refrence'", "Nearest"):
        ntk.empirical_ntk(model, x, batch_statistics="refrence")
    with refused(ValueError, "batch_statistics='reference'", "needs a batch [B, ...]", "reference=x"):
        ntk.empirical_ntk(model, x, batch_statistics="reference")
    with refused(ValueError, "batch_statistics='frozen'", "has no use for reference=", "Give both"):
        ntk.layerwise_ntk(model, x, batch_statistics="frozen", reference=x)
    with refused(errors.InputMismatchError, "x1 and reference", "shape of one example", "(4,)", "(3,)"):
        ntk.empirical_ntk(model, x, batch_statistics="reference", reference=x[:, :3])
    with refused(errors.BatchOfOneError, "at least 2", "'norm'", "got 1"):
        ntk.NtkOperator(model, x, batch_statistics="reference", reference=x[:1])
    with refused(errors.BatchOfOneError, "got 1"):
        ntk.empirical_ntk(model, x[:1], batch_statistics="frozen")


def test_kernels_of_different_statistics_do_not_add() -> None:
    model, batch = build("called twice")
    x = batch(5)
    frozen = ntk.empirical_ntk(model, x, batch_statistics="frozen")
    with refused(errors.ConventionError, "statistics differ", "constant, one batch", "differentiated, one batch"):
        frozen + ntk.empirical_ntk(model, x)


def test_a_model_that_differentiates_does_not_lose_what_its_output_passes_by() -> None:
    """Its calls are reached by their derivatives alone; without batch normalization no statistics enter."""
    model, x, reference = modules.build("input gradient")
    plain = ntk.empirical_ntk(model, x)
    result = ntk.empirical_ntk(model, x, batch_statistics="reference", reference=reference)
    np.testing.assert_allclose(result.values, plain.values, rtol=0, atol=1e-12)
