"""What an import loads, found out in a fresh interpreter, and which imports the contracts let through.

Each check comes with a case in which it must complain.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mimicnorm", "ntk", "diagnostics")
JAX = frozenset({"jax", "jaxlib", "neural_tangents"})
HEAVY = JAX | {"tensorflow", "tf2jax", "matplotlib", "seaborn", "pandas", "xarray", "sklearn"}

FOREIGN_LIMIT = 250
"""Modules of others that the three packages may load beyond torch's own. Most are scipy.linalg's, some 130; the count
stands for the time, which benchmarks/import_cost.py measures."""


STAGES = (
    "import torch",
    "import numpy",
    "import ntk, mimicnorm, diagnostics",
    "import mimicnorm.integrations, diagnostics.plots",
    "import scipy.stats",
    "import matplotlib",
    "import xarray",
    "ntk.analytic",
)
"""What one interpreter executes, one after the other; where the order matters, what may load least comes first."""

TORCH, NUMPY, OURS, OPTIONAL, SCIPY_STATS, MATPLOTLIB, XARRAY, ANALYTIC = STAGES

PROGRAM = f"""
import warnings
warnings.simplefilter("error")
import os, random, sys
def settings():
    return (
        random.getstate(), numpy.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist(),
        torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        dict(os.environ),
    )
loaded, changed = {{}}, None
for stage in {STAGES}:
    old = set(sys.modules)
    before = settings() if stage == {OURS!r} else None
    exec(stage)
    if before is not None:
        changed = settings() != before
        warnings.simplefilter("default")
    loaded[stage] = sorted(set(sys.modules) - old)
import json
print(json.dumps([loaded, changed]))
"""


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, set[str]], bool]:
    """The modules that each stage loads in a fresh interpreter, and whether our packages change a setting."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, changed = json.loads(done.stdout)
    return {stage: set(modules) for stage, modules in loaded.items()}, changed


@pytest.fixture(scope="module")
def loaded(found: tuple[dict[str, set[str]], bool]) -> dict[str, set[str]]:
    return found[0]


