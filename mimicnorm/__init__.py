"""Normalization methods, each exact to its source, for any PyTorch network."""
