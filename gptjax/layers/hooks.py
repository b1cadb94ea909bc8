"""Hook points: named intermediates of a forward pass that can be captured and changed.

A layer passes an intermediate to its hook and continues with the result:

    query = hook("query", query)

The hook does all that is not part of the layer's equations: interventions, capture, dropout, the
sharding constraint, and the name under which `jax.checkpoint` saves the array. Hook points that are
not requested add nothing to the compiled program. Capture and interventions are arguments of the
forward pass, as the tokens are: the model itself never changes.

| hook point | axes | array |
|---|---|---|
| residual | BTD | the residual stream at the block's input |
| query, key, value | BTNH, BSKH, BSKH | as multiplied: after QK-norm and rotary embedding |
| scores | BNTS | scaled, soft-capped, with the position bias, before the mask |
| attention | BNTS | the attention weights: softmax of the masked scores |
| z | BTNH | each head's weighted values |
| head_output | BTND | what each head adds to the residual stream, without the output bias |
| attention_output | BTD | what attention adds: the sum over heads, plus the bias |
| activation | BTF | the MLP's hidden activations, after the non-linearity; not of experts |
| mlp_output | BTD | what the MLP adds |

Those of cross-attention begin with `cross_`, those of an encoder-decoder's encoder with `encoder_`.
An LSTM has `residual` only. Stacked over layers, they have a leading axis L.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from gptjax.config import InputError, TransformerConfig, near_names
from gptjax.layers.dropout import Dropout, split_key
from gptjax.parallel.sharding import constrain


class Point(NamedTuple):
    """A hook point."""

    axes: str
    """The letters of its axes, within one layer."""
    sharding: str = ""
    """The letters by which `constrain` shards it; empty leaves it to the compiler."""
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
"""The input of the MLP's non-linearity: saved by `jax.checkpoint`, but cannot be captured."""
POINTS = {**BLOCK, PRE_ACTIVATION: Point("BTF", saved_as="mlp")}
CROSS, ENCODER = "cross_", "encoder_"
DROPPED = (
    "attention",
    "attention_output",
    "cross_attention",
    "cross_attention_output",
    "mlp_output",
)
"""Hook points with dropout; a layer's key is split into one for each, in this order."""

Capture = Collection[str] | Mapping[str, Callable[[jax.Array], Any]]
"""Names of hook points, or a mapping from names to functions of the array whose results are kept
instead, which saves storing [B, N, T, S] for every layer."""


class Intervention(NamedTuple):
    """A change at one hook point: x becomes keep · x + add.

    This covers zero ablation (keep 0), replacing and activation patching (keep 0, add the other
    value) and steering (keep 1, add a vector). Both broadcast against the array, so that a change
    can be limited to some layers, heads or positions. `gptjax.probe` makes them.
    """

    keep: jax.Array
    """[L, ...]: each further axis has the size of the hook point's, or 1."""
    add: jax.Array
    """As `keep`."""


Interventions = Mapping[str, Intervention] | None
"""By hook point; for all layers, [L, ...], or for one, [...]."""


class Hooks:
    """Capture, interventions and dropout at the hook points of one layer."""

    def __init__(
        self,
        capture: Capture = (),
        interventions: Interventions = None,
        *,
        dropout_rate: float = 0.0,
        key: Key[Array, ""] | None = None,
        prefix: str = "",
    ):
        """Take what to capture and change, and the layer's dropout key (None: no dropout)."""
        self.captured: dict[str, Any] = {}
        """The captured arrays, or results of `capture`'s functions, by hook point."""
        self._capture = capture_functions(capture)
        self._interventions = interventions or {}
        self._prefix = prefix
        self._rate = dropout_rate
        keys = split_key(key, len(DROPPED))
        self._keys: dict[str, jax.Array | None] = dict(zip(DROPPED, keys, strict=True))

    @property
    def training(self) -> bool:
        """Whether this is a forward pass of training, with dropout keys."""
        return self._keys[DROPPED[0]] is not None

    def __call__(self, name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """x after the interventions and the dropout of hook point `name`; captures it before
        dropout."""
        return self.dropped(name, self.observed(name, x))

    def observed(self, name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """As `__call__`, without dropout."""
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

    def dropped(self, name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """x after the dropout of hook point `name`."""
        dropout = self.dropout(name, x.shape)
        return x if dropout is None else dropout(x)

    def dropout(self, name: str, shape: tuple[int, ...]) -> Dropout | None:
        """The dropout of hook point `name`, an array of this shape; None if it has none."""
        key = self._keys.get(self._prefix + name)
        return None if key is None or self._rate == 0 else Dropout.drawn(key, shape, self._rate)

    def need(self, *names: str) -> bool:
        """Whether any of these is captured or changed, and must be materialised."""
        needed = self._capture.keys() | self._interventions.keys()
        return any(self._prefix + name in needed for name in names)

    def within(self, prefix: str) -> "Hooks":
        """The hooks of a sub-layer whose hook points begin with `prefix`."""
        part = Hooks(self._capture, self._interventions, prefix=self._prefix + prefix)
        part.captured, part._rate, part._keys = self.captured, self._rate, self._keys
        return part


def capture_functions(capture: Capture) -> dict[str, Callable[[jax.Array], Any]]:
    """The function whose result is kept, by hook point; the identity if only names are given."""
    return dict(capture) if isinstance(capture, Mapping) else dict.fromkeys(capture, _identity)


def _identity(x: jax.Array) -> jax.Array:
    return x


NO_HOOKS = Hooks()
"""No capture, no interventions, no dropout."""


def hook_points(config: TransformerConfig) -> dict[str, str]:
    """The hook points of a model and the letters of their axes, stacked over layers."""
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
      InputError: an unknown hook point, or one of a sub-layer that this model lacks.
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


def split_encoder(points: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values by hook point, split into those of an encoder, without their prefix, and the rest."""
    encoder, decoder = {}, {}
    for name, value in points.items():
        part = encoder if name.startswith(ENCODER) else decoder
        part[name.removeprefix(ENCODER)] = value
    return encoder, decoder
