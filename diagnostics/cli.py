"""Command line: one thin layer over the Python interface."""
