"""Read models of the Llama family from GGUF, llama.cpp's format, quantised or not.

A file is presented as the Hugging Face checkpoint that it was made from: its keys as `config.json`,
its tensors under their names there. llama.cpp's rotary embedding is interleaved, and its conversion
permutes the rows of query and key accordingly; this is undone here.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import InputError
from gptjax.huggingface.files import checked
from gptjax.huggingface.gguf_format import read_layout
from gptjax.huggingface.gguf_keys import config_of_keys

REORDERED = ("llama",)
"""Models whose queries and keys are in interleaved order."""

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
_TOKENS = {
    "bos_token_id": ("bos",),
    "eos_token_id": ("eos", "eot", "eom"),
    "pad_token_id": ("padding",),
}
"""Fields of config.json and llama.cpp's keys for them; it stops at any of three end tokens."""


class GGUFWeights:
    """The tensors of a file under their Hugging Face names."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise InputError(
                f"{path}: reading GGUF needs its package: pip install 'gptjax[gguf]'."
            ) from error
        try:
            layout = read_layout(path, gguf.GGML_QUANT_SIZES)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}.") from error
        except ValueError as error:
            raise InputError(f"{path} is no GGUF file, or damaged: {error}.") from error
        self.directory = path
        self._gguf = gguf
        self._content = layout.content
        self._keys = layout.keys
        self._tensors = {_their_name(name): tensor for name, tensor in layout.tensors.items()}
        if len(self._tensors) < len(layout.tensors):
            raise InputError(f"{path} has a tensor twice, under llama.cpp's name and another's.")
        try:
            fields = config_of_keys(layout.keys)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        self._reordered = fields["model_type"] in REORDERED
        table = "model.embed_tokens.weight"
        self.config: dict[str, Any] = {
            **fields,
            "vocab_size": self.shape(table)[0] if table in self._tensors else None,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._tensors,
        }

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, dequantised to float32.

        Raises:
          InputError: a quantisation that the package does not support, a NaN or an infinity.
        """
        shape, kind, start, size = self._tensors[name]
        stored = np.frombuffer(self._content, np.uint8, size, start).reshape(*shape[:-1], -1)
        try:
            tensor = self._gguf.dequantize(stored, self._gguf.GGMLQuantizationType(kind))
        except NotImplementedError as error:
            raise InputError(f"{self.directory}: {name} cannot be read: {error}.") from error
        tensor = tensor.reshape(shape)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        projection = name.split(".")[-2]
        if projection in heads and self._reordered:
            pairs = tensor.reshape(self.config[heads[projection]], -1, 2, *tensor.shape[1:])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        return checked(tensor, f"{self.directory}: {name}")

    def token_ids(self) -> dict[str, list[int]]:
        """Returns the ids of the begin, end and pad tokens, as fields of a `config.json`."""
        ids = {}
        for name, tokens in _TOKENS.items():
            found = (self._keys.get(f"tokenizer.ggml.{token}_token_id") for token in tokens)
            ids[name] = [token for token in found if token is not None]
        return ids


def _their_name(name: str) -> str:
    """Maps `blk.0.attn_q.weight` to `model.layers.0.self_attn.q_proj.weight`; others unchanged."""
    found = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found[3] not in _NAMES:
        return name
    layer = "" if found[2] is None else f"model.layers.{found[2]}."
    return f"{layer}{_NAMES[found[3]]}.{found[4]}"
