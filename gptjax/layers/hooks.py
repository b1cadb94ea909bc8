"""Hook points: where a forward pass can be captured and changed, and all that is done there.

A layer names what it computes and goes on with what comes back:

    query = hook("query", query)

That is the seam of everything that is no equation of the layer: interventions and capture, dropout,
the sharding constraint, and the name by which `jax.checkpoint` keeps the array. What is not asked
for adds nothing to the program. What is captured or changed is an argument of the forward pass, as
its tokens are: the model itself never changes.

| hook point | axes | what it is |
|---|---|---|
| residual | BTD | the residual stream that enters the block |
| query, key, value | BTNH, BSKH, BSKH | as attention multiplies them: normalised, rotated |
| scores | BNTS | scaled, capped, with the position bias, before the mask |
| attention | BNTS | the weights: softmax of the masked scores |
| z | BTNH | each head's weighted values |
| head_output | BTND | what each head adds to the stream, the output's bias aside |
| attention_output | BTD | what attention adds: their sum and the bias |
| activation | BTF | of the MLP, after its non-linearity; not of experts |
| mlp_output | BTD | what the MLP adds |

Those of cross-attention begin with `cross_`, those of an encoder-decoder's encoder with `encoder_`.
An LSTM has `residual`. With all layers, the letter L comes first.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import InputError, TransformerConfig, near_names
from gptjax.layers.dropout import dropout, split_key
from gptjax.parallel.sharding import constrain


class Point(NamedTuple):
    """A hook point."""

    axes: str
    """The letters of its axes in one layer."""
    sharding: str = ""
    """The letters by which `constrain` shards it; none leaves it to the compiler."""
    saved_as: str = ""
    """Its name in `jax.checkpoint`'s policies (gptjax/layers/stack.py)."""


ATTENTION = {
    "query": Point("BTNH", "BTNH"),
    "key": Point("BSKH", "BSKH"),
    "value": Point("BSKH", "BSKH"),
    "scores": Point("BNTS"),
    "attention": Point("BNTS"),
    "z": Point("BTNH", "BTNH"),
    "head_output": Point("BTND"),
    "attention_output": Point("BTD"),
}
BLOCK = {
    "residual": Point("BTD", saved_as="residual"),
    **ATTENTION,
    "activation": Point("BTF", "BTF"),
    "mlp_output": Point("BTD"),
}
PRE_ACTIVATION = "pre_activation"
"""What the MLP's non-linearity takes: kept by `jax.checkpoint`, and not offered to capture."""
POINTS = {**BLOCK, PRE_ACTIVATION: Point("BTF", saved_as="mlp")}
CROSS, ENCODER = "cross_", "encoder_"
DROPPED = (
    "attention",
    "attention_output",
    "cross_attention",
    "cross_attention_output",
    "mlp_output",
)
"""Where dropout is; a layer's key is split into one for each, in this order."""

Capture = Collection[str] | Mapping[str, Callable[[jax.Array], Any]]
"""Names of hook points; or for each what is kept of it, so that a layer's [B, N, T, S] need not
be."""


class Intervention(NamedTuple):
    """A change at one hook point: x becomes keep · x + add.

    That is all there is to zeroing (keep 0), replacing and patching (keep 0, add the other value)
    and steering (keep 1, add a vector); in some layers, heads or positions only, since both
    broadcast against the array. `gptjax.probe` makes them.
    """

    keep: jax.Array
    """[L, ...]: what each of the hook point's axes is, or 1."""
    add: jax.Array
    """As `keep`."""


Interventions = Mapping[str, Intervention] | None
"""By hook point: of all layers [L, ...], or of one."""


