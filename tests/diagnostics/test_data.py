"""Inputs: what comes out has the statistics that theory assumes, and a wrong name is answered with the right ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diagnostics.data import DATA, constant_correlation, digits_images, digits_vectors, inputs_of_gram, load, split
from diagnostics.errors import UsageError
from diagnostics.names import resolve, unknown


def test_digit_vectors_are_centred_by_pixel_and_scaled_by_one_number():
    x, y = digits_vectors(dtype=torch.float64)
    assert x.shape == (1797, 64)
    assert y.shape == (1797,)
    assert sorted(set(y.tolist())) == list(range(10))
    assert x.mean(dim=0).abs().max() < 1e-14
    assert x.std().item() == pytest.approx(1.0, rel=1e-12)
    from sklearn.datasets import load_digits

    raw = load_digits().data
    constant = raw.std(axis=0) == 0
    assert constant.any()
    assert np.all(x.numpy()[:, constant] == 0)
    scale = (raw[0] - raw.mean(axis=0))[~constant] / x[0].numpy()[~constant]
    assert np.allclose(scale, scale[0], rtol=1e-10)


def test_digit_images_are_standardized_color_images():
    x, y = digits_images(dtype=torch.float64)
    assert x.shape == (1797, 3, 32, 32)
    assert torch.equal(y, digits_vectors()[1])
    assert torch.equal(x[:, 0], x[:, 1])
    assert torch.equal(x[:, 0], x[:, 2])
    rounding = x[:, 0].numel() * torch.finfo(torch.float64).eps
    assert x[:, 0].mean().abs() < rounding
    assert x[:, 0].std().item() == pytest.approx(1.0, rel=rounding)
    assert x.is_contiguous()


def test_images_are_the_digits_enlarged_bilinearly():
    images, _ = digits_images(dtype=torch.float64)
    blocks = torch.nn.functional.avg_pool2d(images[:50, 0], 4)
    from sklearn.datasets import load_digits

    raw = torch.from_numpy(load_digits().images[:50])
    # The four points of a pixel lie 1/8 and 3/8 from its centre: on average 3/4 is its own and 1/8 each neighbour's.
    weights = torch.tensor([1 / 8, 3 / 4, 1 / 8], dtype=torch.float64)
    padded = torch.nn.functional.pad(raw[:, None], (1, 1, 1, 1), mode="replicate")
    expected = torch.nn.functional.conv2d(padded, (weights[:, None] * weights)[None, None])[:, 0]
    scale = (expected[0] - expected[0, 0, 0]).sum() / (blocks[0] - blocks[0, 0, 0]).sum()
    assert torch.allclose(expected - expected[0, 0, 0], scale * (blocks - blocks[0, 0, 0]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loader", [digits_vectors, digits_images])
def test_the_type_is_the_one_asked_for(loader):
    assert loader()[0].dtype == torch.float32
    assert loader(dtype=torch.float64)[0].dtype == torch.float64


def test_what_a_caller_does_to_the_digits_does_not_stay():
    x, y = digits_vectors(dtype=torch.float64)
    kept = x.clone()
    x.zero_()
    assert torch.equal(digits_vectors(dtype=torch.float64)[0], kept)
    assert len(y) == 1797


def test_a_split_deals_out_every_example_once():
    x = torch.arange(20.0)[:, None]
    y = torch.arange(20)
    x_train, y_train, x_test, y_test = split(x, y, train=15, seed=1)
    assert len(x_train) == 15
    assert len(x_test) == 5
    assert torch.equal(torch.cat([y_train, y_test]).sort().values, y)
    assert torch.equal(x_train[:, 0].long(), y_train)
    assert torch.equal(x_test[:, 0].long(), y_test)
    assert torch.equal(split(x, y, train=15, seed=1)[1], y_train)
    assert not torch.equal(split(x, y, train=15, seed=2)[1], y_train)


@pytest.mark.parametrize("train", [-1, 0, 20, 21])
def test_a_split_that_leaves_a_part_empty_is_refused(train):
    with pytest.raises(UsageError, match=f"train must lie between 1 and 19, .*; got {train}"):
        split(torch.zeros(20, 1), torch.zeros(20), train=train)


@pytest.mark.parametrize("rho", [-0.1, 0.0, 0.5, 0.99])
@pytest.mark.parametrize("m", [2, 8])
def test_inputs_have_the_gram_matrix_asked_for(m, rho):
    gram = constant_correlation(m, rho)
    assert torch.equal(gram.diagonal(), torch.ones(m, dtype=torch.float64))
    assert torch.equal(gram[0, 1:], torch.full((m - 1,), rho, dtype=torch.float64))
    x = inputs_of_gram(gram)
    assert x.shape == (m, m)
    assert torch.allclose(x @ x.T / x.shape[1], gram, rtol=1e-13, atol=1e-14)


def test_inputs_of_any_positive_gram_matrix():
    factor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = factor @ factor.T
    x = inputs_of_gram(gram)
    assert torch.allclose(x @ x.T / 5, gram, rtol=1e-12)


def test_data_sets_are_loaded_by_name():
    assert load("digits")[0].shape == (1797, 64)
    assert load("digits", images=True)[0].shape == (1797, 3, 32, 32)
    x, y = load("gaussian:5,7")
    assert x.shape == (5, 7)
    assert y.shape == (5,)
    assert y.min() >= 0
    assert y.max() < 10
    assert load("gaussian:5,7", images=True)[0].shape == (5, 3, 32, 32)
    assert torch.equal(load("gaussian:5,7")[0], x)


def test_gaussian_data_is_standard_normal():
    x, _ = load("gaussian:400,100")
    standard_error = 1 / (400 * 100) ** 0.5
    assert x.mean().abs() < 4 * standard_error
    assert abs(x.square().mean() - 1) < 4 * 2**0.5 * standard_error


def test_loading_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    load("gaussian:5,7")
    split(torch.zeros(20, 1), torch.zeros(20), train=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("spec", "nearest"), [("digit", "'digits'"), ("gausian:3,4", "'gaussian:N,D'")])
def test_an_unknown_data_set_is_answered_with_the_nearest(spec, nearest):
    with pytest.raises(UsageError) as error:
        load(spec)
    message = str(error.value)
    assert message.startswith("data must be one of digits, gaussian:N,D; got " + repr(spec))
    assert f"Did you mean {nearest}?" in message
    assert message.endswith("List them with: mimicnorm list data")


def test_a_name_far_from_all_gets_the_list_alone():
    with pytest.raises(UsageError, match=r"data must be one of digits, gaussian:N,D; got 'xyzzy'\. List them"):
        load("xyzzy")
    assert set(DATA) == {"digits", "gaussian:N,D"}


@pytest.mark.parametrize("parameters", ["", "5", "5,", "a,b", "5,7,9", "0,7", "5,-1", "2.5,3"])
def test_parameters_that_do_not_parse_are_answered_with_an_example(parameters):
    with pytest.raises(UsageError) as error:
        load(f"gaussian:{parameters}")
    message = str(error.value)
    assert "two positive whole numbers, as in gaussian:256,64" in message
    assert message.endswith(f"got gaussian:{parameters}")


def test_names_are_looked_up_in_any_registry():
    registry = {"halves": 1, "vanishes": 2}
    assert resolve("claim", "halves", registry) == 1
    with pytest.raises(
        UsageError, match=r"claim must be one of halves, vanishes; got 'halve'\. Did you mean 'halves'\?"
    ):
        resolve("claim", "halve", registry)
    assert "List them" not in unknown("profile", "quik", ("quick", "full"))
    assert issubclass(UsageError, ValueError)
