"""A subject gives fresh networks, and what passes through one is recorded without a trace left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mimicnorm
from diagnostics.anatomy import ACTIVATIONS, BATCH_NORM, LINEAR, Record, check_network, forward_record, recording
from diagnostics.errors import UsageError
from diagnostics.subject import Subject


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(n: int = 6, d: int = 4) -> torch.Tensor:
    return torch.randn(n, d, generator=generator(1))


def two_layers(*, inplace: bool) -> nn.Sequential:
    """Linear, ReLU, Linear, ReLU, Linear with the same weights whatever the flag."""
    sizes = ((4, 8), (8, 8), (8, 3))
    linears = [nn.utils.skip_init(nn.Linear, i, o) for i, o in sizes]
    draw = generator()
    with torch.no_grad():
        for linear in linears:
            linear.weight.normal_(generator=draw)
            linear.bias.normal_(generator=draw)
    relu = [nn.ReLU(inplace=inplace) for _ in range(2)]
    return nn.Sequential(linears[0], relu[0], linears[1], relu[1], linears[2])


def hook_count(network: nn.Module) -> int:
    return sum(
        len(hooks)
        for module in network.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


class Branching(nn.Module):
    """Runs its modules in an order other than that of their definition, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(4, 2)
        self.early = nn.Linear(4, 4)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(self.relu(self.early(self.relu(x))))


def plainly(network: nn.Sequential, x: torch.Tensor, kinds: tuple[type[nn.Module], ...]) -> Record:
    """The record as a beginner would take it."""
    record = Record()
    for name, module in network.named_children():
        before = x.detach().clone()
        x = module(x)
        if isinstance(module, kinds):
            record.names.append(name)
            record.inputs.append(before)
            record.outputs.append(x.detach().clone())
    return record


@pytest.mark.parametrize("kinds", [LINEAR, ACTIVATIONS, (nn.Module,)], ids=["linear", "activations", "all"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_record_holds_what_passed_through_and_no_later_operation_changes_it(inplace, kinds):
    network, x = two_layers(inplace=inplace), inputs()
    expected = plainly(network, x, (*LINEAR, *ACTIVATIONS) if kinds == (nn.Module,) else kinds)
    record = forward_record(network, x, (*LINEAR, *ACTIVATIONS) if kinds == (nn.Module,) else kinds)
    assert record.names == expected.names
    for mine, theirs in ((record.inputs, expected.inputs), (record.outputs, expected.outputs)):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_references_in_place_of_clones_would_be_corrupted():
    network, x = two_layers(inplace=True), inputs()
    held = []
    for module in network:
        x = module(x)
        held.append(x)
    true = plainly(two_layers(inplace=True), inputs(), LINEAR).outputs[0]
    assert not torch.equal(held[0], true), "the in-place ReLU must overwrite the Linear's output for the test to test"


@pytest.mark.parametrize("inplace", [False, True])
def test_recording_changes_neither_the_output_nor_its_gradients(inplace):
    network, x = two_layers(inplace=inplace), inputs()
    output = network(x)
    plain = torch.autograd.grad(output.square().sum(), list(network.parameters()))
    with recording(network, (*LINEAR, *ACTIVATIONS)):
        recorded = network(x)
    again = torch.autograd.grad(recorded.square().sum(), list(network.parameters()))
    assert torch.equal(recorded, output)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_gradients_with_respect_to_recorded_outputs_exist_before_an_in_place_activation():
    gradients = []
    for inplace in (False, True):
        network = two_layers(inplace=inplace)
        with recording(network, LINEAR) as record:
            output = network(inputs())
        gradients.append(torch.autograd.grad(output.sum(), record.outputs))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_order_is_that_of_execution_and_a_module_called_twice_is_there_twice():
    record = forward_record(Branching(), inputs(), (*LINEAR, *ACTIVATIONS))
    assert record.names == ["relu", "early", "relu", "late"]
    assert torch.equal(record.inputs[0], inputs())
    assert not torch.equal(record.inputs[2], record.inputs[0])


def test_hooks_are_removed_also_after_an_error():
    network = two_layers(inplace=False)
    with recording(network, LINEAR):
        assert hook_count(network) == 6
    assert hook_count(network) == 0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), recording(network, LINEAR):
        network(torch.zeros(2, 5))
    assert hook_count(network) == 0


def test_hooks_of_the_user_stay():
    network = two_layers(inplace=False)
    calls = []
    handle = network[0].register_forward_hook(lambda *_: calls.append(1))
    forward_record(network, inputs(), LINEAR)
    assert hook_count(network) == 1
    assert calls == [1]
    handle.remove()


def test_a_recorded_forward_pass_leaves_running_statistics_and_gradients_alone():
    network = mimicnorm.models.fcnn(4, 8, 2, 3, generator=generator())
    network(inputs()).sum().backward()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    gradients = [p.grad.clone() for p in network.parameters()]
    record = forward_record(network, inputs(), ACTIVATIONS)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients, strict=True))
    assert not any(t.requires_grad for t in record.inputs + record.outputs)
    assert network.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    network = two_layers(inplace=False)
    with torch.no_grad():
        network[2].weight[0, :3] = value
    with pytest.raises(UsageError) as error:
        check_network(network, inputs())
    message = str(error.value)
    assert message.startswith("model must have finite weights and statistics; 2.weight has 3 entries that are NaN")
    assert "lower the learning rate" in message


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_inputs_that_are_not_finite_are_refused(value):
    x = inputs()
    x[1, 2] = value
    with pytest.raises(UsageError, match=r"x must be finite; it has NaN or infinite entries\. Clean the data"):
        check_network(two_layers(inplace=False), x)


