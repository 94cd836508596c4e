"""One paper per file: what it says, where, and how it is decided."""
