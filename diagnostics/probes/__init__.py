"""One phenomenon per file."""
