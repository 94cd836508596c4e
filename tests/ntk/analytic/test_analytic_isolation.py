"""No effect at import, no global flag, no TensorFlow: each in a fresh interpreter, with a control that can fail."""

import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from ntk.analytic import propagate
from tests.ntk.analytic.cases import autoregressive

PRESENT = """
import sys
present = lambda *names: [any(m == name or m.startswith(name + ".") for m in sys.modules) for name in names]
strangers = lambda: present("tensorflow", "jax.util", "neural_tangents.experimental")
"""
STORY = (
    PRESENT
    + """
import json
import jax.core, jax.interpreters.ad
import numpy as np
names = lambda: (set(vars(jax.core)), set(vars(jax.interpreters.ad)))
before = names()
import ntk.analytic
import jax
told = {"imported": [*present("neural_tangents", "tensorflow"), jax.config.jax_enable_x64]}
gram = 0.9 ** np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
for flag in (True, False):
    jax.config.update("jax_enable_x64", flag)
    ntk00 = ntk.analytic.propagate(gram, 2, "batch_norm").ntk[0, 0]
    dtypes = str(jax.numpy.ones(1).dtype), str(ntk00.dtype)
    told[f"flag {flag}"] = [jax.config.jax_enable_x64, *dtypes, float(ntk00)]
told["before compat"] = present("neural_tangents")
sys.modules["neural_tangents"] = None
try:
    from ntk.analytic import compat
except ImportError as error:
    told["missing"] = f"{type(error).__name__} {error}"
del sys.modules["neural_tangents"]
told["after missing"] = [strangers(), names() == before]
from ntk.analytic import compat
told["compat"] = [strangers(), names() == before, jax.config.jax_enable_x64]
package = compat.nt.__version__, hasattr(compat.nt, "experimental"), compat.stax is compat.neural_tangents.stax
told["package"] = package
print(json.dumps(told))
"""
)
"""Import the package, use it under both flags, miss neural-tangents, then find it; all that is seen, in one process."""


def fresh(code: str) -> Any:
    """Run code in a new interpreter, warnings being errors; return what it prints, as JSON."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return fresh(STORY)


def test_compat_leaves_jax_as_it_was(told: dict[str, Any]) -> None:
    assert told["before compat"] == [False]
    assert told["compat"] == [[False, False, False], True, False]
    assert told["package"] == ["0.6.5", False, True]


def test_the_same_check_sees_a_loaded_module() -> None:
    control = "import json, types\nsys.modules['tensorflow.python'] = types.ModuleType('tensorflow')\n"
    assert fresh(PRESENT + control + "print(json.dumps(strangers()))") == [True, False, False]


def test_missing_neural_tangents(told: dict[str, Any]) -> None:
    assert told["missing"].startswith("ImportError neural_tangents: must be installed")
    assert "pip install --no-deps neural-tangents==0.6.5" in told["missing"]
    assert told["after missing"] == [[False, False, False], True]


def test_global_flag_neither_matters_nor_changes(told: dict[str, Any]) -> None:
    assert told["imported"] == [False, False, False]
    on, off = told["flag True"], told["flag False"]
    assert off[:3] == [False, "float32", "float64"]
    assert on[:3] == [True, "float64", "float64"]
    assert off[3] == on[3] == propagate(autoregressive(), 2, "batch_norm").ntk[0, 0]


def test_flag_of_this_process() -> None:
    before = jax.config.jax_enable_x64
    propagate(autoregressive(), 1, "batch_norm")
    assert jax.config.jax_enable_x64 == before


def test_neural_tangents_trains_by_its_kernel() -> None:
    # The patched import also serves neural_tangents.predict: at infinite time the labels are met.
    from ntk.analytic.compat import nt, stax

    inputs, labels = np.random.default_rng(2).standard_normal((6, 10)), np.linspace(-1, 1, 6)[:, None]
    with jax.enable_x64(True):
        kernel = stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1))[2]
        predict = nt.predict.gradient_descent_mse_ensemble(kernel, inputs, labels)
        reached = np.array(predict(x_test=inputs, get="ntk"))
    np.testing.assert_allclose(reached, labels, atol=1e-10)
