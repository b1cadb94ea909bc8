"""Convert the keys of a GGUF file to fields of a Hugging Face `config.json`.

Keys have llama.cpp's meaning (`load_hparams` in src/llama-model.cpp, the graphs in
src/models/llama.cpp and qwen2.cpp, and rotary scaling in src/llama-context.cpp). A key that may
change the output is converted, or has a neutral value, or is refused by name; so is every key of
the model's that is in no table.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.config import InputError, shown
from gptjax.huggingface.particulars import refusal

FAMILIES = {"llama": "llama", "qwen2": "qwen2"}
"""Their architecture → `model_type`; Mistral is a llama there."""

READ = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""A key → the field of `config.json`."""
BY_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
"""Keys that may have one number per layer."""
FACTORS = ("rope.scaling.factor", "rope.scale_linear")
"""The rotary scaling factor; its older name counts if the first is absent."""
WITHOUT_EFFECT = {
    "vocab_size": "the table of the tokens has as many rows as there are",
    "tensor_data_layout": "a note of the conversion, which llama.cpp does not read",
    "pooling_type": "pools what embedding models give; logits are of every token",
    "attention.layer_norm_epsilon": "LayerNorm's, which these models do not have",
    "rope.scaling.finetuned": "a note of how the model was trained",
    "rope.scaling.original_context_length": "read where the scaling is yarn or longrope",
    "rope.scaling.yarn_beta_fast": "read where the scaling is yarn",
    "rope.scaling.yarn_beta_slow": "read where the scaling is yarn",
}
"""Keys that do not change the logits, with reasons."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}
"""Keys with their neutral values."""


def config_of_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a `config.json` from the keys of a file.

    Raises:
      InputError: another architecture; a part of a model, or an adapter of one; a key that is
        missing, or whose value gptjax does not support.
    """
    architecture = keys.get("general.architecture")
    if architecture not in FAMILIES:
        raise refusal("general.architecture", architecture, " and ".join(FAMILIES))
    kind = keys.get("general.type", "model")
    if kind != "model":
        raise refusal("general.type", kind, "'model'")
    parts = keys.get("split.count", 0)
    if parts not in (0, 1):
        raise InputError(
            f"split.count is {shown(parts)}: this is a part of a model, and llama.cpp's "
            "`llama-gguf-split --merge` joins the parts."
        )
    return {"model_type": FAMILIES[architecture], **_Keys(keys, f"{architecture}.").config()}


class _Keys:
    """The keys of an architecture, without its `prefix`."""

    def __init__(self, keys: Mapping[str, Any], prefix: str):
        self._prefix = prefix
        self._values = {
            name.removeprefix(prefix): value
            for name, value in keys.items()
            if name.startswith(prefix)
        }

    def config(self) -> dict[str, Any]:
        """Returns the fields of a `config.json`, after checking all other keys."""
        width, depth = self._size("embedding_length"), self._size("block_count")
        heads = self._size("attention.head_count", depth=depth)
        found = {
            "embedding_length": width,
            "block_count": depth,
            "context_length": self._size("context_length"),
            "feed_forward_length": self._size("feed_forward_length", depth=depth),
            "attention.head_count": heads,
            "attention.head_count_kv": self._size("attention.head_count_kv", heads, depth=depth),
            "attention.key_length": self._size("attention.key_length", width // heads),
            "attention.layer_norm_rms_epsilon": self._number("attention.layer_norm_rms_epsilon"),
            "rope.freq_base": self._number("rope.freq_base", 10_000.0),
        }
        self._check_rotary_scaling()
        self._check_others(found)
        return {READ[key]: value for key, value in found.items()}

    def _size(self, key: str, default: int | None = None, *, depth: int = 0) -> int:
        """Returns a size; a key of `BY_LAYER` may give it once per layer."""
        value = self._values.get(key, default)
        if key in BY_LAYER and isinstance(value, np.ndarray):
            if len(value) != depth or len(set(value.tolist())) != 1:
                raise self._refused(key, f"one number, or the same of each of {depth} layers")
            value = value.tolist()[0]
        if type(value) is not int or value < 1:
            raise self._refused(key, "a size, as every model has,")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        """Returns a float32 as its shortest decimal."""
        value = self._values.get(key, default)
        with np.errstate(over="ignore"):
            number = float(str(np.float32(value))) if isinstance(value, float) else math.nan
        if not 0 < number < math.inf:
            raise self._refused(key, "a number above 0, as every model has,")
        return number

    def _check_rotary_scaling(self) -> None:
        """Check that positions are not scaled; llama.cpp's defaults are linear scaling, 0 for none.

        Raises:
          InputError: positions that are scaled.
        """
        key = next((key for key in FACTORS if key in self._values), None)
        if key is not None and self._values.get("rope.scaling.type") != "none":
            self._check(key, (0.0, 1.0))

    def _check_others(self, found: Mapping[str, Any]) -> None:
        """Check that no other key changes the output.

        Raises:
          InputError: one that does, or that is unknown.
        """
        head, context_length = found["attention.key_length"], found["context_length"]
        default = found["embedding_length"] // found["attention.head_count"]
        self._values.setdefault("attention.value_length", default)
        neutral = {
            **NEUTRAL,
            "attention.scale": (0.0, float(np.float32(1 / math.sqrt(head)))),
            "attention.value_length": (head,),
            "embedding_length_out": (0, found["embedding_length"]),
            "rope.dimension_count": (head,),
        }
        window = self._values.get("attention.sliding_window", 0)
        if type(window) is not int or 0 < window < context_length:
            accepted = f"no window, or one of the whole context_length {context_length},"
            raise self._refused("attention.sliding_window", accepted)
        known = {*READ, *WITHOUT_EFFECT, *FACTORS, "attention.sliding_window"}
        for key in sorted(self._values.keys() - known):
            self._check(key, neutral.get(key, ()))

    def _check(self, key: str, accepted: tuple[Any, ...]) -> None:
        """Refuse the value of `key` unless it is among `accepted`."""
        value = self._values[key]
        if not accepted:
            raise InputError(
                f"{self._prefix}{key} is {_shown(value)}: gptjax does not know what it changes."
            )
        if isinstance(value, np.ndarray) or value not in accepted:
            raise self._refused(key, " or ".join(map(repr, accepted)))

    def _refused(self, key: str, accepted: str) -> InputError:
        value = _shown(self._values.get(key))
        return InputError(f"{self._prefix}{key} is {value}: gptjax computes {accepted} alone.")


def _shown(value: Any) -> str:
    """Returns a value as one line."""
    if not isinstance(value, np.ndarray):
        return shown(value)
    return f"{shown(value[:8].tolist())}{' and so on' * (len(value) > 8)}"
