"""Random keys whose numbers are the same on every platform and in every program."""

import jax


def random_key(seed: int | jax.Array) -> jax.Array:
    """The Threefry key of `seed` (Salmon et al. 2011).

    JAX's default generator is not used, since JAX_DEFAULT_PRNG_IMPL may set it to rbg or
    unsafe_rbg, whose numbers differ between platforms and meshes, and under `jax.vmap` are all
    drawn from the first key.
    """
    return jax.random.key(seed, impl="threefry2x32")
