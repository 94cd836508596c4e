"""A probe that measures a made-up decay, and claims about it: nothing here depends on the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from diagnostics.claims.claim import Claim, Control, Outcome, Prediction, Size, Theory
from diagnostics.measurement import Measurement
from diagnostics.plots import Curve
from diagnostics.subject import Subject

DEPTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Decay:
    """Measures level · 2^-depth with noise from the subject's own generator."""

    noise: float = 0.002
    name: str = "decay"

    def measure(self, subject: Subject) -> Measurement:
        noise = torch.randn(len(DEPTHS), generator=subject.generator(), dtype=torch.float64).numpy()
        level = float(subject.x[0])
        return Measurement(
            probe=self.name,
            quantity="correlation of two <made-up> inputs",
            unit="1",
            estimate=level * 2.0 ** -np.array(DEPTHS) + self.noise * noise,
            axes={"depth": DEPTHS},
            seeds=(subject.seed,),
        )


@dataclass(frozen=True)
class Subjects:
    """Two made-up networks, told apart by their level."""

    plain: float = 1.0

    def __call__(self, seed: int, width: int) -> Mapping[Any, Subject]:
        levels = {"plain": self.plain, "mimicnorm": 0.5}
        return {k: Subject(nn.Identity(), torch.tensor([v]), seed=seed, name=k) for k, v in levels.items()}


def at_depth_one(measurement: Measurement) -> float:
    return measurement.value(method="plain", depth=1)


def halving(measurement: Measurement) -> Theory:
    x = np.linspace(1, 8, 40)
    return Theory(0.5, "closed form, by hand", {"plain": (x, 2.0**-x), "mimicnorm": (x, 0.5 * 2.0**-x)})


def without_library(measurement: Measurement) -> Theory:
    raise ImportError("jaxlib is not installed")


def claim(name: str = "halves", **changes: Any) -> Claim:
    """A claim that is supported as catalogued, with the fields named replaced."""
    fields: dict[str, Any] = {
        "name": name,
        "title": f"The correlation halves ({name})",
        "statement": "The correlation of two inputs is halved by every layer of a plain network.",
        "source": "A. Author & B. Author (2020), A made-up paper",
        "locator": "Theorem 1",
        "scope": "Made-up networks of any width, at initialization.",
        "probe": Decay(),
        "axis": "method",
        "subjects": Subjects(),
        "statistic": at_depth_one,
        "statistic_name": "correlation after one layer",
        "prediction": Prediction.point(0.5, 0.05, "the statement, at depth one"),
        "theory": halving,
        "expected": Outcome.SUPPORTED,
        "explanation": "The made-up networks halve by construction. The noise is far below the resolution.",
        "control": Control("a network that starts at 0.6", {"subjects": Subjects(plain=0.6)}, Outcome.REFUTED),
        "picture": Curve("depth", "method", xlabel="depth", ylabel="correlation", xscale="log"),
        "sizes": {"quick": Size(4, 8), "full": Size(8, 16)},
        "minimum_n": 2,
    }
    return Claim(**{**fields, **changes})


def catalogue() -> dict[str, Claim]:
    """One claim of each fate."""
    low = Prediction.at_most(0.4, "the statement, at depth one")
    passing = Control("a network that starts at 0.6", {"subjects": Subjects(plain=0.6)}, Outcome.SUPPORTED)
    all_of_them = [
        claim("halves"),
        claim("vanishes", prediction=low, expected=Outcome.REFUTED, control=passing),
        claim("departs", prediction=low, control=passing),
        claim("noisy", probe=Decay(noise=0.2), expected=Outcome.INCONCLUSIVE),
        claim("missing", theory=without_library),
    ]
    return {one.name: one for one in all_of_them}
