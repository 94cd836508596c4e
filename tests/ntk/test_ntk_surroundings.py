"""Wrappers around a model, and what is switched on around a measurement, leave its kernel as it is."""

import contextlib
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ntk
from ntk import errors
from tests.ntk.modules import Apply
from tests.ntk.oracle import jacobian, kernel, state_hash
from tests.ntk.test_ntk_refusals import refused

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), inner, nn.Linear(6, 2)).to(torch.float64)


def expected(model: nn.Module | None = None) -> np.ndarray:
    rows = jacobian(model or network(), X)
    return kernel(rows, rows).numpy()


def agrees(found: ntk.KernelResult, model: nn.Module | None = None) -> bool:
    return bool(np.abs(found.values - expected(model)).max() < 1e-10 * np.abs(expected(model)).max())


def unused(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """A compiler that is not to be called."""
    raise AssertionError("compiled")


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend=unused)


def with_child(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: nn.Module) -> nn.Module:
        model[2][0] = wrap(model[2][0])
        return model

    return wrapped


def in_place(model: nn.Module) -> nn.Module:
    model[2].compile(backend=unused)
    return model


@contextlib.contextmanager
def process_group() -> Generator[None, None, None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], tuple[str, ...]]] = {
    "torch.compile": (compiled, ("torch.compile taken off the model",)),
    "torch.compile of a child": (with_child(compiled), ("torch.compile taken off module '2.0'",)),
    "Module.compile of a child": (in_place, ("torch.compile taken off module '2'",)),
    "DataParallel": (nn.DataParallel, ("DataParallel taken off the model",)),
    "DataParallel of a child": (with_child(nn.DataParallel), ("DataParallel taken off module '2.0'",)),
    "both": (
        lambda model: compiled(nn.DataParallel(model)),
        ("torch.compile taken off the model", "DataParallel taken off the model"),
    ),
    "DistributedDataParallel": (
        nn.parallel.DistributedDataParallel,
        ("DistributedDataParallel taken off the model",),
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name: str) -> None:
    wrap, notes = WRAPPERS[name]
    with process_group() if name == "DistributedDataParallel" else contextlib.nullcontext():
        model = wrap(network())
        before = state_hash(model)
        found = ntk.empirical_ntk(model, X)
        assert agrees(found)
        assert found.notes == notes
        assert all(note in found.describe() for note in notes)
        assert notes[0].replace("'", "&#x27;") in found._repr_html_()
        assert found.to_dataset().attrs["notes"] == "; ".join(notes)
        assert list(ntk.layerwise_ntk(model, X)) == ["0", "1", "2.0", "3"]
        assert set(found.by_jacobian or ()) == set()
        chosen = ntk.empirical_ntk(model, X, params=["2.0.weight"])
        assert chosen.values.any()
        operator, linear = ntk.NtkOperator(model, X), ntk.linearize(model)
        assert operator.notes == notes
        assert all(note in operator.describe() for note in notes)
        assert np.abs(operator @ np.eye(10) - found.flatten()).max() < 1e-10
        assert "2.0.weight" in linear.params
        assert torch.equal(linear(X), network()(X))
        assert ntk.empirical_nngp(model, X, layer="2.0").notes == notes
        assert state_hash(model) == before


def test_a_plain_model_has_no_notes() -> None:
    found = ntk.empirical_ntk(network(), X)
    assert found.notes == ()
    assert "taken off" not in found.describe()


class Calls(nn.Module):
    """Calls a function of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.function = network(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.net(x))


def test_a_compiled_function_inside_a_model() -> None:
    function = torch.compile(torch.tanh, backend=unused)
    assert agrees(ntk.empirical_ntk(Calls(function), X), Calls(torch.tanh))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_modules() -> None:
    script = torch.jit.script(network())
    with refused(errors.WrappedModelError, "model is a ScriptModule", "torch.nn.Module that it was made from"):
        ntk.empirical_ntk(script, X)
    with refused(errors.WrappedModelError, "module '1' is a ScriptModule"):
        ntk.NtkOperator(nn.Sequential(nn.Identity(), script), X)


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, with_child(nn.DataParallel)])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_wrapper(register: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(network())
    hooked = model[2][0] if isinstance(model, nn.Sequential) else model
    getattr(hooked, register)(lambda *_: None)
    before = state_hash(model)
    with refused(errors.WrappedModelError, "forward hook on the wrapper of", "on the module inside"):
        ntk.empirical_ntk(model, X)
    assert state_hash(model) == before


def test_parameters_spread_over_processes() -> None:
    from torch.distributed.tensor import distribute_tensor

    with process_group():
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = network()
        model[3].weight = nn.Parameter(distribute_tensor(model[3].weight.detach(), mesh))
        with refused(errors.WrappedModelError, "module '3' is Linear", "over processes", "plain copy"):
            ntk.empirical_ntk(model, X)


@contextlib.contextmanager
def default_dtype() -> Generator[None, None, None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Generator[None, None, None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype": default_dtype,
    "deterministic algorithms": deterministic,
}

ENTRIES: dict[str, Callable[[nn.Module, Tensor], np.ndarray]] = {
    "structured": lambda model, x: ntk.empirical_ntk(model, x).flatten(),
    "jacobian_contraction": lambda model, x: ntk.empirical_ntk(
        model, x, implementation="jacobian_contraction"
    ).flatten(),
    "ntk_vector_products": lambda model, x: ntk.empirical_ntk(model, x, implementation="ntk_vector_products").flatten(),
    "operator": lambda model, x: ntk.NtkOperator(model, x) @ np.eye(10),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings(name: str, entry: str) -> None:
    model = network()
    flat = ENTRIES[entry](model, X)
    with SURROUNDINGS[name]():
        switched = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = ENTRIES[entry](model, X)
        assert switched == (
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
    assert np.abs(found - flat).max() < 1e-10 * np.abs(flat).max()


@pytest.mark.parametrize("entry", [*ENTRIES, "one product"])
def test_autocast_rounds_no_pass(entry: str) -> None:
    """It leaves float64 alone, and so the test above. Control: it rounds the outputs of the network."""
    model, x = network().float(), X.float()
    entries = ENTRIES | {"one product": lambda model, x: ntk.NtkOperator(model, x) @ np.ones(10)}
    plain, output = entries[entry](model, x), model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.abs(entries[entry](model, x) - plain).max() < 1e-6 * np.abs(plain).max()
        assert (model(x) - output).abs().max() > 1e-4 * output.abs().max()


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_made_in_inference_mode(entry: str) -> None:
    with torch.inference_mode():
        model, x = network(), X.clone()
    flat = ENTRIES[entry](network(), X)
    assert np.abs(ENTRIES[entry](model, x) - flat).max() < 1e-10 * np.abs(flat).max()
    with torch.inference_mode():
        assert np.abs(ENTRIES[entry](model, x) - flat).max() < 1e-10 * np.abs(flat).max()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_models_of_half_precision(kind: torch.dtype) -> None:
    model, x = network().to(kind), X.to(kind)
    with refused(errors.OutputShapeError, "float32 or float64", str(kind), "dtype=torch.float32"):
        ntk.empirical_ntk(model, x)
    rows = jacobian(network().to(kind).double(), x.double())
    exact = kernel(rows, rows).numpy()
    assert np.abs(ntk.empirical_ntk(model, x, dtype=torch.float32).values - exact).max() < 1e-4 * np.abs(exact).max()
    assert np.abs(ntk.empirical_ntk(model, x, dtype=torch.float64).values - exact).max() < 1e-10 * np.abs(exact).max()
    assert {p.dtype for p in model.parameters()} == {kind}


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = network(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.net[3](checkpoint(self.net[:3], self.net[0](x)[:, :4], use_reentrant=self.reentrant))


@pytest.mark.parametrize("implementation", ["structured", "jacobian_contraction"])
def test_checkpointing_that_sees_the_weights_in_use(implementation: str) -> None:
    model = Checkpointed(reentrant=False)
    before = state_hash(model)
    found = ntk.empirical_ntk(model, X, implementation=implementation)
    assert state_hash(model) == before
    assert agrees(found, model)


@pytest.mark.parametrize(
    ("reentrant", "measure"),
    [
        (True, lambda model: ntk.empirical_ntk(model, X)),
        (True, lambda model: ntk.empirical_ntk(model, X, implementation="jacobian_contraction")),
        (True, lambda model: ntk.NtkOperator(model, X)),
        (False, lambda model: ntk.empirical_ntk(model, X, dtype=torch.float32)),
        (False, lambda model: ntk.empirical_ntk(model, X, batch_statistics="frozen")),
        (False, lambda model: ntk.empirical_ntk(model, X, batch_statistics="reference", reference=X)),
        (False, lambda model: ntk.NtkOperator(model, X)),
    ],
)
def test_checkpointing_that_does_not(reentrant: bool, measure: Callable[[nn.Module], object]) -> None:
    model = Checkpointed(reentrant)
    before = state_hash(model)
    with refused(errors.CheckpointingError, "keep its activations", "torch.utils.checkpoint", "Switch that off"):
        measure(model)
    assert state_hash(model) == before


class Views(nn.Module):
    """Returns a view that a following activation writes into."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), 2, -1)[:, 0]


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.Hardswish(inplace=True)])
def test_in_place_activations_on_views(activation: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Views(), activation, nn.Linear(3, 6), activation, Views()).double()
    assert agrees(ntk.empirical_ntk(model, X), model)


