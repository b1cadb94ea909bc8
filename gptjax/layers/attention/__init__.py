"""Scaled dot-product attention: masks, the key/value cache, and the kernels that compute it."""
