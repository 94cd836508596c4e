"""No effect at import, no global flag, no TensorFlow: each in a fresh interpreter, with a control that can fail."""

import subprocess
import sys

import jax
import numpy as np

from ntk.analytic import propagate
from tests.ntk.analytic.cases import autoregressive

IMPORT_COMPAT = """
import sys
import jax.core, jax.interpreters.ad
before = set(vars(jax.core)), set(vars(jax.interpreters.ad))
from ntk.analytic import compat
import jax
present = lambda name: any(m == name or m.startswith(name + ".") for m in sys.modules)
print(present("tensorflow"), present("jax.util"), present("neural_tangents.experimental"))
print((set(vars(jax.core)), set(vars(jax.interpreters.ad))) == before, jax.config.jax_enable_x64)
print(compat.nt.__version__, hasattr(compat.nt, "experimental"), compat.stax is compat.neural_tangents.stax)
"""
WITHOUT_NEURAL_TANGENTS = """
import sys
sys.modules["neural_tangents"] = None
import ntk.analytic
try:
    from ntk.analytic import compat
except ImportError as error:
    print(type(error).__name__, error)
"""
FLAG = """
import sys
import jax
import numpy as np
import ntk.analytic
print("neural_tangents" in sys.modules, "tensorflow" in sys.modules, jax.config.jax_enable_x64)
gram = 0.9 ** np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
for flag in (False, True):
    jax.config.update("jax_enable_x64", flag)
    kernels = ntk.analytic.propagate(gram, 2, "batch_norm")
    print(jax.config.jax_enable_x64, jax.numpy.ones(1).dtype, kernels.ntk.dtype, float(kernels.ntk[0, 0]))
"""


def fresh(code: str, *arguments: str) -> list[str]:
    """Run code in a new interpreter, warnings being errors; return the lines printed."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_compat_leaves_jax_as_it_was() -> None:
    modules, jax_state, package = fresh(IMPORT_COMPAT)
    assert modules == "False False False"
    assert jax_state == "True False"
    assert package == "0.6.5 False True"


def test_the_same_check_sees_a_loaded_module() -> None:
    control = "import sys, types\nsys.modules['tensorflow.python'] = types.ModuleType('tensorflow')\n"
    assert fresh(control + "\n".join(IMPORT_COMPAT.splitlines()[-4:-2]))[0] == "True False False"


def test_missing_neural_tangents() -> None:
    (line,) = fresh(WITHOUT_NEURAL_TANGENTS)
    assert line.startswith("ImportError neural_tangents: must be installed")
    assert "pip install --no-deps neural-tangents==0.6.5" in line


def test_global_flag_neither_matters_nor_changes() -> None:
    imported, off, on = (line.split() for line in fresh(FLAG))
    assert imported == ["False", "False", "False"]
    assert off[:3] == ["False", "float32", "float64"]
    assert on[:3] == ["True", "float64", "float64"]
    expected = propagate(autoregressive(), 2, "batch_norm").ntk[0, 0]
    assert float(off[3]) == float(on[3]) == expected


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