class Writes(nn.Module):
    """Writes a buffer in eval mode too, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(2))

    def forward(self, y: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(y.detach().mean(0))
        return y * self.mean


def test_a_buffer_written_in_eval_mode() -> None:
    model = nn.Sequential(network(), Writes()).double().eval()
    before = state_hash(model)
    found = ntk.empirical_ntk(model, X)
    assert state_hash(model) == before
    assert agrees(found, model)


class Precision(nn.Module):
    """Notes how float32 products are made while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.seen: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
        return self.layer(x)


@pytest.mark.parametrize("raises", [False, True])
def test_products_of_reduced_precision_are_off_inside_and_on_again_after(raises: bool) -> None:
    """TF32 on CUDA, bfloat16 in oneDNN."""
    model, seen = Precision(), []
    model.register_forward_hook(lambda module, inputs, output: seen.extend(module.seen))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        if raises:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                ntk.empirical_ntk(model, torch.randn(5, 3))
        else:
            ntk.empirical_ntk(model, torch.randn(5, 4))
            assert set(seen) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def caching(net: nn.Module) -> nn.Module:
    """A network that computes each weight once for a call."""

    def forward(s: Apply, x: Tensor) -> Tensor:
        with nn.utils.parametrize.cached():
            return s.net(x)

    return Apply(forward, net=net)


