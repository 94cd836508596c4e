"""Kernels of neural networks: empirical in PyTorch, analytic in JAX (behind ntk.analytic)."""
