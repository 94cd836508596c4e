"""Analytic kernels in JAX: the only door to JAX and neural-tangents."""
