"""One paper per folder: what it says, where, and how it is decided."""

from diagnostics.claims.catalogue import CLAIMS
from diagnostics.claims.claim import Claim, Control, Outcome, Prediction, Size, Theory, Verdict

__all__ = ["CLAIMS", "Claim", "Control", "Outcome", "Prediction", "Size", "Theory", "Verdict"]
