"""In-place replacement of modules, with a record of everything done."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mimicnorm._validation import check_example_input, check_parameters
from mimicnorm.branch import BranchScalar
from mimicnorm.initialization import fan_in, normal_
from mimicnorm.methods.base import Method
from mimicnorm.report import Action, ConversionReport, ReportEntry
from mimicnorm.state import STATE, ConversionState
from mimicnorm.tracing import Layer, Structure, WeightLayer, trace
from mimicnorm.weight_mean import center_weights_

REPORT = "conversion_report"


class Surgery:
    """One conversion under way. All checks happen on construction, before the network is touched.

    Args:
        model: The network to convert in place.
        example_input: A batch to run through the network as a check, or None.
        generator: Source of randomness, None for PyTorch's global one.
        logits: Whether the output must be logits [N, C] of the last layer.

    Raises:
        ValueError: If the network cannot be converted.
    """

    def __init__(
        self, model: nn.Module, *, example_input: Tensor | None, generator: torch.Generator | None, logits: bool = False
    ) -> None:
        """Check and trace the network; see the class."""
        _check_convertible(model)
        self.model = model
        self.generator = generator
        self.structure: Structure = trace(model)
        check_parameters(model)
        _check_weights(self.structure)
        if example_input is not None:
            head = self.structure.head.module.weight.shape[0]
            check_example_input(model, example_input, logits=head if logits else None)
        if logits:
            _check_head(self.structure, model)
        self._before = {
            path: module
            for path, module in model.named_modules()
            if path and (isinstance(module, (_BatchNorm, WeightLayer)) or next(module.children(), None) is None)
        }
        self._entries: dict[str, ReportEntry] = {}
        self._inserted: list[ReportEntry] = []
        self._projected: list[Tensor] = []

    def record(self, path: str, action: Action, reason: str, *, result: str | None = None) -> None:
        """Note what happened to a module of the original network."""
        kind = type(self._before[path]).__name__
        self._entries[path] = ReportEntry(path, kind, result or kind, action, reason)

    def initialize(self, layer: Layer, std: float, *, project: bool, reason: str) -> None:
        """Draw a layer's weight from N(0, std^2), zero its bias, and put it under weight mean if asked."""
        normal_(layer.module.weight, std, self.generator)
        if layer.module.bias is not None:
            nn.init.zeros_(layer.module.bias)
        if project:
            self._projected.append(layer.module.weight)
        action: Action = "projected" if project else "rescaled"
        self.record(layer.path, action, f"{reason}; fan-in {fan_in(layer.module.weight)}, std {std:.4g}")

    def add_bias(self, layer: Layer) -> None:
        """Give a layer a zero bias, in place of the shift of a removed BatchNorm, if it has none."""
        module = layer.module
        if module.bias is None:
            weight = module.weight
            bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
            module.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)

    def remove_batch_norms(self) -> None:
        """Replace every BatchNorm that is still there by the identity."""
        for path, module in self._before.items():
            if isinstance(module, _BatchNorm) and path not in self._entries:
                self._replace(path, nn.Identity(), "normalization removed")

    def check_scalable(self) -> None:
        """Refuse, before anything is touched, a branch that ends in a module used elsewhere too.

        Raises:
            ValueError: If such a module is called more than once.
        """
        for block in self.structure.blocks:
            for path in (block.branch_end, block.shortcut_end):
                calls = self.structure.calls.get(path or "", 0)
                if calls > 1:
                    raise ValueError(
                        f"module {path!r} must be called once to carry a branch scalar; it is called {calls} times: "
                        "give the residual branch a module of its own, or use branch_scalar=False."
                    )

    def scale_end(self, path: str, value: float, reason: str) -> None:
        """Put a learnable scalar at a module's output: in place of a BatchNorm, after anything else.

        Args:
            path: The last module of a branch or shortcut.
            value: Initial value.
            reason: For the report.
        """
        weight = self.structure.layers[0].module.weight
        scalar = BranchScalar(value, dtype=weight.dtype, device=weight.device)
        if isinstance(self.model.get_submodule(path), _BatchNorm):
            self._replace(path, scalar, reason)
        else:
            self._insert_after(path, "branch_scalar", scalar, reason)

    def insert_after_head(self, name: str, module: nn.Module, reason: str) -> None:
        """Put a module behind the logits."""
        self._insert_after(self.structure.head_end, name, module, reason)

    def finish(self, method: Method) -> ConversionReport:
        """Project what is to be projected, and store method and report on the network."""
        center_weights_(self._projected)
        for name in self.structure.undecided:
            entry = ReportEntry(name, "add", "add", "skipped", "branch and shortcut cannot be told apart")
            self._inserted.append(entry)
        for path, module in self._before.items():
            if path not in self._entries:
                self.record(path, *_untouched(module, called=path in self.structure.calls))
        report = ConversionReport(repr(method), tuple(self._entries[p] for p in self._before) + tuple(self._inserted))
        identities = {id(weight) for weight in self._projected}
        names = tuple(name for name, parameter in self.model.named_parameters() if id(parameter) in identities)
        setattr(self.model, STATE, ConversionState(method, names))
        setattr(self.model, REPORT, report)
        return report

    def _replace(self, path: str, new: nn.Module, reason: str) -> None:
        self.record(path, "replaced", reason, result=type(new).__name__)
        self._swap(self._before[path], new)

    def _swap(self, old: nn.Module, new: nn.Module) -> None:
        """Replace a module under every name it is registered by."""
        new.train(old.training)
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                if child is old:
                    setattr(parent, name, new)

    def _insert_after(self, path: str, name: str, new: nn.Module, reason: str) -> None:
        """Append to the enclosing Sequential where the module is its last, else wrap the module in one."""
        old = self.model.get_submodule(path)
        parent_path, _, own_name = path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        new.train(old.training)
        is_chain = type(parent).forward is nn.Sequential.forward
        if is_chain and next(reversed(parent._modules)) == own_name and name not in parent._modules:
            parent.add_module(name, new)
            new_path = f"{parent_path}.{name}" if parent_path else name
        else:
            self._swap(old, nn.Sequential(OrderedDict([("layer", old), (name, new)])))
            new_path = f"{path}.{name}"
        self._inserted.append(ReportEntry(new_path, "", type(new).__name__, "inserted", reason))


