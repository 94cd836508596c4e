"""One paper per folder: what it says, where, and how it is decided."""

from diagnostics.claims.claim import Claim, Control, Outcome, Prediction, Size, Theory, Verdict
from diagnostics.claims.mimicnorm import CLAIMS as MIMICNORM_CLAIMS

CLAIMS: dict[str, Claim] = {claim.name: claim for claim in MIMICNORM_CLAIMS}
"""Name to claim, in the order of the report."""

__all__ = ["CLAIMS", "Claim", "Control", "Outcome", "Prediction", "Size", "Theory", "Verdict"]
