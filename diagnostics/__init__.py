"""Probes, claims and reports: what a normalization method does, measured and judged."""
