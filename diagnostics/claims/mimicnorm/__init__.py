"""MimicNorm (arXiv 2010.09278): what it says, where, and how it is decided."""
