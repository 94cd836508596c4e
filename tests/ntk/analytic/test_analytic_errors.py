"""What propagate refuses, and what it says."""

from typing import Any

import numpy as np
import pytest

from ntk.analytic import propagate
from ntk.errors import BatchTooSmallError, CentredRankError, GramError, UnknownNameError
from tests.ntk.analytic.cases import autoregressive, circle, constant_half, random_covariance

INDEFINITE = np.eye(4) - 0.5
NAN = np.where(np.eye(4) > 0, np.nan, 0.5)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (
            np.ones(4),
            r"gram: must be a square matrix \[n, n\]; received shape \(4,\)\. For inputs x \[n, d\] pass x @ x\.T",
        ),
        (np.ones((3, 4)), r"gram: must be a square matrix .* received shape \(3, 4\)"),
        (np.ones((0, 0)), r"gram: must be a square matrix .* received shape \(0, 0\)"),
        (NAN, r"gram: must be finite; 4 of its 16 entries are not\. Look for NaN"),
        (np.triu(np.ones((4, 4))), r"gram: must be symmetric; entries differ .* by up to 1 .* Pass the Gram matrix"),
        (INDEFINITE, r"gram: must be positive semi-definite.* lowest eigenvalue is -1 .* Pass x @ x\.T / d"),
        (np.diag([1.0, 0.0, 1.0]), r"gram: must have a positive diagonal.* entry \(1, 1\) is 0\.0\. Remove the input"),
    ],
)
def test_gram(gram: np.ndarray, message: str) -> None:
    with pytest.raises(GramError, match=message):
        propagate(gram, 1)


@pytest.mark.parametrize("depth", [0, -1, 2.0, True, "3"])
def test_depth(depth: Any) -> None:
    with pytest.raises(ValueError, match=r"depth: must be an integer of at least 1; received .* It counts activations"):
        propagate(constant_half(), depth)


def test_integers_of_numpy_are_depths() -> None:
    assert propagate(constant_half(), np.int64(2)).depth == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "weightmean"}, "norm: must be one of .* received 'weightmean'. Nearest: 'weight_mean'"),
        ({"activation": "swish"}, "activation: must be one of .* received 'swish'"),
        ({"parametrization": "mup"}, "parametrization: must be one of 'ntk', 'standard'; received 'mup'"),
        ({"sigma_w2": -1.0}, "sigma_w2: must be a finite, positive variance; received -1.0"),
        ({"sigma_b2": np.inf}, "sigma_b2: must be a finite, non-negative variance; received inf"),
        ({"n_statistics": 5}, "n_statistics: only for norm='batch_norm'.*received norm='none'. Leave out"),
        ({"statistics": "constant", "affine": True}, "statistics, affine: only for norm='batch_norm'"),
        ({"population": True, "norm": "weight_mean"}, "population: only for norm='batch_norm'.*norm='weight_mean'"),
        ({"projected": False}, "projected: only for norm='weight_mean'.*Leave out"),
        ({"mean_correction": True, "norm": "batch_norm"}, "mean_correction: only for norm='weight_mean'"),
        ({"mean_correction": True, "norm": "weight_mean"}, "width: required here; received None.*1 − 1/fan-in"),
        (
            {"width": 64},
            "width: requires parametrization='standard' or mean_correction=True.*received 64. Leave it out",
        ),
        ({"bias_trained": True}, "bias_trained: requires parametrization='standard'"),
        (
            {"parametrization": "standard"},
            "width: required here; received None.*its fan-in.*Pass one int, or 2",
        ),
        ({"parametrization": "standard", "width": (8, 8, 8)}, "width: must hold depth \\+ 1 = 2 fan-ins; received 3"),
        ({"parametrization": "standard", "width": (8, 0)}, "width: must be an integer of at least 1; received 0"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        propagate(constant_half(), 1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"statistics": "running"},
            "statistics: must be one of 'differentiated', 'mean_differentiated', 'constant'; received",
        ),
        (
            {"activation": "gelu"},
            "activation: must be 'relu', 'leaky_relu', .* under norm='batch_norm'.*received 'gelu'.*measure",
        ),
        ({"sigma_b2": 0.1}, "sigma_b2: must be 0 under norm='batch_norm'.*received 0.1. Leave it out"),
        (
            {"n_statistics": 11},
            "n_statistics: must be at most the number of rows, 10; received 11. The batch comes first",
        ),
        ({"n_statistics": 3}, r"n_statistics: must be an integer of at least 4; received 3.*diverges for B <= 3"),
        ({"n_statistics": 6.0}, "n_statistics: must be an integer of at least 4; received 6.0"),
    ],
)
def test_batch_norm_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        propagate(constant_half(), 1, "batch_norm", **options)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batch_of_three_or_less(batch_size: int) -> None:
    message = (
        r"gram \(number of rows\): must be an integer of at least 4; received \d.*for B <= 3 .*1\.788189977.*batch of 4"
    )
    with pytest.raises(BatchTooSmallError, match=message):
        propagate(autoregressive(batch_size), 1, "batch_norm")


def test_points_on_a_circle() -> None:
    message = (
        "gram: must have a centred rank of at least 3 .* found 2 over 10 rows.*points on a circle.*norm='weight_mean'"
    )
    with pytest.raises(CentredRankError, match=message):
        propagate(circle(), 1, "batch_norm")
    shifted = circle() + 3.0  # a common offset adds a direction that the batch mean removes
    with pytest.raises(CentredRankError, match=message):
        propagate(shifted, 1, "batch_norm")


def test_points_on_a_circle_in_single_precision() -> None:
    with pytest.raises(CentredRankError, match="found 2 over 10 rows"):
        propagate(circle().astype(np.float32), 1, "batch_norm")


def test_test_points_need_rank_five() -> None:
    gram = random_covariance(7, 3)
    message = r"gram: must have a centred rank of at least 5 .* found 4 over 5 rows.*test points.*statistics='constant'"
    with pytest.raises(CentredRankError, match=message):
        propagate(gram, 1, "batch_norm", n_statistics=5)
    assert np.all(np.isfinite(propagate(gram, 1, "batch_norm", n_statistics=5, statistics="constant").ntk))
    assert np.all(np.isfinite(propagate(gram, 1, "batch_norm", n_statistics=6).ntk))


def test_overflow_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"depth: must keep the kernels within float64; at depth \d+ of 3000 .*1\.46694"
    ):
        propagate(constant_half(2), 3000, "weight_mean")


def test_unknown_activation_has_a_name() -> None:
    with pytest.raises(UnknownNameError, match=r"activation: must be one of 'relu'.*received 'rleu'. Nearest: 'relu'"):
        propagate(constant_half(), 1, activation="rleu")
