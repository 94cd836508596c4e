"""Predictions of a finite kernel: against closed forms, neural-tangents, and linearized networks that were trained."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from ntk import errors
from tests.ntk.oracle import build
from tests.ntk.test_ntk_lanczos import last_batch_norm

N, T, C = 6, 4, 3


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, C)).double()
    return model, torch.randn(N, 4).double(), torch.randn(T, 4).double(), torch.randn(N, C).double()


def kernels(model: nn.Module, x: torch.Tensor, test: torch.Tensor, reduce: str) -> tuple[ntk.KernelResult, ...]:
    return tuple(ntk.empirical_ntk(model, *pair, reduce=reduce) for pair in ((x,), (test, x), (test,)))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
def test_closed_form(reduce: str, ridge: float) -> None:
    model, x, test, y = network()
    train, cross, own = kernels(model, x, test, reduce)
    f0, f0_test = model(x), model(test)
    found = ntk.predict(train, y, cross, kernel_test_test=own, ridge=ridge, f0_train=f0, f0_test=f0_test)
    inverse = np.linalg.inv(train.flatten() + ridge * np.eye(len(train.flatten())))
    residual = (y - f0).detach().numpy().reshape(len(inverse), -1)
    expected = f0_test.detach().numpy() + (cross.flatten() @ inverse @ residual).reshape(T, C)
    assert found.mean == pytest.approx(expected, rel=1e-10, abs=1e-10)
    posterior = own.flatten() - cross.flatten() @ inverse @ cross.flatten().T
    assert found.variance == pytest.approx(
        np.broadcast_to(np.diag(posterior).reshape(T, -1), (T, C)), rel=1e-9, abs=1e-10
    )
    assert (found.rank, found.size) == (len(inverse), len(inverse))
    assert found.unreachable < 1e-12
    if ridge == 0:
        assert found.train == pytest.approx(y.numpy(), rel=1e-9, abs=1e-9)
    else:
        assert np.abs(found.train - y.numpy()).max() > 1e-3
    assert not found.mean.flags.writeable
    assert "at the end of training" in repr(found)
    assert "<svg" in found._repr_html_()


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("reduce", ["none", "trace"])
def test_gradient_flow_solves_its_equation(reduce: str, ridge: float) -> None:
    """d(f, α)/dt by a matrix exponential of the whole system, with no eigenbasis."""
    from scipy.linalg import expm

    model, x, test, y = network()
    train, cross, _ = kernels(model, x, test, reduce)
    matrix, time, rate = train.flatten(), 0.7, 0.4
    residual = y.numpy().reshape(len(matrix), -1)
    shifted = matrix + ridge * np.eye(len(matrix))
    weights = np.linalg.solve(shifted, residual - expm(-rate * time * shifted) @ residual)
    found = ntk.predict(train, y, cross, ridge=ridge, time=time, learning_rate=rate)
    assert found.mean == pytest.approx((cross.flatten() @ weights).reshape(T, C), rel=1e-10, abs=1e-10)
    assert found.train == pytest.approx((matrix @ weights).reshape(N, C), rel=1e-10, abs=1e-10)
    assert ntk.predict(train, y, cross, ridge=ridge, time=0.0).mean == pytest.approx(np.zeros((T, C)))
    late = ntk.predict(train, y, cross, ridge=ridge, time=1e9).mean
    assert late == pytest.approx(ntk.predict(train, y, cross, ridge=ridge).mean, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("reduce", "time"), [("none", 2.5), ("trace", None)])
def test_neural_tangents_agrees(reduce: str, time: float | None) -> None:
    """Its loss is the mean over examples and outputs, so that its time is as many times ours."""
    import jax

    from ntk.analytic.compat import nt

    model, x, test, y = network()
    train, cross, _ = kernels(model, x, test, reduce)
    f0, f0_test = (model(z).detach().numpy() for z in (x, test))
    axes = () if reduce == "none" else (-1,)
    with jax.enable_x64(True):
        predictor = nt.predict.gradient_descent_mse(train.values, y.numpy(), trace_axes=axes)
        theirs = predictor(None if time is None else time * N * C, f0, f0_test, cross.values)
    found = ntk.predict(train, y, cross, time=time, f0_train=f0, f0_test=f0_test)
    assert found.train == pytest.approx(np.asarray(theirs[0]), rel=1e-8, abs=1e-8)
    assert found.mean == pytest.approx(np.asarray(theirs[1]), rel=1e-8, abs=1e-8)


def test_a_linearized_network_that_was_trained_by_small_steps() -> None:
    """Under BatchNorm too; the error of a step halves with it, and vanishes in the limit. Control: no f0."""
    model, x, test = build("conv with BatchNorm", n1=6)
    y = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)
    train, cross, _ = kernels(model, x, test, "none")
    time = 3 / float(np.linalg.eigvalsh(train.flatten())[-1])
    twin = ntk.linearize(model)
    f0, f0_test = twin(x).detach(), twin(test).detach()
    found = ntk.predict(train, y, cross, time=time, f0_train=f0, f0_test=f0_test)
    trained = []
    for steps in (24, 48, 96):
        twin = ntk.linearize(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=time / steps)
        for _ in range(steps):
            optimizer.zero_grad()
            ((twin(x) - y).square().sum() / 2).backward()
            optimizer.step()
        trained.append(twin(test).detach().numpy())
    error = [np.abs(output - found.mean).max() for output in trained]
    assert np.log2(error[1] / error[2]) == pytest.approx(1, abs=0.05)
    once = [2 * trained[1] - trained[0], 2 * trained[2] - trained[1]]
    limit = (4 * once[1] - once[0]) / 3
    moved = np.abs(found.mean - f0_test.numpy()).max()
    assert np.abs(limit - found.mean).max() < 1e-5 * moved
    assert np.abs(ntk.predict(train, y, cross, time=time).mean - limit).max() > 0.1 * moved


def test_a_null_space_stays_what_it_was() -> None:
    model, x = last_batch_norm()
    torch.manual_seed(1)
    y, f0 = torch.randn(20, 3).double(), model(x).detach()
    train, cross = ntk.empirical_ntk(model, x), ntk.empirical_ntk(model, x, x)
    found = ntk.predict(train, y, cross, f0_train=f0, f0_test=f0)
    assert (found.rank, found.size) == (54, 60)
    residual = (y - f0).numpy()
    basis = np.stack([np.ones(20), *f0.numpy().T])  # neither the mean of an output nor its own direction moves
    reached = residual.copy()
    for column in range(3):
        q = np.linalg.qr(basis[[0, column + 1]].T)[0]
        reached[:, column] -= q @ (q.T @ residual[:, column])
    assert found.mean == pytest.approx(f0.numpy() + reached, abs=1e-7)
    assert found.unreachable == pytest.approx(np.linalg.norm(residual - reached) / np.linalg.norm(residual), rel=1e-8)
    assert "rank 54 of 60; " in repr(found)


def test_float32_noise_is_named() -> None:
    model, x = nn.Linear(8, 1), torch.diag(torch.logspace(0, -2.4, 8))
    values = ntk.empirical_ntk(model, x, params=["weight"], reduce="sum")
    cross = ntk.empirical_ntk(model, x, x, params=["weight"], reduce="sum")
    with pytest.warns(errors.PrecisionFloorWarning, match=r"rests on eigenvalues down to .* float32.*or give a ridge"):
        ntk.predict(values, torch.ones(8), cross)
    ntk.predict(values, torch.ones(8), cross, ridge=1.0)


def test_refusals() -> None:
    model, x, test, y = network()
    train, cross, own = kernels(model, x, test, "none")
    shared = ntk.empirical_ntk(model, test, x, reduce="trace")
    with pytest.raises(errors.ConventionError, match=r"kernel_test_train must be of the .*axes, reduce differ"):
        ntk.predict(train, y, shared)
    part = ntk.layerwise_ntk(model, test, x)["0"]
    with pytest.raises(errors.ConventionError, match="layer differ"):
        ntk.predict(train, y, part)
    with pytest.raises(errors.ConventionError, match=r"kernel_train_train must be a kernel of one batch.*x2=None"):
        ntk.predict(ntk.empirical_ntk(model, x, x), y, cross)
    with pytest.raises(TypeError, match=r"kernel_train_train must be a KernelResult.*ndarray.*training_dynamics"):
        ntk.predict(train.values, y, cross)
    with pytest.raises(ValueError, match=r"test examples as rows.*\(6, 6, 3, 3\).*got \(6, 4, 3, 3\)"):
        ntk.predict(train, y, ntk.empirical_ntk(model, x, test), kernel_test_test=train)
    with pytest.raises(ValueError, match=re.escape("y_train must have shape [6, 3], one row an example; got (6,)")):
        ntk.predict(train, y[:, 0], cross)
    with pytest.raises(ValueError, match=re.escape("f0_test must have shape [4, 3], one row an example; got (6, 3)")):
        ntk.predict(train, y, cross, f0_test=y)
    with pytest.raises(ValueError, match="y_train must be finite; 18 of 18"):
        ntk.predict(train, y / 0, cross)
    for name in ("ridge", "time", "learning_rate"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0; got -1"):
            ntk.predict(train, y, cross, **{name: -1.0})
    with pytest.raises(ValueError, match=r"posterior, at time=None only; got time=1.0"):
        ntk.predict(train, y, cross, kernel_test_test=own, time=1.0)


def test_batch_norm_in_another_mode_is_another_convention() -> None:
    model, x, test = build("conv with BatchNorm")
    train = ntk.empirical_ntk(model, x)
    ntk.predict(train, torch.zeros(5, 3), ntk.empirical_ntk(model, test, x))
    model.eval()
    with pytest.raises(errors.ConventionError, match="mode, statistics differ"):
        ntk.predict(train, torch.zeros(5, 3), ntk.empirical_ntk(model, test, x))
