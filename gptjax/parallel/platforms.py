"""Code that differs between GPUs and other platforms."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.parallel.sharding import auto_mesh

Result = TypeVar("Result")


def by_platform(
    *arguments: object, gpu: Callable[..., Result], other: Callable[..., Result]
) -> Result:
    """`gpu(*arguments)` in a program for GPUs, `other(*arguments)` in one for CPUs or TPUs.

    A GPU is slowed by memory traffic: there what is elementwise is recomputed rather than kept. A
    CPU is slowed by the recomputation, and a TPU's compiler chooses for itself. The platform is
    the one that a program is lowered for, so that a program for chips that are not there has their
    code, and no program has both.
    """
    return jax.lax.platform_dependent(*arguments, cuda=gpu, rocm=gpu, default=other)


def as_saved(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`arrays`, which in a program for GPUs are read from memory and not computed again there.

    XLA would compute a norm's statistics again in its backward pass, which takes 1.2 ms of the
    61.4 ms of GPT-2's step on an H200 (experiments/README.md).
    """
    return by_platform(
        *arrays, gpu=lambda *arrays: jax.lax.optimization_barrier(arrays), other=_same
    )


def _same(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays


def sum_rows(x: Float[Array, "*rows D"]) -> Float[Array, " D"]:
    """The sum over all axes but the last, in the dtype of `x`: the gradient of a bias.

    On GPUs sums of √rows rows are summed, in float32. XLA's own kernel runs one block per
    32 columns of a GPU, and of 2,048 rows of 128 it takes 67 µs. In a partitioned program axes are
    not merged, since two of them may be sharded.
    """
    if auto_mesh() is not None:
        return _sum_at_once(x)
    return by_platform(x, gpu=_sum_in_two_steps, other=_sum_at_once)


def _sum_at_once(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_sum(x, axes=tuple(range(x.ndim - 1)))


def _sum_in_two_steps(x: jax.Array) -> jax.Array:
    rows, width = x.size // x.shape[-1], x.shape[-1]
    groups = math.gcd(rows, 2 ** (rows.bit_length() // 2))
    sums = x.reshape(groups, -1, width).sum(axis=1, dtype=jnp.float32)
    # Without the barrier XLA makes one sum of the two.
    return jax.lax.optimization_barrier(sums).sum(axis=0).astype(x.dtype)
