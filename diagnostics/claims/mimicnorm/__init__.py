"""MimicNorm (arXiv 2010.09278): what it says, where, and how it is decided."""

from diagnostics.claims.mimicnorm import batch_norm, conditioning, last_batch_norm, practice, weight_mean

CLAIMS = (*weight_mean.CLAIMS, *batch_norm.CLAIMS, *conditioning.CLAIMS, *last_batch_norm.CLAIMS, *practice.CLAIMS)

__all__ = ["CLAIMS"]