def _untouched(module: nn.Module, *, called: bool) -> tuple[Action, str]:
    """Action and reason for a module that the method left alone."""
    kind = type(module)
    if not called and next(module.parameters(), None) is not None:
        return "skipped", "not called as a module in forward"
    if kind.__module__ == "torch.nn.modules.activation" and kind not in (nn.ReLU, nn.Softmax, nn.LogSoftmax):
        return "kept", "initialization assumes ReLU"
    if next(module.parameters(), None) is not None:
        return "kept", "not covered by the method"
    return "kept", "nothing to convert"


def _check_convertible(model: nn.Module) -> None:
    state = getattr(model, STATE, None)
    if isinstance(state, ConversionState) and not state.method.keeps_batch_norm:
        raise ValueError(
            f"model must be in its BatchNorm form; got one already converted by {state.method!r}: "
            "convert the original network instead."
        )


def _check_head(structure: Structure, model: nn.Module) -> None:
    head = structure.head
    if not isinstance(head.module, nn.Linear) and not isinstance(model.get_submodule(structure.head_end), nn.Flatten):
        raise ValueError(
            f"model must flatten the output of its last convolution {head.path!r} to [N, C] with nn.Flatten to carry a "
            "last BatchNorm; it does not: add that module, or use MimicNorm(last_batch_norm=False)."
        )


def _check_weights(structure: Structure) -> None:
    for layer in structure.layers:
        if not isinstance(layer.module._parameters.get("weight"), nn.Parameter):
            raise ValueError(
                f"layer {layer.path!r} must own its weight as a plain parameter; got a parametrized one: call "
                "torch.nn.utils.parametrize.remove_parametrizations first."
            )
