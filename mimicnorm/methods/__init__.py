"""Published normalization methods, one per file."""
