"""Diagnosis of networks: what is found, what is refused, and that nothing is changed."""

import pytest
import torch
from torch import nn

import diagnostics
import mimicnorm
from diagnostics.diagnosis import FIRST_LOOK, diagnose, diagnose_builtin, in_words
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement
from diagnostics.probes import ActivationMemory, Correlation, LearningRateRange


def network(dropout: float = 0.0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    net = mimicnorm.models.fcnn(8, 32, 6, 3, generator=generator)
    return net.append(nn.Dropout(dropout)) if dropout else net


def batch(n: int = 12) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1))


def test_first_look_measures_without_changing_the_network():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = diagnose(net, batch())
    assert tuple(report.measurements) == FIRST_LOOK
    assert all(set(variants) == {"as given"} for variants in report.measurements.values())
    assert len(report.findings) == len(FIRST_LOOK)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_public_name_is_the_function():
    assert diagnostics.diagnose is diagnose


def test_method_is_applied_to_a_copy():
    net = network()
    report = diagnose(net, batch(), probes=["correlation"], method=mimicnorm.MimicNorm(linear=True))
    assert list(report.measurements["correlation"]) == ["mimicnorm"]
    assert any(isinstance(module, nn.BatchNorm1d) for module in net.modules())


def test_report_becomes_a_page_a_dataset_and_a_drawing(tmp_path):
    report = diagnose(network(), batch(), probes=["correlation", Correlation("post"), "memory"])
    page = report.to_html(tmp_path / "page.html").read_text()
    assert "<svg" in page
    dataset = report.to_dataset()
    assert dataset["correlation.as given.estimate"].shape == (6, 3)
    assert "<svg" in report._repr_html_()


def test_builtin_network_is_compared_under_methods():
    report = diagnose_builtin("fcnn", data="gaussian:24,16", methods=["mimicnorm", "none"])
    assert list(report.measurements["correlation"]) == ["as given", "mimicnorm", "none"]
    correlation = {name: m.value(depth=9, statistic="mean") for name, m in report.measurements["correlation"].items()}
    assert correlation["none"] > 0.5 > abs(correlation["as given"])


def test_singular_kernel_is_called_singular():
    spectrum = Measurement("spectrum", "q", "1", [2.0, 1.0, 1e-17], {"rank": (1, 2, 3)})
    assert in_words(spectrum) == "the NTK is singular on these examples: 1 of 3 eigenvalues are zero to rounding."
    regular = Measurement("spectrum", "q", "1", [2.0, 1.0, 0.5], {"rank": (1, 2, 3)})
    assert "4 times its smallest" in in_words(regular)


def test_active_dropout_is_refused_where_it_would_matter():
    net = network(dropout=0.5)
    with pytest.raises(UsageError, match=r"model must not have active dropout.*; 19 is active"):
        diagnose(net, batch(), probes=["correlation"])
    assert ActivationMemory().measure(diagnostics.Subject(net, batch())).value() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    net = network()
    with torch.no_grad():
        net.linear3.weight[0, 0] = bad
    with pytest.raises(UsageError, match=r"linear3\.weight has 1 entries that are NaN or infinite"):
        diagnose(net, batch())


def test_statistics_that_are_not_finite_are_named():
    net = network().eval()
    net.norm2.running_mean[0] = float("nan")
    with pytest.raises(UsageError, match=r"norm2\.running_mean has 1 entries"):
        diagnose(net, batch())


def test_batch_of_one_under_batch_norm_is_refused():
    with pytest.raises(UsageError, match=r"x must hold at least 2 examples because norm1 normalizes over the batch"):
        diagnose(network(), batch(1))


@pytest.mark.parametrize("name", ["correlation", "whitening"])
def test_network_without_activation_modules_is_refused(name):
    with pytest.raises(UsageError, match=r"model must have activation modules \(ReLU, .*\), got none"):
        diagnose(nn.Linear(8, 3), batch(), probes=[name])


def test_too_few_examples_to_train_on_are_refused():
    subject = diagnostics.Subject(network(), batch(), torch.zeros(12, dtype=torch.long))
    with pytest.raises(UsageError, match="x must hold at least 171 examples to fill a training batch of 128, got 12"):
        LearningRateRange().measure(subject)


def test_unknown_probe_is_named_with_the_nearest():
    with pytest.raises(UsageError, match=r"got 'corelation'\. Did you mean 'correlation'"):
        diagnose(network(), batch(), probes=["corelation"])
