"""All claims, in the order of the report."""

from diagnostics.claims.claim import Claim
from diagnostics.claims.mimicnorm import batch_norm, conditioning, last_batch_norm, practice, weight_mean

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for part in (weight_mean, batch_norm, conditioning, last_batch_norm, practice)
    for claim in part.CLAIMS
}
"""Name to claim."""