def roots(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def foreign(modules: set[str]) -> set[str]:
    return {name for name in modules if name.partition(".")[0] not in PACKAGES}


def test_importing_the_packages_loads_nothing_heavy(loaded: dict[str, set[str]]) -> None:
    present = roots(loaded[TORCH] | loaded[NUMPY] | loaded[OURS])
    assert set(PACKAGES) <= present
    assert not present & HEAVY


def test_nor_do_the_integrations_and_the_plots(loaded: dict[str, set[str]]) -> None:
    present = set.union(*(loaded[stage] for stage in (TORCH, NUMPY, OURS, OPTIONAL)))
    assert {"mimicnorm.integrations", "diagnostics.plots"} <= present
    assert not roots(present) & (HEAVY | {"lightning", "transformers"})


@pytest.mark.parametrize(
    ("stage", "must_be_found"),
    [(ANALYTIC, {"jax", "jaxlib"}), (MATPLOTLIB, {"matplotlib"}), (XARRAY, {"xarray", "pandas"})],
)
def test_the_check_for_heavy_modules_can_fail(stage: str, must_be_found: set[str], loaded: dict[str, set[str]]) -> None:
    assert roots(loaded[stage]) & HEAVY >= must_be_found


def test_an_import_costs_few_modules_beyond_torch(loaded: dict[str, set[str]]) -> None:
    assert len(foreign(loaded[NUMPY] | loaded[OURS])) <= FOREIGN_LIMIT


def test_the_count_of_modules_can_fail(loaded: dict[str, set[str]]) -> None:
    assert len(foreign(loaded[NUMPY] | loaded[OURS] | loaded[SCIPY_STATS])) > FOREIGN_LIMIT


def test_an_import_changes_no_setting(found: tuple[dict[str, set[str]], bool]) -> None:
    assert found[1] is False


# ---------------------------------------------------------------------------------------------------------- source code


def at_import(body: list[ast.stmt]) -> Iterator[str]:
    """The modules that the statements import when they are executed, functions and TYPE_CHECKING blocks left out."""
    for node in body:
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                yield module
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                yield from at_import(node.orelse)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                pass
            case _:
                for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                    yield from at_import(getattr(node, field, []))


def heavy_at_import(root: Path) -> list[str]:
    """The modules that load something heavy as soon as they are imported; in ntk.analytic, JAX is not counted."""
    complaints = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        relative = path.relative_to(root)
        banned = HEAVY - JAX if relative.parts[:2] == ("ntk", "analytic") else HEAVY
        for name in at_import(ast.parse(path.read_text()).body):
            if name.partition(".")[0] in banned:
                complaints.append(f"{relative.as_posix()} imports {name}")
    return complaints


def test_no_module_loads_anything_heavy_at_its_top() -> None:
    assert heavy_at_import(ROOT) == []


@pytest.mark.parametrize(
    ("source", "complains"),
    [
        ("import jax.numpy as jnp", True),
        ("from matplotlib.figure import Figure", True),
        ("try:\n    import pandas\nexcept ImportError:\n    pandas = None", True),
        ("try:\n    import json\nexcept ImportError:\n    import xarray", True),
        ("with open('x'):\n    import xarray", True),
        ("class A:\n    import sklearn", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import json\nelse:\n    import pandas", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas", False),
        ("def f():\n    import jax", False),
        ("import torch, numpy, scipy.linalg", False),
        ("import jaxtyping", False),
    ],
)
def test_a_heavy_import_at_the_top_is_noticed(tmp_path: Path, source: str, complains: bool) -> None:
    (tmp_path / "ntk").mkdir()
    (tmp_path / "ntk" / "module.py").write_text(source)
    assert bool(heavy_at_import(tmp_path)) is complains


def test_jax_may_be_imported_behind_its_door_only(tmp_path: Path) -> None:
    for name in ("ntk/analytic", "diagnostics/analytic"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "maps.py").write_text("import jax\nimport tensorflow")
    assert heavy_at_import(tmp_path) == [
        "diagnostics/analytic/maps.py imports jax",
        "diagnostics/analytic/maps.py imports tensorflow",
        "ntk/analytic/maps.py imports tensorflow",
    ]


# ------------------------------------------------------------------------------------------------------------ contracts


ARROWS = "diagnostics sits on top of ntk and mimicnorm, which know nothing of each other"
TORCH_ONLY = "mimicnorm imports torch only"
DOOR = "JAX and neural-tangents stay behind ntk.analytic"
NO_TENSORFLOW = "nothing imports TensorFlow"
NO_TORCH = "ntk.analytic does not import torch"

FORBIDDEN = {
    ("ntk.planted_a", "mimicnorm"): ARROWS,
    ("ntk.planted_b", "diagnostics"): ARROWS,
    ("mimicnorm.planted_a", "ntk"): ARROWS,
    ("mimicnorm.methods.planted", "scipy"): TORCH_ONLY,
    ("mimicnorm.planted_b", "numpy"): TORCH_ONLY,
    ("ntk.planted_c", "jax"): DOOR,
    ("diagnostics.probes.planted", "jax"): DOOR,
    ("diagnostics.planted_a", "neural_tangents"): DOOR,
    ("ntk.analytic.planted_a", "tensorflow"): NO_TENSORFLOW,
    ("ntk.analytic.planted_b", "torch"): NO_TORCH,
}
"""(importer, imported) to the one contract that it breaks."""

ADMITTED = [
    ("ntk.analytic.planted_c", "jax"),
    ("ntk.analytic.planted_d", "neural_tangents"),
    ("diagnostics.planted_b", "ntk.analytic"),
    ("diagnostics.planted_c", "pandas"),
    ("mimicnorm.planted_c", "torch"),
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages and their contracts, to plant imports in."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def broken_contracts(root: Path) -> dict[tuple[str, str], str]:
    """The imports that import-linter objects to in the packages there, and the contract that each breaks."""
    program = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as main; main()"
    command = [sys.executable, "-c", program, "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert len(re.findall(r" (?:KEPT|BROKEN)\b", done.stdout)) == 5, done.stdout + done.stderr
    contracts = {ARROWS, TORCH_ONLY, DOOR, NO_TENSORFLOW, NO_TORCH}
    found, contract = {}, ""
    for line in done.stdout.splitlines():
        contract = line if line in contracts else contract
        if edge := re.match(r"-\s+(\S+) -> (\S+) \(l\.\d+\)", line):
            found[edge[1], edge[2]] = contract
    assert done.returncode == bool(found), done.stdout + done.stderr
    return found


def test_the_contracts_hold(copy: Path) -> None:
    assert broken_contracts(copy) == {}


def test_the_contracts_notice_imports_inside_functions(copy: Path) -> None:
    for importer, imported in [*FORBIDDEN, *ADMITTED]:
        (copy / Path(*importer.split("."))).with_suffix(".py").write_text(f"def f() -> None:\n    import {imported}\n")
    assert broken_contracts(copy) == FORBIDDEN
