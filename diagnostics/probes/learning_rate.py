"""Which learning rates a network trains at: the learning-rate range test (MimicNorm, Table 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diagnostics.anatomy import check_network
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement
from diagnostics.subject import Subject
from diagnostics.training import accuracy, train


@dataclass(frozen=True)
class LearningRateRange:
    """Best test accuracy within the first epochs, against the learning rate.

    The subject's examples are split into a training and a test part; each rate starts from the same initialization,
    under SGD with momentum and weight decay as in the paper's recipe (momentum 0.9, decay 5e-4), without warm-up.

    Attributes:
        rates: Learning rates.
        epochs: Passes over the training part.
        batch_size: Examples per step.
        train_fraction: Share of the examples that is trained on.
        momentum: Of SGD.
        weight_decay: On all parameters.
    """

    rates: tuple[float, ...] = (0.01, 0.05, 0.2, 0.5, 1.0)
    epochs: int = 3
    batch_size: int = 128
    train_fraction: float = 0.75
    momentum: float = 0.9
    weight_decay: float = 5e-4

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "learning_rate"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; axis rate, accuracy in percent.

        Raises:
            UsageError: If the subject has no labels or cannot be probed.
        """
        if subject.y is None:
            raise UsageError("y must be given to train, got None; pass class indices [n]")
        check_network(subject.network(), subject.x, dropout=True)
        cut = int(self.train_fraction * len(subject.x))
        if not self.batch_size <= cut < len(subject.x):
            need = math.ceil(self.batch_size / self.train_fraction)
            raise UsageError(
                f"x must hold at least {need} examples to fill a training batch of {self.batch_size}, got "
                f"{len(subject.x)}. Pass more examples, or a smaller batch_size"
            )
        x, y, x_test, y_test = subject.x[:cut], subject.y[:cut], subject.x[cut:], subject.y[cut:]
        best = []
        for rate in self.rates:
            network = subject.network().train()
            epochs = train(
                network,
                x,
                y,
                method=subject.method,
                lr=rate,
                epochs=self.epochs,
                batch_size=self.batch_size,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                generator=subject.generator(4),
            )
            best.append(max(accuracy(trained, x_test, y_test) for trained in epochs))
        return Measurement(
            probe=self.name,
            quantity=f"best test accuracy within {self.epochs} epochs",
            unit="%",
            estimate=np.array(best),
            axes={"rate": self.rates},
            seeds=(subject.seed,),
        )
