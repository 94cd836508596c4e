"""Reports: HTML for a reader, JSON for a program."""
