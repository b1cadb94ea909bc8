"""Attention: equation 1, its masks and cache, and the kernels that compute it."""
