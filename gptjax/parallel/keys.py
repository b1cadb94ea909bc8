"""Keys of random numbers: a seed means the same numbers on every platform and in every program."""

import jax


def random_key(seed: int | jax.Array) -> jax.Array:
    """The key of `seed`, of the generator Threefry (Salmon et al. 2011).

    Not of JAX's default, which JAX_DEFAULT_PRNG_IMPL may set to rbg or unsafe_rbg: their numbers
    differ between platforms and meshes, and under `jax.vmap` all come from the first of the keys.
    """
    return jax.random.key(seed, impl="threefry2x32")
