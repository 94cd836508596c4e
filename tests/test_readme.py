"""What the README states about the methods, and shows of the empirical NTK, is what there is."""

import re
from pathlib import Path

import pytest
import torch

import mimicnorm

README = Path(__file__).parents[1] / "README.md"


def test_the_table_of_methods_is_the_catalogue() -> None:
    table = README.read_text().partition("<!-- methods: begin.")[2].partition("<!-- methods: end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    assert rows == [
        [f"`{name}`", f"`{cls.__name__}`", cls.source.partition(";")[0], "reconstruction" if cls.reconstruction else ""]
        for name, cls in mimicnorm.METHODS.items()
    ]


def test_the_empirical_ntk_in_the_readme_prints_what_stands_there(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan and the route; figures that depend on the build of torch are not in the README."""
    section = README.read_text().partition("<!-- ntk: begin.")[2].partition("<!-- ntk: end -->")[0]
    program, printed = re.findall(r"^```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    with torch.random.fork_rng():
        exec(program, {})
    assert capsys.readouterr().out.startswith(printed)
