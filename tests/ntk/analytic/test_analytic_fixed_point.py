"""Closed forms of deep BatchNorm networks: docs/mathematics.md §5.4 and §9.4."""

import math

import numpy as np
import pytest

from ntk.analytic import batch_norm_fixed_point, gradient_growth
from tests.ntk.analytic.cases import printed, standard_scores

TABLE = """
4   -0.33333333 0.1694965880 3.084060948 2           8.1046687 1.8163559 0.3750000000
8   -0.14285714 0.2501349329 1.788189977 1.2         6.2749358 3.6685861 0.3417968750
10  -0.11111111 0.2647212355 1.696009869 1.142857143 6.0768658 4.6002840 0.3364562988
16  -0.06666667 0.2856841705 1.589950417 1.076923077 5.8281859 7.3990556 0.3290909529
64  -0.01587302 0.3104134786 1.493062938 1.016393443 5.5766145 29.809239 0.3208460997
256 -0.00392157 0.3163515495 1.473234263 1.003952569 5.5216137 119.46146 0.3189346339
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_table(row: str) -> None:
    size, correlation, rectified, growth, linear, ntk, nngp, cross = row.split()
    point = batch_norm_fixed_point(int(size))
    printed(point.normalized_correlation, correlation)
    printed(point.rectified_correlation, rectified)
    printed(point.gradient_growth, growth)
    printed(point.ntk_condition_number, ntk)
    printed(point.nngp_condition_number, nngp)
    printed(point.cross_batch_correlation, cross, roundings=int(size))
    printed(gradient_growth("batch_norm", int(size)), growth)
    printed(gradient_growth("batch_norm", int(size), "linear"), linear if "." in linear else f"{linear}.0000000000")


def test_limit_of_large_batches() -> None:
    limit = batch_norm_fixed_point()
    printed(limit.rectified_correlation, "0.3183098862")
    printed(limit.gradient_growth, "1.466942207")
    printed(limit.ntk_condition_number, "5.5038768")
    printed(limit.cross_batch_correlation, "0.3183098862")
    assert limit.nngp_condition_number == math.inf
    assert limit.batch_size is None
    large = batch_norm_fixed_point(10**6)
    # All approach as 1/B, with coefficients below 10.
    assert large.gradient_growth == pytest.approx(limit.gradient_growth, abs=1e-5)
    assert large.ntk_condition_number == pytest.approx(limit.ntk_condition_number, abs=1e-5)
    assert large.cross_batch_correlation == pytest.approx(limit.cross_batch_correlation, abs=1e-5)


def test_gradient_growth_of_the_others() -> None:
    assert gradient_growth("none") == 1
    printed(gradient_growth("weight_mean"), "1.46694220692426")
    printed(gradient_growth("weight_mean", activation="gelu"), "1.3188449709")
    printed(gradient_growth("none", activation="erf"), "1.2257000038")
    assert gradient_growth("weight_mean", batch_size=16) == gradient_growth("weight_mean")
    assert gradient_growth("batch_norm", activation="linear") == 1
    assert gradient_growth("batch_norm", 16, "identity") == gradient_growth("batch_norm", 16, "linear")
    assert gradient_growth("batch_norm") == pytest.approx(gradient_growth("weight_mean"), rel=1e-15)


@pytest.mark.parametrize("batch_size", [5, 12])
def test_sphere(batch_size: int) -> None:
    # The normalized batch is uniform on the sphere orthogonal to the constant vector; its ReLU decides J and E φ(y).
    z = np.random.default_rng(8).standard_normal((100_000, batch_size))
    z -= z.mean(axis=1, keepdims=True)
    x = np.maximum(z / z.std(axis=1, keepdims=True), 0)
    point = batch_norm_fixed_point(batch_size)
    samples = np.stack([x[:, 0] * x[:, 1], x[:, 0]], axis=1)
    expected = np.array([point.rectified_correlation / 2, math.sqrt(point.cross_batch_correlation / 2)])
    assert np.abs(standard_scores(samples, expected)).max() < 4
    wrong = batch_norm_fixed_point(2 * batch_size)
    expected = np.array([wrong.rectified_correlation / 2, math.sqrt(wrong.cross_batch_correlation / 2)])
    assert np.abs(standard_scores(samples, expected)).max() > 4


@pytest.mark.parametrize("batch_size", [3, 1, 0, 8.0, True])
def test_batch_too_small(batch_size: object) -> None:
    message = r"batch_size: must be an integer of at least 4; received .* for B <= 3 .*3\.084060948.* Use a batch of 4"
    with pytest.raises(ValueError, match=message):
        gradient_growth("batch_norm", batch_size)
    with pytest.raises(ValueError, match=message):
        gradient_growth("batch_norm", batch_size, "linear")


def test_activation_without_closed_form() -> None:
    with pytest.raises(
        ValueError, match=r"activation: must be one of 'relu', 'linear', 'identity'; received 'gelu'.*measure"
    ):
        gradient_growth("batch_norm", 16, "gelu")


def test_unknown_norm() -> None:
    with pytest.raises(ValueError, match=r"norm: must be one of .* received 'layer_norm'"):
        gradient_growth("layer_norm")