class Hooks:
    """What is done at the hook points of one layer, and what was captured there."""

    def __init__(
        self,
        capture: Capture = (),
        interventions: Interventions = None,
        *,
        dropout_rate: float = 0.0,
        key: jax.Array | None = None,
        prefix: str = "",
    ):
        """Take what is asked for, and the layer's dropout key; None drops nothing."""
        self.captured: dict[str, Any] = {}
        """What was asked for, by name."""
        self._capture = kept_of(capture)
        self._interventions = interventions or {}
        self._prefix = prefix
        self._rate = dropout_rate
        keys = split_key(key, len(DROPPED))
        self._keys: dict[str, jax.Array | None] = dict(zip(DROPPED, keys, strict=True))

    @property
    def training(self) -> bool:
        """Whether this is a training step's pass, which drops."""
        return self._keys[DROPPED[0]] is not None

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """The hook point `name`, where x passes: what the layer goes on with."""
        return self.dropped(name, self.observed(name, x))

    def observed(self, name: str, x: jax.Array) -> jax.Array:
        """The same without dropout."""
        point, name = POINTS[name], self._prefix + name
        if point.saved_as:
            x = checkpoint_name(x, point.saved_as)
        if point.sharding:
            x = constrain(x, point.sharding)
        if name in self._interventions:
            keep, add = (part.astype(x.dtype) for part in self._interventions[name])
            x = keep * x + add
        if name in self._capture:
            self.captured[name] = self._capture[name](x)
        return x

    def dropped(self, name: str, x: jax.Array) -> jax.Array:
        """Dropout alone."""
        return dropout(x, self._rate, self._keys.get(self._prefix + name))

    def need(self, *names: str) -> bool:
        """Whether any of these is captured, changed or dropped, so that it has to exist."""
        asked = self._capture.keys() | self._interventions.keys()
        if self._rate > 0:
            asked |= {name for name, key in self._keys.items() if key is not None}
        return any(self._prefix + name in asked for name in names)

    def within(self, prefix: str) -> "Hooks":
        """The same for a part whose hook points begin with `prefix`."""
        part = Hooks(self._capture, self._interventions, prefix=self._prefix + prefix)
        part.captured, part._rate, part._keys = self.captured, self._rate, self._keys
        return part


def kept_of(capture: Capture) -> dict[str, Callable[[jax.Array], Any]]:
    """What is kept of each hook point; of those that are only named, all."""
    return dict(capture) if isinstance(capture, Mapping) else dict.fromkeys(capture, _whole)


def _whole(x: jax.Array) -> jax.Array:
    return x


NO_HOOKS = Hooks()
"""Nothing is captured, changed or dropped."""


def hook_points(config: TransformerConfig) -> dict[str, str]:
    """The hook points of a model and their axes, those of all layers together."""
    if config.family == "recurrent":
        return {"residual": "LBTD"}
    own = {name: point.axes for name, point in BLOCK.items()}
    if config.num_experts:
        del own["activation"]
    points = dict(own)
    if config.family == "encoder_decoder":
        points |= {CROSS + name: point.axes for name, point in ATTENTION.items()}
        points |= {ENCODER + name: axes for name, axes in own.items()}
    return {name: "L" + axes for name, axes in points.items()}


def check_hook_points(config: TransformerConfig, names: Collection[str]) -> None:
    """Refuse hook points that the model does not have.

    Raises:
      InputError: one that is unknown, or of a part or a kind of layer that others have.
    """
    known = hook_points(config)
    for name in names:
        if name in known:
            continue
        if name.startswith((CROSS, ENCODER)):
            raise InputError(
                f"The hook point {name!r} is of an encoder-decoder; this model is of the family "
                f"{config.family}, and has {', '.join(known)}."
            )
        raise InputError(
            f"Unknown hook point {name!r} of a {config.family}: {near_names(name, known)}"
        )


def by_part(asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is asked of an encoder-decoder's encoder, under its own names, and of the decoder."""
    encoder = {
        name.removeprefix(ENCODER): what for name, what in asked.items() if name.startswith(ENCODER)
    }
    return encoder, {name: what for name, what in asked.items() if not name.startswith(ENCODER)}
