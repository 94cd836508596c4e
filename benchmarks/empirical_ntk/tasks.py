"""What is computed. No framework is imported here: the process that leads the others stays small."""

from __future__ import annotations

from dataclasses import dataclass

OUTPUTS = 10
GIB = 2**30

PRODUCT_SIZE = 3072
PRODUCT_OPERATIONS = 2.0 * PRODUCT_SIZE**3
"""Of the square matrix product whose rate sets the floor."""

RESIDUAL_UNITS = (
    *((16, 16, 1), (16, 16, 1), (16, 16, 1)),
    *((16, 32, 2), (32, 32, 1), (32, 32, 1)),
    *((32, 64, 2), (64, 64, 1), (64, 64, 1)),
)
"""Channels in, channels out and stride of each residual unit of ResNet-20."""


@dataclass(frozen=True)
class Task:
    """One kernel to compute.

    Attributes:
        name: Short name.
        network: Key of `networks.NETWORKS`.
        says: The network in words.
        examples: Number N of examples.
        shape: Of one example.
        reduce: "none", for values [N, N, 10, 10], or "trace", for [N, N].
        quick: N of a run that only shows that everything works.
        dtype: What the contenders compute in.
        mixes: Whether the examples of the batch meet in the network (batch statistics).
        eigenvalues: Whether the largest and the smallest eigenvalue are asked for, in place of the kernel.
        max_memory: Bytes that bound the peak, or None.
    """

    name: str
    network: str
    says: str
    examples: int
    shape: tuple[int, ...]
    reduce: str = "none"
    quick: int = 8
    dtype: str = "float32"
    mixes: bool = False
    eigenvalues: bool = False
    max_memory: int | None = None


_MLP = "MLP 784-512-512-512-10, ReLU"
_BATCH_NORM = "MLP 784-256-256-10 with BatchNorm before each ReLU, train mode, one batch"

TASKS = {
    task.name: task
    for task in (
        Task("T1", "mlp", _MLP, 256, (784,)),
        Task("T2", "mlp", _MLP, 1000, (784,), reduce="trace"),
        Task("T3", "deep_mlp", "MLP 784-(256 x 20)-10, ReLU", 200, (784,)),
        Task("T4", "conv", "3 x 32 x 32, conv 3 x 3 of 32, 64 and 64, ReLU, average pool, linear", 64, (3, 32, 32)),
        Task("T5", "resnet20", "ResNet-20 without normalization", 32, (3, 32, 32), quick=4),
        Task("T6", "batch_norm_mlp", _BATCH_NORM, 128, (784,), mixes=True),
        Task("T6-float64", "batch_norm_mlp", _BATCH_NORM, 128, (784,), dtype="float64", mixes=True),
        Task("T7", "mlp", _MLP, 4000, (784,), reduce="trace", quick=64, eigenvalues=True),
        Task("T1-1GiB", "mlp", _MLP, 1000, (784,), quick=64, max_memory=GIB),
    )
}
