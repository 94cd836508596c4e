"""The report: every module once, a table, an HTML table, counts."""

import dataclasses

import pytest
import torch
from torch import nn

import mimicnorm
from mimicnorm import MimicNorm
from mimicnorm.report import ConversionReport, ReportEntry


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return mimicnorm.models.resnet18(10, width=0.125, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["mimicnorm", "batch_norm", "none", MimicNorm("imagenet_code")], ids=str)
def test_every_leaf_module_is_listed_once(network: nn.Module, method: mimicnorm.Method | str) -> None:
    converted = mimicnorm.convert(network, method)
    report = converted.conversion_report
    leaves = {path: type(m).__name__ for path, m in network.named_modules() if not list(m.children())}
    original = [entry for entry in report.entries if entry.action != "inserted"]
    assert {entry.path: entry.type for entry in original} == leaves
    assert len(original) == len(leaves)
    for entry in report.entries:
        assert entry.result == type(converted.get_submodule(entry.path)).__name__
        assert entry.reason


def test_counts(network: nn.Module) -> None:
    report = mimicnorm.convert(network, MimicNorm("imagenet_code")).conversion_report
    assert (report.replaced, report.projected, report.scalars) == (20, 20, 11)
    assert (report.count("inserted"), report.count("rescaled")) == (1, 1)
    baseline = mimicnorm.convert(network, "batch_norm").conversion_report
    assert (baseline.replaced, baseline.projected, baseline.scalars) == (0, 0, 0)
    assert baseline.count("rescaled") == 21


def test_the_table_is_aligned_and_complete(network: nn.Module) -> None:
    report = mimicnorm.convert(network, MimicNorm("cifar_code")).conversion_report
    lines = str(report).splitlines()
    assert lines[0].startswith("MimicNorm(variant='cifar_code'")
    assert lines[1].startswith("20 normalization layers replaced, ")
    table = lines[3:]
    assert len(table) == 2 + len(report.entries)
    starts = [table[0].index(column) for column in ("module", "type", "result", "action", "reason")]
    for line, entry in zip(table[2:], report.entries, strict=True):
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert cells == [entry.path, entry.type, entry.result, entry.action, entry.reason]


def test_html_is_escaped() -> None:
    report = ConversionReport("<method>", (ReportEntry("a.b", "Linear", "Linear", "kept", "1 < 2 & 3"),))
    page = report._repr_html_()
    assert "&lt;method&gt;" in page
    assert "<td>1 &lt; 2 &amp; 3</td>" in page
    assert page.startswith("<table>")


def test_activations_other_than_relu_are_pointed_out() -> None:
    report = mimicnorm.convert(mimicnorm.models.fcnn(4, 8, 1, 3, activation="tanh"), "mimicnorm").conversion_report
    reasons = {entry.path: entry.reason for entry in report.entries}
    assert reasons["tanh1"] == "initialization assumes ReLU"


def test_reports_are_frozen() -> None:
    report = mimicnorm.convert(mimicnorm.models.fcnn(4, 8, 1, 3), "none").conversion_report
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        report.method = "other"
