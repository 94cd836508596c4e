"""Methods in the training loops of Lightning and of transformers: real fits on tiny networks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mimicnorm
from mimicnorm.integrations._networks import attach_all
from mimicnorm.state import projected_weights

CENTERED = 1e-6


def network(method: str = "mimicnorm", seed: int = 0) -> nn.Module:
    """Two residual blocks for images [N, 3, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(Block(3, 6), Block(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return mimicnorm.convert(model, method, generator=generator)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4


def largest_row_mean(model: nn.Module) -> float:
    weights = projected_weights(model).values()
    assert weights
    return max(weight.detach().flatten(1).mean(1).abs().max().item() for weight in weights)


def hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


# ----------------------------------------------------------------------------------------------------------- lightning

quiet = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers", "ignore:`isinstance.treespec, LeafSpec.` is deprecated"
)


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch")


@pytest.fixture
def fit(lightning: Any, tmp_path: Path) -> Callable[..., None]:
    """Fits a LightningModule for one epoch of four steps."""

    def run(module: Any, *callbacks: Any) -> None:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=6))

    return run


@pytest.fixture
def callback(lightning: Any) -> Any:
    from mimicnorm.integrations.lightning import MethodCallback

    return MethodCallback()


@pytest.fixture
def classifier(lightning: Any) -> Callable[..., Any]:
    """A LightningModule around a network, with an optimizer over the network's own groups."""

    class Classifier(lightning.LightningModule):
        def __init__(self, model: nn.Module, *, fails: bool = False) -> None:
            super().__init__()
            self.model, self.fails = model, fails

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            if self.fails and index == 2:
                raise RuntimeError("planted")
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            groups = mimicnorm.param_groups(self.model, lr=0.05, weight_decay=1e-4)
            self.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
            return self.optimizer

    return Classifier


@quiet
def test_weights_fitted_by_lightning_stay_centered(fit: Any, classifier: Any, callback: Any) -> None:
    module, free = classifier(network()), classifier(network())
    fit(module, callback)
    fit(free)
    assert largest_row_mean(module.model) < CENTERED
    assert largest_row_mean(free.model) > 100 * CENTERED


@quiet
@pytest.mark.parametrize("method", mimicnorm.METHODS)
def test_lightning_trains_as_a_plain_loop_does(method: str, fit: Any, classifier: Any, callback: Any) -> None:
    """Lightning runs the backward pass inside of the optimizer's step."""
    model = network(method)
    plain = deepcopy(model)
    optimizer = torch.optim.SGD(mimicnorm.param_groups(plain, lr=0.05, weight_decay=1e-4), lr=0.05, momentum=0.9)
    x, y = data()
    with mimicnorm.attach(plain.train(), optimizer):
        for inputs, labels in zip(x.split(6), y.split(6), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(inputs), labels).backward()
            optimizer.step()
    fit(classifier(model), callback)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)


@quiet
def test_lightning_hooks_are_gone_after_fitting_and_after_a_failure(fit: Any, classifier: Any, callback: Any) -> None:
    module = classifier(network())
    fit(module, callback)
    assert hooks(module.optimizer) == 0
    module = classifier(network(), fails=True)
    with pytest.raises(RuntimeError, match="planted"):
        fit(module, callback)
    assert hooks(module.optimizer) == 0
    assert largest_row_mean(module.model) < CENTERED


@quiet
def test_lightning_attaches_each_network_to_its_own_optimizer(lightning: Any, fit: Any, callback: Any) -> None:
    class Pair(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = network(seed=1), network(seed=2)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            for model, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(model(batch[0]), batch[1]))
                optimizer.step()
            self.attached = [hooks(optimizer) for optimizer in self.trainer.optimizers]

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(model.parameters(), lr=0.1) for model in (self.first, self.second)]

    module, free = Pair(), Pair()
    fit(module, callback)
    fit(free)
    assert module.attached == [1, 1]
    assert free.attached == [0, 0]
    assert max(largest_row_mean(module.first), largest_row_mean(module.second)) < CENTERED
    assert min(largest_row_mean(free.first), largest_row_mean(free.second)) > 100 * CENTERED


@quiet
def test_lightning_without_a_converted_network_is_refused(fit: Any, classifier: Any, callback: Any) -> None:
    module = classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"Classifier has none: call mimicnorm\.convert before training starts"):
        fit(module, callback)


# -------------------------------------------------------------------------------------------------------- transformers


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., tuple[nn.Module, Any]]:
    """Trains a converted ResNet of transformers for three steps."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4
    )
    x, y = data()
    examples = [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]

    def run(*callbacks: Any, converts: bool = True, own: bool = False) -> tuple[nn.Module, Any]:
        model = transformers.ResNetForImageClassification(config)
        if converts:
            model = mimicnorm.convert(model, "mimicnorm", example_input=x)
        optimizers = (torch.optim.SGD(mimicnorm.param_groups(model, lr=0.1), lr=0.1), None) if own else (None, None)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, learning_rate=0.01, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=examples, callbacks=list(callbacks), optimizers=optimizers
        )
        trainer.train()
        return model, trainer

    return run


@pytest.fixture
def trainer_callback() -> Any:
    pytest.importorskip("transformers")
    from mimicnorm.integrations.transformers import MethodCallback

    return MethodCallback()


@pytest.mark.parametrize("own", [False, True], ids=["its optimizer", "ours"])
def test_weights_trained_by_transformers_stay_centered(trained: Any, trainer_callback: Any, own: bool) -> None:
    model, trainer = trained(trainer_callback, own=own)
    free, _ = trained(own=own)
    assert largest_row_mean(model) < CENTERED
    assert largest_row_mean(free) > 100 * CENTERED
    assert hooks(trainer.optimizer.optimizer) == 0


def test_transformers_without_a_converted_network_is_refused(trained: Any, trainer_callback: Any) -> None:
    with pytest.raises(ValueError, match=r"ResNetForImageClassification has none: call mimicnorm\.convert before"):
        trained(trainer_callback, converts=False)


# ------------------------------------------------------------------------------------------------------------ networks


def test_a_network_that_no_optimizer_trains_is_refused_and_nothing_stays_attached() -> None:
    both = nn.ModuleList([network(seed=1), network(seed=2)])
    optimizer = torch.optim.SGD(both[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"of the converted Sequential; none does: .* requires_grad_\(False\)"):
        attach_all(both, [optimizer])
    assert hooks(optimizer) == 0
    both[1].requires_grad_(False)
    assert len(attach_all(both, [optimizer])) == 1


def test_an_optimizer_of_the_head_alone_is_passed_over() -> None:
    model = network()
    head, rest = [*model[4].parameters()], [*model[:4].parameters()]
    optimizers = [torch.optim.SGD(head, lr=0.1), torch.optim.SGD(rest, lr=0.1)]
    attach_all(model, optimizers)
    assert [hooks(optimizer) for optimizer in optimizers] == [0, 1]
    with pytest.raises(ValueError, match="one that holds none of its projected weights"):
        attach_all(model, optimizers[:1])


def test_a_compiled_network_is_found_once() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(attach_all(nn.ModuleDict({"compiled": torch.compile(model, backend="eager")}), [optimizer])) == 1


# ------------------------------------------------------------------------------------------------ without the packages


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"mimicnorm.integrations.{name}", raising=False)
    for missing in (name, f"{name}.pytorch"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{name} must have the package.* not installed: pip install {name}"):
        importlib.import_module(f"mimicnorm.integrations.{name}")