def test_a_batch_of_one_is_refused_where_batch_norm_is_in_train_mode():
    network = mimicnorm.models.fcnn(4, 8, 2, 3, generator=generator())
    with pytest.raises(UsageError) as error:
        check_network(network, inputs(1))
    assert str(error.value) == (
        "x must hold at least 2 examples because norm1 normalizes over the batch in train mode; got 1. Pass more "
        "examples, or put the model in eval mode"
    )
    check_network(network, inputs(2))
    check_network(network.eval(), inputs(1))
    check_network(two_layers(inplace=False), inputs(1))


def test_the_kinds_cover_the_layers_of_the_zoo():
    network = mimicnorm.models.resnet18(10, width=0.1, generator=generator())
    kinds = [type(m).__name__ for m in network.modules() if isinstance(m, (*LINEAR, *ACTIVATIONS, BATCH_NORM))]
    assert set(kinds) == {"Conv2d", "Linear", "ReLU", "BatchNorm2d"}


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", [None, mimicnorm.NoNorm(), mimicnorm.MimicNorm(linear=True), mimicnorm.BatchNorm()])
def test_a_subject_gives_the_same_network_again_and_never_its_own(method):
    model = mimicnorm.models.fcnn(4, 8, 2, 3, generator=generator())
    kept = copy.deepcopy(model)
    subject = Subject(model, inputs(), method=method, seed=3)
    first, second = subject.network(), subject.network()
    assert states_equal(first, second)
    storages = [{p.data_ptr() for p in network.parameters()} for network in (model, first, second)]
    assert not any(storages[i] & storages[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    assert states_equal(model, kept)
    assert not states_equal(first, second)


def test_the_seed_of_a_subject_draws_its_weights():
    model = mimicnorm.models.fcnn(4, 8, 2, 3, generator=generator())
    one, other = (Subject(model, inputs(), method=mimicnorm.NoNorm(), seed=seed).network() for seed in (0, 1))
    assert not states_equal(one, other)


def test_the_streams_of_a_subject_are_apart_and_the_global_generator_is_not_used():
    state = torch.get_rng_state()
    model = mimicnorm.models.fcnn(4, 8, 2, 3, generator=generator())
    draws = {
        (seed, stream): float(torch.randn((), generator=Subject(model, inputs(), seed=seed).generator(stream)))
        for seed in range(4)
        for stream in range(5)
    }
    assert len(set(draws.values())) == len(draws)
    again = float(torch.randn((), generator=Subject(model, inputs(), seed=2).generator(3)))
    assert draws[2, 3] == again
    Subject(model, inputs(), method=mimicnorm.MimicNorm(linear=True), seed=2).network()
    assert torch.equal(torch.get_rng_state(), state)


def test_projections_are_those_of_the_method():
    model = mimicnorm.models.fcnn(4, 8, 2, 3, generator=generator())
    projected = Subject(model, inputs(), method=mimicnorm.MimicNorm(linear=True))
    assert set(projected.projections(projected.network())) == {"linear2.weight", "linear3.weight"}
    for method in (None, mimicnorm.NoNorm(), mimicnorm.BatchNorm()):
        subject = Subject(model, inputs(), method=method)
        assert subject.projections(subject.network()) == {}
