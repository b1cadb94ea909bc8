"""Models of the Llama family in a GGUF file, llama.cpp's format, quantised or not.

A file is seen as the Hugging Face checkpoint that it was made from: its metadata as `config.json`,
its tensors under their names there. llama.cpp pairs the channels that rotate as neighbours, and
its conversion reorders the rows of query and key so; they are put back here.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import InputError
from gptjax.huggingface.files import checked

FAMILIES = {"llama": "llama", "qwen2": "qwen2"}
"""Their architecture → `model_type`; Mistral is a llama there."""
REORDERED = ("llama",)
"""Architectures whose queries and keys are in the order of neighbours."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


class GGUFWeights:
    """The tensors of a file under the names of Hugging Face's."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise InputError(
                f"{path}: reading GGUF needs its package: pip install 'gptjax[gguf]'."
            ) from error
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise InputError(f"{path} is no GGUF file, or damaged: {error}.") from error
        self.directory = path
        self._dequantize = gguf.dequantize
        self._tensors = {_their_name(tensor.name): tensor for tensor in self._reader.tensors}
        self.config = self._config()

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it; ggml counts axes from the last."""
        return tuple(self._tensors[name].shape[::-1].tolist())

    def read(self, name: str) -> np.ndarray:
        """A tensor, float32.

        Raises:
          InputError: a quantisation that the package cannot undo, or a NaN.
        """
        stored = self._tensors[name]
        try:
            tensor = self._dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise InputError(f"{self.directory}: {name} cannot be read: {error}.") from error
        tensor = tensor.reshape(self.shape(name))
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        projection = name.split(".")[-2]
        if projection in heads and self._architecture in REORDERED:
            pairs = tensor.reshape(self.config[heads[projection]], -1, 2, *tensor.shape[1:])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        return checked(tensor, f"{self.directory}: {name}")

    def _config(self) -> dict[str, Any]:
        """The metadata as the fields of a `config.json`."""
        self._architecture = self._field("general.architecture")
        if self._architecture not in FAMILIES:
            raise InputError(
                f"{self.directory}: general.architecture is {self._architecture!r}: gptjax reads "
                f"{' and '.join(FAMILIES)} from GGUF."
            )
        own = f"{self._architecture}."
        given = {name: self._field(own + key) for name, key in _FIELDS.items()}
        given = {name: value for name, value in given.items() if value is not None}
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
        for name in ("rms_norm_eps", "rope_theta"):
            if name in given:  # float32 in the file: the shortest decimal is the one meant.
                given[name] = float(str(np.float32(given[name])))
        scaling = self._field(f"{own}rope.scaling.type")
        if scaling not in (None, "none"):
            given["rope_scaling"] = {"rope_type": scaling}
        turning, head_dim = self._field(f"{own}rope.dimension_count"), given.get("head_dim")
        if turning is not None:
            given.setdefault("head_dim", turning)
            given["partial_rotary_factor"] = turning / (head_dim or turning)
        table = "model.embed_tokens.weight"
        return {
            "model_type": FAMILIES[self._architecture],
            "vocab_size": self.shape(table)[0] if table in self._tensors else None,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            **given,
        }

    def _field(self, key: str) -> Any:
        found = self._reader.fields.get(key)
        return None if found is None else found.contents()


def _their_name(name: str) -> str:
    """`blk.0.attn_q.weight` → `model.layers.0.self_attn.q_proj.weight`; others as they are."""
    found = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found[3] not in _NAMES:
        return name
    layer = "" if found[2] is None else f"model.layers.{found[2]}."
    return f"{layer}{_NAMES[found[3]]}.{found[4]}"