@pytest.mark.parametrize("around", [nn.Sequential, caching])
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_cache_of_parametrized_weights_is_neither_used_nor_filled(entry: str, around: Callable) -> None:
    net = network()
    nn.utils.parametrizations.weight_norm(net[0])
    model = around(net)
    flat = ENTRIES[entry](model, X)
    with nn.utils.parametrize.cached():
        for _ in range(2):
            assert np.abs(ENTRIES[entry](model, X) - flat).max() < 1e-10 * np.abs(flat).max()
            model(X).sum().backward(retain_graph=True)
            assert all(parameter.grad is not None for parameter in model.parameters())


def padded() -> nn.Module:
    """Of each sequence one position is masked, and averaged over like the others."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    mask = torch.tensor([False, False, True])
    forward = lambda s, x: s.net(x.reshape(-1, 3, 4), src_key_padding_mask=mask.expand(len(x), 3)).mean(1)
    return Apply(forward, net=nn.TransformerEncoder(layer, 1)).double().eval()


@pytest.mark.parametrize("implementation", ["structured", "jacobian_contraction"])
def test_the_fast_path_of_attention_gives_other_outputs(implementation: str) -> None:
    model, x = padded(), torch.randn(5, 12).double()
    rows = jacobian(model, x)
    exact = kernel(rows, rows).numpy()
    found = ntk.empirical_ntk(model, x, implementation=implementation)
    assert np.abs(found.values - exact).max() < 1e-10 * np.abs(exact).max()
    assert torch.backends.mha.get_fastpath_enabled()
