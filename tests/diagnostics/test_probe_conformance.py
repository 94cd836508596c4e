"""What every probe must keep to, held against every probe of the registry, and against probes that break it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass, field, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import diagnostics.probes
import mimicnorm
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement
from diagnostics.probes import PROBES, LearningRateRange, Probe, RateStability
from diagnostics.subject import Subject

SMALL: dict[str, Probe] = {
    **PROBES,
    "learning_rate": LearningRateRange(rates=(0.02, 0.2), epochs=2, batch_size=4),
    "rate_stability": RateStability(multiples=(0.5, 3.0), steps=8),
}
"""The registry, with fewer steps where a probe trains."""

METHODS: dict[str, mimicnorm.Method | None] = {
    "as it stands": None,
    "none": mimicnorm.NoNorm(),
    "weight mean": mimicnorm.MimicNorm(linear=True, last_batch_norm=False),
    "MimicNorm": mimicnorm.MimicNorm(linear=True),
    "BatchNorm": mimicnorm.BatchNorm(),
}

NEEDS = {
    "sharpness": ("MimicNorm",),
    "weight_projection": ("weight mean", "MimicNorm"),
}
"""Methods under which a probe has something to look at, where that is not all of them."""

ORDER_MATTERS = {
    "gradient_growth": "the cotangent of each example is drawn by its position",
    "rate_stability": "the target of each example is drawn by its position",
    "learning_rate": "the first examples train and the last ones test",
}
"""Probes whose estimate depends on the order of the examples, and why."""

COARSE = {
    "memory": "bytes do not depend on the weights",
    "learning_rate": "the accuracy on six examples takes seven values",
    "weight_projection": "a rounding error is a multiple of the last bit",
}
"""Probes for which two networks may well agree, and why."""


class Watched(Subject):
    """A subject that remembers the networks it gave away."""

    def network(self) -> nn.Module:
        given = super().network()
        self.__dict__.setdefault("given", []).append(given)
        return given


def model(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A network in its BatchNorm form with gradients and running statistics of its own, and inputs for it."""
    draw = torch.Generator().manual_seed(11)
    if kind == "fcnn":
        network: nn.Module = mimicnorm.models.fcnn(6, 12, 6, 3, generator=draw)
        x = torch.randn(24, 6, generator=draw, dtype=torch.float64)
    else:
        widths = (3, 4, 4, 4, 4, 4, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            blocks: list[nn.Module] = []
            for before, after in pairwise(widths):
                conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
                blocks += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))
        x = torch.randn(24, 3, 5, 5, generator=draw, dtype=torch.float64)
    network = network.double()
    network(x).square().sum().backward()
    network.get_parameter(next(name for name, _ in network.named_parameters() if name.endswith("bias"))).grad = None
    network.get_submodule(next(name for name, m in network.named_modules() if isinstance(m, nn.ReLU))).eval()
    return network, x


def subject(kind: str, method: str, *, order: torch.Tensor | None = None) -> Watched:
    network, x = model(kind)
    y = torch.arange(len(x)) % 3
    taken = torch.arange(len(x)) if order is None else order
    return Watched(network, x[taken], y[taken], METHODS[method], seed=5, name=f"{kind} {method}")


def state(network: nn.Module) -> dict[str, Any]:
    """Everything about a network that a probe could change, in comparable form."""
    return {
        "values": [(name, value.numpy().tobytes()) for name, value in network.state_dict().items()],
        "train flags": [(name, m.training) for name, m in network.named_modules()],
        "gradients": [
            (name, None if p.grad is None else p.grad.numpy().tobytes()) for name, p in network.named_parameters()
        ],
        "requires_grad": [(name, p.requires_grad) for name, p in network.named_parameters()],
        "modules": [(name, id(m)) for name, m in network.named_modules()],
        "parameters": [(name, id(p)) for name, p in network.named_parameters()],
    }


def hook_count(network: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in network.modules() for kind in kinds)


