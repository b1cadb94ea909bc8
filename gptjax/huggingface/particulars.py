"""Conversions that the tables of fields cannot express: rotary positions, attention patterns.

A `read` function returns further fields of ours from theirs, a `write` function the reverse.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config import InputError, TransformerConfig, shown

HuggingFaceConfig = Mapping[str, Any]


def refusal(name: str, value: Any, accepted: str) -> InputError:
    """Returns the error for a field with an unsupported value."""
    return InputError(f"{name} is {shown(value)}: gptjax computes {accepted} alone.")


def pattern(kinds: Sequence[str]) -> str:
    """Returns the shortest repeating pattern of the layers' kinds of attention."""
    length = next(
        length
        for length in range(1, len(kinds) + 1)
        if len(kinds) % length == 0 and list(kinds) == list(kinds[:length]) * (len(kinds) // length)
    )
    return ",".join(kinds[:length])


def turns(config: TransformerConfig, names: Mapping[str, str]) -> list[str]:
    """Returns their name of each layer's kind of attention; full if they have none."""
    pattern = config.attention_pattern
    turns = (pattern[layer % len(pattern)] for layer in range(config.depth))
    return [names.get(kind, names["full"]) for kind in turns]


def _rope(given: HuggingFaceConfig, fraction: float) -> dict[str, Any]:
    """Reads rotary positions from the fields of transformers 5 or earlier."""
    parameters: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        found = given.get(name) or {}
        kind = found.get("rope_type", found.get("type", "default"))
        scaled = kind != "default" or found.get("factor", 1.0) != 1.0
        if scaled or any(isinstance(value, dict) for value in found.values()):
            raise refusal(name, found, "unscaled rotary positions")
        parameters |= found
    base = given.get("rope_theta", given.get("rotary_emb_base", 10_000.0))
    fraction = given.get("partial_rotary_factor", given.get("rotary_pct", fraction))
    return {
        "rope_theta": float(parameters.get("rope_theta", base)),
        "rotary_fraction": float(parameters.get("partial_rotary_factor", fraction)),
    }


def read_neo(given: HuggingFaceConfig) -> dict[str, Any]:
    """Alternating global and local attention."""
    types = given.get("attention_types") or [[["global", "local"], given["num_layers"] // 2]]
    described = (
        kind for kinds, times in types for _ in range(times * bool(kinds)) for kind in kinds
    )
    # One more than needed suffices to refuse them.
    described = list(itertools.islice(described, given["num_layers"] + 1))
    layers = given.get("attention_layers") or described
    names = {"global": "full", "local": "local"}
    if len(layers) != given["num_layers"] or not set(layers) <= set(names):
        accepted = f"global or local of each of num_layers {given['num_layers']}"
        raise refusal("attention_layers", layers, accepted)
    window = given.get("window_size", 256) if "local" in layers else 0
    return {"attention": pattern([names[kind] for kind in layers]), "window": window}


def write_neo(config: TransformerConfig) -> dict[str, Any]:
    """Alternating global and local attention."""
    layers = turns(config, {"full": "global", "local": "local"})
    turn = pattern(layers).split(",")
    return {
        "attention_types": [[turn, config.depth // len(turn)]],
        "window_size": config.window or 256,
    }


def read_gptj(given: HuggingFaceConfig) -> dict[str, Any]:
    """The number of rotated channels."""
    actual_head_dim = given["n_embd"] // given["n_head"]
    turning = given.get("rotary_dim", 64)
    if not isinstance(turning, int) or turning % 2 or not 0 < turning <= actual_head_dim:
        accepted = f"an even number of at most {actual_head_dim} (n_embd / n_head)"
        raise refusal("rotary_dim", turning, accepted)
    fraction = turning / actual_head_dim
    if int(fraction * actual_head_dim) < turning:  # Rounded down.
        fraction = math.nextafter(fraction, 1)
    return {"rotary_fraction": fraction}


def read_neox(given: HuggingFaceConfig) -> dict[str, Any]:
    """Rotary positions, attention biases, and parallel residuals."""
    rope = _rope(given, 0.25)
    actual_head_dim = given["hidden_size"] // given["num_attention_heads"]
    if int(rope["rotary_fraction"] * actual_head_dim) % 2:
        accepted = f"an even number of the {actual_head_dim} channels of a head"
        raise refusal("partial_rotary_factor", rope["rotary_fraction"], accepted)
    bias = given.get("attention_bias", True)
    return {
        **rope,
        "norm_placement": "parallel" if given.get("use_parallel_residual", True) else "pre",
        "query_bias": bias,
        "output_bias": bias,
    }


def write_neox(config: TransformerConfig) -> dict[str, Any]:
    """The rotary fields of transformers 5 and of earlier ones."""
    fraction = config.rotary_fraction if config.position_embedding == "rotary" else 1.0
    return {
        "use_parallel_residual": config.norm_placement != "pre",
        "attention_bias": config.bias if config.query_bias is None else config.query_bias,
        "rotary_pct": fraction,
        "rotary_emb_base": config.rope_theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": fraction,
        },
    }


def read_llama(given: HuggingFaceConfig) -> dict[str, Any]:
    """Rotary positions over all channels, and attention biases."""
    rope = _rope(given, 1.0)
    if rope["rotary_fraction"] != 1:
        raise refusal("partial_rotary_factor", rope["rotary_fraction"], "1.0")
    attention_bias = given.get("attention_bias", False)
    return {**rope, "query_bias": attention_bias, "output_bias": attention_bias}


def write_llama(config: TransformerConfig) -> dict[str, Any]:
    """The rotary fields of transformers 5 and of earlier ones."""
    return {
        "num_key_value_heads": config.actual_kv_heads,
        "head_dim": config.actual_head_dim,
        "attention_bias": config.bias if config.query_bias is None else config.query_bias,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def read_mistral(given: HuggingFaceConfig) -> dict[str, Any]:
    """Llama's, with sliding-window attention in every layer."""
    window = given.get("sliding_window", 4096)
    return {
        **read_llama(given),
        "attention": "local" if window else "full",
        "window": window or 0,
    }


def write_mistral(config: TransformerConfig) -> dict[str, Any]:
    """Llama's, with sliding-window attention in every layer."""
    return write_llama(config) | {"attention_bias": False, "sliding_window": config.window or None}


def read_qwen2(given: HuggingFaceConfig) -> dict[str, Any]:
    """Llama's, with query, key and value biases, and sliding windows in some layers."""
    depth = given["num_hidden_layers"]
    window = given.get("sliding_window", 4096) if given.get("use_sliding_window") else None
    first = given.get("max_window_layers", 28) if window else depth
    layers = given.get("layer_types") or [
        "full_attention" if layer < first else "sliding_attention" for layer in range(depth)
    ]
    names = {"full_attention": "full", "sliding_attention": "local"}
    if len(layers) != depth or not set(layers) <= set(names):
        accepted = f"full_attention or sliding_attention of each of {depth} layers"
        raise refusal("layer_types", layers, accepted)
    sliding = "sliding_attention" in layers and window is not None
    return {
        **read_llama(given),
        "query_bias": True,
        "output_bias": False,
        "attention": pattern([names[kind] for kind in layers]) if sliding else "full",
        "window": window if sliding else 0,
    }


def write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    """Llama's, with sliding windows in some layers."""
    layers = turns(config, {"full": "full_attention", "local": "sliding_attention"})
    return write_llama(config) | {
        "use_sliding_window": config.window > 0,
        "sliding_window": config.window or None,
        "max_window_layers": layers.count("full_attention"),
        "layer_types": layers,
    }


_BERT_HEADS = {
    "pretraining": "BertForPreTraining",
    "masked_lm": "BertForMaskedLM",
    "pooler": "BertModel",
    "none": "BertModel",
}


def read_bert(given: HuggingFaceConfig) -> dict[str, Any]:
    """The heads of the transformers class that `given` names; a bare model may lack the pooler."""
    named = (given.get("architectures") or [_BERT_HEADS["pretraining"]])[0]
    bare = "pooler" if given.get("add_pooling_layer", True) else "none"
    heads = {"BertForPreTraining": "pretraining", "BertForMaskedLM": "masked_lm"}.get(named, bare)
    predicts = heads in ("masked_lm", "pretraining")
    activation = given.get("hidden_act", "gelu")
    if predicts and activation != "gelu":
        raise refusal("hidden_act", activation, "'gelu' before BERT's heads")
    return {"head_bias": predicts, "encoder_heads": heads}


def write_bert(config: TransformerConfig) -> dict[str, Any]:
    """The transformers class that has the heads."""
    return {"architectures": [_BERT_HEADS[config.encoder_heads]]}


def stored_bert_heads(names: Sequence[str]) -> dict[str, Any]:
    """Returns what `read_bert` needs, from tensor names: the config's class is unreliable."""
    of = {"cls.seq_relationship": "pretraining", "cls.predictions": "masked_lm", "pooler": "pooler"}
    held = [heads for part, heads in of.items() if any(part in name for name in names)]
    architecture = _BERT_HEADS[held[0] if held else "none"]
    return {"architectures": [architecture], "add_pooling_layer": "pooler" in held}


def read_marian(given: HuggingFaceConfig) -> dict[str, Any]:
    """Encoder and decoder must have equal sizes, as in ours."""
    for name, other in (
        ("decoder_vocab_size", "vocab_size"),
        ("encoder_attention_heads", "decoder_attention_heads"),
        ("encoder_ffn_dim", "decoder_ffn_dim"),
    ):
        if (given.get(name) or given[other]) != given[other]:
            raise refusal(name, given[name], f"the {given[other]} of {other}")
    return {}


def write_marian(config: TransformerConfig) -> dict[str, Any]:
    """Equal sizes of encoder and decoder."""
    return {
        "decoder_vocab_size": config.vocab_size,
        "encoder_layers": config.encoder_depth or config.depth,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.actual_mlp_dim,
        "decoder_ffn_dim": config.actual_mlp_dim,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
    }
