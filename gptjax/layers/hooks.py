"""Places of a forward pass that can be looked at, and changed on the way.

A layer names what it computes and goes on with what comes back:

    query = taps("query", query)

That is the same array, and nothing is added to the program, unless the place is asked for. What is
asked for is an argument of the forward pass, as its tokens are: the model itself never changes.

| place | axes | what it is |
|---|---|---|
| residual | BTD | the stream that enters the block |
| query, key, value | BTNH, BSKH, BSKH | as attention multiplies them: normalised, rotated |
| scores | BNTS | scaled, bounded, with the bias, before the mask |
| attention | BNTS | the weights: softmax of the masked scores |
| mixture | BTNH | what each head reads: the values, weighted |
| head_output | BTND | what each head adds to the stream, the output's bias aside |
| attention_output | BTD | what attention adds: their sum and the bias |
| activation | BTF | of the feed-forward layer, after its non-linearity; not of experts |
| feedforward | BTD | what the feed-forward layer adds |

Those of cross-attention begin with `cross_`, those of an encoder-decoder's encoder with `encoder_`.
What an LSTM can show is its `residual`. With all layers, the letter L comes first.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax

from gptjax.config import InputError, TransformerConfig, near_names

ATTENTION_SITES = {
    "query": "BTNH",
    "key": "BSKH",
    "value": "BSKH",
    "scores": "BNTS",
    "attention": "BNTS",
    "mixture": "BTNH",
    "head_output": "BTND",
    "attention_output": "BTD",
}
CROSS, ENCODER = "cross_", "encoder_"

Capture = Collection[str] | Mapping[str, Callable[[jax.Array], Any]]
"""Names of places; or for each what is kept of it, so that a layer's [B, N, T, S] need not be."""


class Intervention(NamedTuple):
    """A change of one place: x becomes keep · x + add.

    That is all there is to zeroing (keep 0), replacing and patching (keep 0, add the other value)
    and steering (keep 1, add a vector); in some layers, heads or positions only, since both
    broadcast against the place. `gptjax.probe` makes them.
    """

    keep: jax.Array
    """[L, ...]: what each of the place's axes is, or 1."""
    add: jax.Array
    """As `keep`."""


class Taps:
    """What one layer is asked for, and what it has shown."""

    def __init__(
        self,
        capture: Capture = (),
        edits: Mapping[str, Intervention] | None = None,
        prefix: str = "",
    ):
        self.captured: dict[str, Any] = {}
        """What was asked for, by name."""
        self._capture = kept_of(capture)
        self._edits = edits or {}
        self._prefix = prefix

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """The place `name`, where x passes: what is gone on with."""
        name = self._prefix + name
        if name in self._edits:
            keep, add = (part.astype(x.dtype) for part in self._edits[name])
            x = keep * x + add
        if name in self._capture:
            self.captured[name] = self._capture[name](x)
        return x

    def ask(self, *names: str) -> bool:
        """Whether any of these places is looked at or changed."""
        asked = self._capture.keys() | self._edits.keys()
        return any(self._prefix + name in asked for name in names)

    def within(self, prefix: str) -> "Taps":
        """The same for a part whose places begin with `prefix`."""
        part = Taps(self._capture, self._edits, self._prefix + prefix)
        part.captured = self.captured
        return part


def kept_of(capture: Capture) -> dict[str, Callable[[jax.Array], Any]]:
    """What is kept of each place; of those that are only named, all."""
    return dict(capture) if isinstance(capture, Mapping) else dict.fromkeys(capture, _whole)


def _whole(x: jax.Array) -> jax.Array:
    return x


UNTAPPED = Taps()
"""Asked for nothing."""


def sites(config: TransformerConfig) -> dict[str, str]:
    """The places of a model and their axes, those of all layers together."""
    if config.family == "recurrent":
        return {"residual": "LBTD"}
    own = {"residual": "BTD", **ATTENTION_SITES, "activation": "BTF", "feedforward": "BTD"}
    if config.experts:
        del own["activation"]
    places = dict(own)
    if config.family == "encoder_decoder":
        places |= {CROSS + name: axes for name, axes in ATTENTION_SITES.items()}
        places |= {ENCODER + name: axes for name, axes in own.items()}
    return {name: "L" + axes for name, axes in places.items()}


def check_sites(config: TransformerConfig, names: Collection[str]) -> None:
    """Refuse places that the model has not.

    Raises:
      InputError: one that is unknown, or of a part or a kind of layer that others have.
    """
    known = sites(config)
    for name in names:
        if name in known:
            continue
        if name.startswith((CROSS, ENCODER)):
            raise InputError(
                f"The place {name!r} is of an encoder-decoder; this model is of the family "
                f"{config.family}, and has {', '.join(known)}."
            )
        raise InputError(f"Unknown place {name!r} of a {config.family}: {near_names(name, known)}")


def by_part(asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is asked of an encoder-decoder's encoder, under its own names, and of the decoder."""
    encoder = {
        name.removeprefix(ENCODER): what for name, what in asked.items() if name.startswith(ENCODER)
    }
    return encoder, {name: what for name, what in asked.items() if not name.startswith(ENCODER)}
