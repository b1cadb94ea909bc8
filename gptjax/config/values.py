"""The named values of config fields, and the facts that go with a value.

A value is listed here and implemented in a table or a `match` elsewhere. A missing implementation
is an error: `exhaustive` tables raise at import, and a `match` that ends with `assert_never` fails
type checking.
"""

from typing import Any, Literal, NamedTuple, TypeVar, get_args

Family = Literal["decoder", "encoder", "encoder_decoder", "recurrent"]
PositionEmbedding = Literal["learned", "sinusoidal", "rotary", "alibi", "relative", "none"]
Pairing = Literal["half", "interleaved"]
NormName = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post", "sandwich", "parallel", "parallel_shared"]
AttentionKind = Literal["full", "local", "compressed"]
AttentionNormalizer = Literal["softmax", "sigmoid"]
AttentionKernel = Literal["auto", "xla", "splash", "cudnn", "triton"]
Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh"]
EncoderHeads = Literal["none", "pooler", "masked_lm", "pretraining"]
Dtype = Literal["float32", "bfloat16", "float16"]
MuDtype = Literal["float32", "bfloat16"]
DecodingWeights = Literal["dtype", "int8"]
Remat = Literal["none", "full", "dots", "names", "offload"]
Objective = Literal[
    "causal", "masked_lm", "next_sentence", "sequence_to_sequence", "prefix", "span_corruption"
]
Packing = Literal["split", "first_fit"]
OptimizerName = Literal[
    "adamw",
    "nadamw",
    "adabelief",
    "radam",
    "lion",
    "rmsprop",
    "sgd",
    "muon",
]
WITH_MU_DTYPE = ("adamw", "nadamw", "lion", "sgd", "muon")
"""Optimizers whose first moment may have a dtype of its own."""
Schedule = Literal["cosine", "constant", "wsd"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]

Entry = TypeVar("Entry")


def exhaustive(values: Any, table: dict[str, Entry]) -> dict[str, Entry]:
    """Returns `table` after checking that its keys are exactly the values of a `Literal`.

    Raises:
      TypeError: a value without an entry, or an entry that is not a value.
    """
    lacking, unknown = set(get_args(values)) - set(table), set(table) - set(get_args(values))
    if lacking or unknown:
        raise TypeError(
            f"A table has no entry for {sorted(lacking)} and entries {sorted(unknown)} that are no "
            f"value: the values are {', '.join(get_args(values))}."
        )
    return table


RELATIVE_BUCKETS = 32
"""Buckets of T5's relative positions (its released configurations)."""
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""Gated activations, and the function applied to the gate (Shazeer 2020)."""


class Placement(NamedTuple):
    """Where norms stand around a layer (`gptjax.layers.residual`)."""

    before: bool = False
    """A norm of the layer's input."""
    after: bool = False
    """A norm of the layer's output, before it is added."""
    of_sum: bool = False
    """A norm of the residual sum."""
    parallel: bool = False
    """Attention and MLP read the same stream and are added together."""
    shared: bool = False
    """Attention and MLP share one norm."""

    @property
    def norms(self) -> int:
        """Number of norms around a layer."""
        return self.before + self.after + self.of_sum


PLACEMENTS = exhaustive(
    NormPlacement,
    {
        "pre": Placement(before=True),
        "post": Placement(of_sum=True),
        "sandwich": Placement(before=True, after=True),
        "parallel": Placement(before=True, parallel=True),
        "parallel_shared": Placement(before=True, parallel=True, shared=True),
    },
)
ENCODER_HEADS = exhaustive(
    EncoderHeads,
    {
        "none": (),
        "pooler": ("pooler",),
        "masked_lm": ("masked_lm",),
        "pretraining": ("pooler", "masked_lm", "next_sentence"),
    },
)
"""Which of BERT's heads a model has (Devlin et al. 2018)."""
