"""Convert `config.json` to `TransformerConfig` and back: exactly, or not at all.

Fields that no table of families.py has do not change what a model computes. We have one dropout
rate: the first of theirs is read, and all are written.
"""

from typing import Any

from gptjax.config import InputError, TransformerConfig, differences, near_names, shown, to_dict
from gptjax.config.model import MOST_BLOCKS
from gptjax.huggingface.families import TRANSLATIONS
from gptjax.huggingface.particulars import HuggingFaceConfig, pattern, refusal

IRRELEVANT = {
    "dropout": "acts in training alone, and all of their rates are written",
    "capacity_factor": "drops tokens in training alone",
    "dtype": "is how exactly the same is computed",
    "attention_kernel": "is which program computes attention",
    "scan_layers": "is how the blocks are compiled",
    "remat": "is what the backward pass keeps, and what it computes again",
    "remat_layers": "is of how many blocks it does so at once",
    "microbatches": "is how a pipeline splits a batch",
}
"""Our fields that do not change what a model computes, with reasons. Every other field is preserved
in `config.json`, or the model is refused."""
UNSEGMENTED = 2
"""Token types written for a model without: BERT always has some; their embeddings are zero."""


def config_from_huggingface(
    given: HuggingFaceConfig, where: str = "config.json"
) -> TransformerConfig:
    """Returns the config of `given`, the content of a `config.json` at `where`.

    Raises:
      InputError: another family, a missing size, or an unsupported value of a field.
    """
    model_type = str(given.get("model_type"))
    if model_type not in TRANSLATIONS:
        near = near_names(model_type, TRANSLATIONS)
        raise InputError(f"{where}: model_type is {shown(model_type)}, which gptjax lacks; {near}")
    try:
        return _read(given, model_type)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (TypeError, AttributeError, LookupError, ValueError, OverflowError) as error:
        raise InputError(f"{where} holds a field of another kind than {model_type}'s.") from error


def _read(given: HuggingFaceConfig, model_type: str) -> TransformerConfig:
    family = TRANSLATIONS[model_type]
    for name, value in family.constant.items():
        if given.get(name, value) != value:
            raise refusal(name, given[name], repr(value))
    ours = dict(family.ours)
    for name, our_name in family.sizes.items():
        size = given.get(name)
        if type(size) is not int or size < 1:
            raise InputError(
                f"{name} is {shown(size)}: it must be a size, as in every {model_type}."
            )
        if our_name in ("depth", "encoder_depth") and size > MOST_BLOCKS:
            raise InputError(f"{name} is {size}: it must be at most {MOST_BLOCKS}.")
        ours[our_name] = size
    for name, (our_name, default) in family.optional.items():
        value = given.get(name)
        value = default if value is None else value
        ours[our_name] = 0 if value is None else value
    name, known, default = family.activation
    activation = given.get(name, default)
    if activation not in known:
        raise refusal(name, activation, " or ".join(map(repr, known)))
    ours["activation"] = known[activation]
    ours["dropout"] = float(given.get(family.dropouts[0]) or 0)
    return TransformerConfig(**(ours | family.read(given)))


def config_to_huggingface(config: TransformerConfig) -> dict[str, Any]:
    """Returns the `config.json` of the first family that computes exactly `config`'s model.

    Raises:
      InputError: none does; the message has the nearest and what it would change.
    """
    misfits = {}
    for model_type in TRANSLATIONS:
        given = _written(config, model_type)
        try:
            changed = differences(_resolved(config), _resolved(config_from_huggingface(given)))
        except InputError:
            continue  # Not valid in that family.
        if not changed:
            return given
        misfits[model_type] = changed
    if not misfits:
        raise InputError("No family of Hugging Face's computes a model of these sizes.")
    nearest = min(misfits, key=lambda model_type: len(misfits[model_type]))
    raise InputError(
        f"No family of Hugging Face's computes this model; the nearest, {nearest}, would change "
        f"{', '.join(misfits[nearest])}."
    )


def _written(config: TransformerConfig, model_type: str) -> dict[str, Any]:
    """Returns that family's config nearest to ours."""
    family, ours = TRANSLATIONS[model_type], _resolved(config)
    activation, known, default = family.activation
    names = {our_name: name for name, our_name in reversed(list(known.items()))}
    return {
        "model_type": model_type,
        "architectures": [family.architecture],
        **{name: ours[our_name] for name, our_name in family.sizes.items()},
        **{name: ours[our_name] for name, (our_name, _) in family.optional.items()},
        activation: names.get(config.activation, default),
        **dict.fromkeys(family.dropouts, config.dropout),
        **family.constant,
        # Our models do not have these token ids; transformers' defaults are other models'.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **family.write(config),
    }


def _resolved(config: TransformerConfig) -> dict[str, Any]:
    """Returns the fields that change what a model computes, with defaults resolved."""
    resolved = {name: value for name, value in to_dict(config).items() if name not in IRRELEVANT}
    rotary = config.position_embedding == "rotary"
    resolved |= {
        "kv_heads": config.actual_kv_heads,
        "head_dim": config.actual_head_dim,
        "mlp_dim": config.actual_mlp_dim,
        "query_bias": config.bias if config.query_bias is None else config.query_bias,
        "output_bias": config.bias if config.output_bias is None else config.output_bias,
        "encoder_depth": config.encoder_depth or config.depth,
        "token_types": config.token_types or (UNSEGMENTED if config.family == "encoder" else 0),
        "attention": pattern((config.attention_pattern * config.depth)[: config.depth]),
        "rotary_fraction": config.rotary_dim / config.actual_head_dim if rotary else None,
        "rope_theta": float(config.rope_theta) if rotary else None,
    }
    if config.encoder_heads == "pooler":
        resolved["encoder_heads"] = "none"  # A pooler does not change the tokens' outputs.
    if config.position_embedding not in ("rotary", "sinusoidal"):
        del resolved["pairing"]
    if not config.num_experts:
        del resolved["experts_per_token"]
    if "compressed" not in config.attention_pattern:
        del resolved["compression"]
    return resolved