def global_state() -> dict[str, Any]:
    mersenne = np.random.get_bit_generator().state["state"]
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (mersenne["key"].tobytes(), mersenne["pos"]),
        "python": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def elsewhere() -> Generator[None]:
    """Puts torch's global generator somewhere else, and back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.Random(0).getrandbits(60))
        torch.rand(7)
        yield


@dataclass(frozen=True, eq=False)
class Observation:
    """One probe on one subject: what it measured, twice, and what was there before and after."""

    probe: Probe
    first: Measurement
    second: Measurement
    before: dict[str, Any]
    after: dict[str, Any]
    global_before: dict[str, Any]
    global_after: dict[str, Any]
    hooks_left: int


def observe(probe: Probe, seen: Watched) -> Observation:
    before, global_before = state(seen.model), global_state()
    try:
        first = probe.measure(seen)
        after, global_after = state(seen.model), global_state()
    finally:
        random.setstate(global_before["python"])
    with elsewhere():
        second = probe.measure(seen)
    left = sum(hook_count(network) for network in [seen.model, *seen.given])
    return Observation(probe, first, second, before, after, global_before, global_after, left)


@cache
def observed(name: str, kind: str, method: str) -> Observation:
    return observe(SMALL[name], subject(kind, method))


# The properties, each by itself.


def leaves_the_model_alone(seen: Observation) -> None:
    for what in seen.before:
        assert seen.after[what] == seen.before[what], what


def leaves_the_global_state_alone(seen: Observation) -> None:
    for what in seen.global_before:
        assert seen.global_after[what] == seen.global_before[what], what


def is_determined_by_the_seed(seen: Observation) -> None:
    assert seen.first.estimate.tobytes() == seen.second.estimate.tobytes()
    assert seen.first.axes == seen.second.axes


def removes_its_hooks(seen: Observation) -> None:
    assert seen.hooks_left == 0


def measures_one_replication(seen: Observation) -> None:
    assert seen.first.n == 1
    assert seen.first.standard_error is None
    assert seen.first.estimate.size > 0
    finite = np.isfinite(seen.first.estimate)
    if "condition_number" in seen.first.axes.get("statistic", ()):  # Infinite for a singular kernel.
        finite |= seen.first.estimate == np.inf
    assert finite.all()


def records_the_seed(seen: Observation) -> None:
    assert seen.first.seeds == (5,)


def says_what_it_measured(seen: Observation) -> None:
    assert seen.first.probe == seen.probe.name
    assert seen.first.quantity.strip()
    assert seen.first.unit.strip()


def is_a_frozen_dataclass(seen: Observation) -> None:
    assert is_dataclass(seen.probe)
    with pytest.raises(FrozenInstanceError):
        seen.probe.a_setting = 1
    hash(seen.probe)
    assert copy.deepcopy(seen.probe) == seen.probe


def shows_its_settings(seen: Observation) -> None:
    text = repr(seen.probe)
    assert text.startswith(type(seen.probe).__name__ + "(")
    for setting in fields(seen.probe):
        assert f"{setting.name}={getattr(seen.probe, setting.name)!r}" in text


PROPERTIES: tuple[Callable[[Observation], None], ...] = (
    leaves_the_model_alone,
    leaves_the_global_state_alone,
    is_determined_by_the_seed,
    removes_its_hooks,
    measures_one_replication,
    records_the_seed,
    says_what_it_measured,
    is_a_frozen_dataclass,
    shows_its_settings,
)

CASES = [
    pytest.param(name, kind, method, id=f"{name}-{kind}-{method}")
    for name in PROBES
    for kind in ("fcnn", "conv")
    for method in NEEDS.get(name, METHODS)
]


@pytest.mark.parametrize(("name", "kind", "method"), CASES)
def test_every_probe_keeps_to_the_interface(name, kind, method):
    seen = observed(name, kind, method)
    for holds in PROPERTIES:
        holds(seen)


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_is_listed_under_its_name(name):
    assert PROBES[name].name == name
    assert isinstance(PROBES[name], Probe)
    assert type(SMALL[name]) is type(PROBES[name])


def test_every_probe_there_is_is_listed():
    exported = [getattr(diagnostics.probes, name) for name in diagnostics.probes.__all__]
    classes = {one for one in exported if is_dataclass(one)}
    assert classes == {type(probe) for probe in PROBES.values()}
    assert len(PROBES) == len(classes)


def scaled_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


@pytest.mark.parametrize("kind", ["fcnn", "conv"])
@pytest.mark.parametrize("name", PROBES)
def test_the_order_of_the_examples_matters_only_where_it_must(name, kind):
    method = NEEDS.get(name, ("weight mean",))[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = SMALL[name].measure(subject(kind, method, order=order)).estimate
    difference = scaled_difference(observed(name, kind, method).first.estimate, shuffled)
    if name in ORDER_MATTERS:
        assert difference > 1e-4, ORDER_MATTERS[name]
    elif name != "weight_projection":  # a rounding error itself
        assert difference < 1e-9


@pytest.mark.parametrize("name", PROBES)
def test_another_seed_draws_another_network(name):
    method = NEEDS.get(name, ("weight mean",))[0]
    mine = observed(name, "fcnn", method).first
    theirs = SMALL[name].measure(replace(subject("fcnn", method), seed=6))
    assert theirs.seeds == (6,)
    if name not in COARSE:
        assert not np.array_equal(mine.estimate, theirs.estimate)


# Refusals that all probes share.


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_refuses_inputs_that_are_not_finite(name):
    broken = subject("fcnn", NEEDS.get(name, ("weight mean",))[0])
    broken.x[3, 2] = float("nan")
    with pytest.raises(UsageError, match="x must be finite"):
        SMALL[name].measure(broken)


@pytest.mark.parametrize("name", [name for name in PROBES if name not in NEEDS])
def test_every_probe_refuses_weights_that_are_not_finite(name):
    broken = subject("fcnn", "as it stands")
    with torch.no_grad():
        broken.model.get_parameter("linear2.weight")[0, 0] = float("inf")
    with pytest.raises(UsageError, match=r"linear2\.weight has 1 entries that are NaN or infinite"):
        SMALL[name].measure(broken)


# Probes that break one property each, and the proof that the suite notices.

Misdeed = Callable[[Subject, nn.Module], None]


def nothing(subject: Subject, network: nn.Module) -> None:
    """No misdeed."""


@dataclass(frozen=True)
class Obedient:
    """Keeps to everything, unless it is given a misdeed or a way to falsify its report."""

    misdeed: Misdeed = nothing
    falsify: Callable[[Measurement], Measurement] = lambda report: report

    @property
    def name(self) -> str:
        return "obedient"

    def measure(self, subject: Subject) -> Measurement:
        network = subject.network()
        noise = torch.rand(2, generator=subject.generator(1), dtype=torch.float64).numpy()
        values = noise + float(next(network.parameters()).detach().sum())
        self.misdeed(subject, network)
        return self.falsify(
            Measurement(self.name, "noise", "1", values, {"entry": (0, 1)}, seeds=(subject.seed,)),
        )


@dataclass(frozen=True)
class HidesASetting(Obedient):
    hidden: int = field(default=3, repr=False)


@dataclass
class CanBeChanged:
    a_setting: int = 3

    @property
    def name(self) -> str:
        return "obedient"

    def __hash__(self) -> int:
        return hash(self.a_setting)

    def measure(self, subject: Subject) -> Measurement:
        return Obedient().measure(subject)


def changes_weights(subject: Subject, network: nn.Module) -> None:
    with torch.no_grad():
        next(subject.model.parameters()).mul_(1 + 1e-15)


def moves_running_statistics(subject: Subject, network: nn.Module) -> None:
    subject.model(subject.x)


def flips_the_train_flag(subject: Subject, network: nn.Module) -> None:
    subject.model.train()


def leaves_gradients(subject: Subject, network: nn.Module) -> None:
    for parameter in subject.model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def clears_gradients(subject: Subject, network: nn.Module) -> None:
    subject.model.zero_grad()


def freezes_parameters(subject: Subject, network: nn.Module) -> None:
    subject.model.requires_grad_(False)


def replaces_a_module(subject: Subject, network: nn.Module) -> None:
    subject.model.set_submodule("relu1", nn.ReLU().eval())


def draws_from_torch(subject: Subject, network: nn.Module) -> None:
    torch.rand(())


def draws_from_numpy(subject: Subject, network: nn.Module) -> None:
    np.random.get_bit_generator().random_raw()


def draws_from_python(subject: Subject, network: nn.Module) -> None:
    random.random()


def leaves_a_hook_on_its_copy(subject: Subject, network: nn.Module) -> None:
    next(network.children()).register_forward_hook(lambda *_: None)


def leaves_a_hook_on_the_model(subject: Subject, network: nn.Module) -> None:
    subject.model.register_full_backward_hook(lambda *_: None)


def depends_on_the_global_generator(report: Measurement) -> Measurement:
    with torch.random.fork_rng(devices=[]):
        return replace(report, estimate=report.estimate + float(torch.rand(())))


def measures_nothing(report: Measurement) -> Measurement:
    return replace(report, estimate=[float("nan"), 1.0])


def claims_replications(report: Measurement) -> Measurement:
    return replace(report, n=4, standard_error=np.zeros(2))


def forgets_the_seed(report: Measurement) -> Measurement:
    return replace(report, seeds=())


def signs_as_another(report: Measurement) -> Measurement:
    return replace(report, probe="correlation")


def has_no_unit(report: Measurement) -> Measurement:
    return replace(report, unit="")


CULPRITS: dict[Callable[[Observation], None], list[Probe]] = {
    leaves_the_model_alone: [
        Obedient(misdeed)
        for misdeed in (
            changes_weights,
            moves_running_statistics,
            flips_the_train_flag,
            leaves_gradients,
            clears_gradients,
            freezes_parameters,
            replaces_a_module,
        )
    ],
    leaves_the_global_state_alone: [
        Obedient(misdeed) for misdeed in (draws_from_torch, draws_from_numpy, draws_from_python)
    ],
    is_determined_by_the_seed: [Obedient(falsify=depends_on_the_global_generator)],
    removes_its_hooks: [Obedient(misdeed) for misdeed in (leaves_a_hook_on_its_copy, leaves_a_hook_on_the_model)],
    measures_one_replication: [Obedient(falsify=report) for report in (measures_nothing, claims_replications)],
    records_the_seed: [Obedient(falsify=forgets_the_seed)],
    says_what_it_measured: [Obedient(falsify=report) for report in (signs_as_another, has_no_unit)],
    is_a_frozen_dataclass: [CanBeChanged()],
    shows_its_settings: [HidesASetting()],
}


def title(culprit: Probe) -> str:
    settings = [getattr(culprit, setting.name) for setting in fields(culprit)]
    return next(
        (s.__name__ for s in settings if getattr(s, "__name__", "") not in ("", "nothing", "<lambda>")),
        type(culprit).__name__,
    )


def test_a_probe_that_keeps_to_everything_passes():
    seen = observe(Obedient(), subject("fcnn", "weight mean"))
    for holds in PROPERTIES:
        holds(seen)


def test_every_property_has_a_probe_that_breaks_it():
    assert set(CULPRITS) == set(PROPERTIES)


@pytest.mark.parametrize(
    ("broken", "culprit"),
    [
        pytest.param(broken, culprit, id=title(culprit))
        for broken, all_of_them in CULPRITS.items()
        for culprit in all_of_them
    ],
)
def test_a_probe_that_breaks_a_property_is_caught_by_that_property_alone(broken, culprit):
    with torch.random.fork_rng(devices=[]):
        seen = observe(culprit, subject("fcnn", "weight mean"))
    for holds in PROPERTIES:
        if holds is broken:
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                holds(seen)
        else:
            holds(seen)
