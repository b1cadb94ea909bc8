"""Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2).

float16 has no number below 6e-8 or above 65,504. The gradient is that of a multiple of the loss, as
large as possible: the scale doubles after `GROWTH_INTERVAL` steps with a finite gradient, and is
halved after any other, which updates no parameter. The scale is part of the optimizer's state, and
so of checkpoints.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

INITIAL_SCALE = 2.0**10
"""Of the loss summed over tokens; of their mean it is some millions, and soon halved to fit."""
LEAST_SCALE = 2.0**-16
"""Where gradients overflow at this scale, its halves would not help: the run has diverged."""
LARGEST_SCALE = 2.0**15
"""The largest power of two of float16."""
GROWTH_INTERVAL = 2000


class ScaledState(NamedTuple):
    """The state of an optimizer whose gradients are of a scaled loss."""

    scale: Float[Array, ""]
    finite_steps: Int[Array, ""]
    """Steps with a finite gradient since the scale last changed."""
    optimizer: optax.OptState


def with_loss_scale(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, of gradients from which the scale has been divided, with a `ScaledState`."""

    def init(params: Any) -> Any:
        return ScaledState(
            jnp.float32(INITIAL_SCALE), jnp.zeros((), jnp.int32), optimizer.init(params)
        )

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, inner = optimizer.update(updates, state.optimizer, params)
        finite_steps = state.finite_steps + 1
        grows = finite_steps >= GROWTH_INTERVAL
        larger = jnp.minimum(2 * state.scale, LARGEST_SCALE)
        scale, finite_steps = jnp.where(grows, larger, state.scale), finite_steps * ~grows
        return updates, ScaledState(scale, finite_steps, inner)

    return optax.GradientTransformation(init, update)


def loss_scale(state: optax.OptState) -> Float[Array, ""] | None:
    """The factor of the loss; None of an optimizer without `with_loss_scale`."""
    return state.scale if isinstance(state, ScaledState) else None


def after_skipped_step(state: optax.OptState) -> optax.OptState:
    """The optimizer's state after a step that updates no parameter: its scale is halved."""
    if not isinstance(state, ScaledState):
        return state
    scale = jnp.maximum(state.scale / 2, LEAST_SCALE)
    return state._replace(scale=scale, finite_steps=jnp.zeros_like(state.finite_steps))


def overflowed(
    state: optax.OptState, loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> Bool[Array, ""]:
    """Whether the scale alone made a gradient that is not finite, of a loss that is."""
    if not isinstance(state, ScaledState):
        return jnp.bool_(False)
    return jnp.isfinite(loss) & ~jnp.isfinite(grad_norm) & (state.scale > LEAST_SCALE)
