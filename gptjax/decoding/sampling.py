"""Choosing the next token: greedy, or sampled from the most likely ones.

Sources: temperature, Ackley et al. 1985; top-k, Fan et al. 2018; top-p (nucleus), Holtzman et al.
2020; min-p, Nguyen et al. 2024; repetition penalty, CTRL (Keskar et al. 2019, section 4.1). They
are applied in this order, but the penalty first, as in Hugging Face transformers.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptjax.config import InputError

SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32; a temperature below it is greedy decoding."""
PENALTIES = 1e-6, 1e6
"""The least and the largest repetition penalty for which logits stay finite."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Raises:
      InputError: a value out of range.
    """

    temperature: float = 1.0
    """Divides the logits; 0, or a number that float32 rounds to 0, is greedy decoding."""
    top_k: int = 0
    """Sample from this many of the most likely tokens; 0 takes all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that occurred, and multiplies the negative ones."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}: it must be at least 0.")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}: it must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}: it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min-p is {self.min_p}: it must be at least 0 and at most 1.")
        if not PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1]:
            raise InputError(
                f"repetition-penalty is {self.repetition_penalty}: it must be at least "
                f"{PENALTIES[0]:g} and at most {PENALTIES[1]:g}."
            )

    def filters(self) -> "Filters":
        """These choices as a compiled program takes them."""

        def number(value: float, off: float) -> Float[np.ndarray, ""] | None:
            with np.errstate(over="ignore"):
                return None if value == off else np.array(value, np.float32)

        greedy = self.temperature < SMALLEST_TEMPERATURE
        return Filters(
            None if greedy else number(self.temperature, 0),
            self.top_k,
            number(self.top_p, 1),
            number(self.min_p, 0),
            number(self.repetition_penalty, 1),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filters:
    """`Sampling` for a compiled program: None does nothing, and other numbers are arguments, so
    that nothing is compiled anew for another temperature."""

    temperature: Float[Array | np.ndarray, ""] | None
    """None is greedy decoding."""
    top_k: int = field(metadata={"static": True})
    top_p: Float[Array | np.ndarray, ""] | None
    min_p: Float[Array | np.ndarray, ""] | None
    penalty: Float[Array | np.ndarray, ""] | None


def filtered_logits(logits: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """Logits divided by the temperature, -inf where top-k, top-p or min-p exclude a token.

    The most likely token gets 0 and is never excluded. Without a temperature nothing is divided.
    """
    # Relative to the largest, since a logit divided by the temperature may be infinite.
    logits -= logits.max(axis=-1, keepdims=True)
    if filters.temperature is not None:
        logits /= filters.temperature
    if 0 < filters.top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, filters.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if filters.top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.where(before < filters.top_p, descending, 0)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    if filters.min_p is not None:
        logits = jnp.where(logits < jnp.log(filters.min_p), -jnp.inf, logits)
    return logits


def penalised_logits(
    logits: Float[Array, "B V"],
    occurred: Bool[Array, "B V"],
    penalty: float | Float[Array | np.ndarray, ""],
) -> Float[Array, "B V"]:
    """Logits after the repetition penalty of the tokens that `occurred` (CTRL)."""
    return jnp.where(occurred, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Float[Array, "B V"], filters: Filters, key: jax.Array) -> Int[Array, " B"]:
    """Next tokens, int32, greedy or sampled from the filtered softmax of `logits`."""
    if filters.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chosen = jax.random.categorical(key, filtered_logits(logits, filters), axis=-1)
    return chosen.astype(jnp.int32)
