"""What holds for every test."""

import gc

import pytest
import torch

# Walking through what imports leave for good took up to a fifth of the time of a file.
gc.set_threshold(10_000, 20, 10)


def pytest_collection_finish() -> None:
    """Take what the imports have made out of the garbage collector's sight."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Seed PyTorch's global generator, which layers built without a generator draw from."""
    torch.manual_seed(0)
