"""Code that differs between CPUs and accelerators."""

from collections.abc import Callable
from typing import TypeVar

import jax

Result = TypeVar("Result")


def by_platform(
    *arguments: object, cpu: Callable[..., Result], accelerator: Callable[..., Result]
) -> Result:
    """`cpu(*arguments)` in a program for CPUs, `accelerator(*arguments)` in one for GPUs or TPUs.

    An accelerator is slowed by memory traffic: there what is elementwise is recomputed rather than
    kept. A CPU is slowed by the recomputation. The platform is the one that a program is lowered
    for, so that a program for chips that are not there has their code, and no program has both.
    """
    return jax.lax.platform_dependent(*arguments, cpu=cpu, default=accelerator)
