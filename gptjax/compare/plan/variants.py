"""What is compared: presets, presets with overrides, and sweeps over the values of an axis.

`gpt2`, `gpt2:norm=rmsnorm,optimizer.name=muon`, `gpt2:position_embedding=*`; a piece without =
belongs to the value before it, as in `gemma-style:attention=full,local`.
"""

import dataclasses
import itertools
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gptjax.compare.question import Comparison
from gptjax.config import InputError, OptimizerConfig, TransformerConfig, near_names
from gptjax.config.axes import AXES, companions, listed
from gptjax.data.objectives.rows import check_objective
from gptjax.models.presets import preset

STAR = "*"
OPTIMIZER = "optimizer."
RATE = f"{OPTIMIZER}learning_rate"
HINTS: dict[str, Any] = typing.get_type_hints(TransformerConfig) | {
    f"{OPTIMIZER}{name}": hint for name, hint in typing.get_type_hints(OptimizerConfig).items()
}
"""What may be overridden, and its type."""
SWEPT: dict[str, tuple[Any, ...]] = AXES | {
    name: listed(hint) for name, hint in HINTS.items() if OPTIMIZER in name and listed(hint)
}
"""What a star may stand for."""
COMMON = {"context_length": "--context-length sets it", "vocab_size": "the tokenizer sets it"}
"""Fields in which variants do not differ, or they would not be asked the same."""
WORDS = {"true": True, "false": False, "none": None}


class Variant(NamedTuple):
    """One of those that are compared."""

    name: str
    """A spec that reads as this variant; of a sweep, with its value in the star's place, and what
    had to be changed besides."""
    model: TransformerConfig
    """With the context of all; `vocab_size` is 0, for the tokenizer's."""
    optimizer: OptimizerConfig
    fixed_rate: bool
    """Whether it says its learning rate itself, so that none is searched."""


def read_variants(specs: Sequence[str], comparison: Comparison) -> list[Variant]:
    """The variants in the order asked for; the first is the baseline.

    Of a sweep there are the values that the preset can have and the objective can train. Where one
    means nothing alone (`attention=local` without a window), what it needs is changed with it and
    is in its name. A value that makes a variant which is there already is left out.

    Args:
      specs: at least one.
      comparison: its context (or the baseline's), dropout, optimizer and objective are those of
        all variants.

    Raises:
      InputError: a spec that cannot be read, that the config or the objective refuses, or that is
        there twice; a sweep of which nothing is left.
    """
    context_length = comparison.context_length or preset(specs[0].partition(":")[0]).context_length
    variants: list[Variant] = []
    for spec in specs:
        name, overrides = _parse(spec)
        base = dataclasses.replace(
            preset(name), context_length=context_length, vocab_size=0, dropout=comparison.dropout
        )
        found, refusals = [], []
        for chosen in _choices(spec, overrides, base):
            try:
                variant = _variant(_name(name, overrides, chosen), chosen, base, comparison)
                _check_new(variant, [*variants, *found])
            except InputError as refusal:
                refusals.append(refusal)
            else:
                found.append(variant)
        if not found:
            raise refusals[0]
        variants += found
    return variants


def _parse(spec: str) -> tuple[str, dict[str, str]]:
    """`gpt2:norm=rmsnorm,attention=full,local` → the preset's name, and values as text by field.

    Raises:
      InputError: what is no field=value, an unknown field, one that is set twice or for all.
    """
    name, colon, text = spec.partition(":")
    overrides: dict[str, str] = {}
    field = ""
    for piece in text.split(",") if colon else ():
        before, equals, value = piece.partition("=")
        if not equals and field:
            overrides[field] += f",{piece}"
            continue
        field = before
        if not equals:
            raise InputError(
                f"--variants {spec!r}: {piece!r} must be field=value, as in gpt2:norm=rmsnorm."
            )
        if field not in HINTS:
            known = near_names(field, HINTS)
            raise InputError(f"--variants {spec!r} overrides an unknown field {field!r}: {known}")
        if field in COMMON:
            raise InputError(
                f"--variants {spec!r} overrides {field}, which all variants have in common: "
                f"{COMMON[field]}."
            )
        if field in overrides:
            raise InputError(f"--variants {spec!r} overrides {field} twice: once is accepted.")
        overrides[field] = value
    return name, overrides


def _choices(
    spec: str, overrides: dict[str, str], base: TransformerConfig
) -> Iterator[dict[str, Any]]:
    """Values by field: of each combination of what stars stand for, with what it needs besides.

    Raises:
      InputError: a value of another type than the field's, or a star for what lists no values.
    """
    choices = [_values(spec, field, text) for field, text in overrides.items()]
    for values in itertools.product(*choices):
        chosen = dict(zip(overrides, values, strict=True))
        needed: dict[str, Any] = {}
        for field, text in overrides.items():
            if text == STAR and field in AXES:
                needed |= companions(field, chosen[field], base)
        changed = {field: value for field, value in needed.items() if value != getattr(base, field)}
        yield chosen | {field: value for field, value in changed.items() if field not in chosen}


def _values(spec: str, field: str, text: str) -> tuple[Any, ...]:
    if text != STAR:
        return (_value(spec, field, text),)
    if field not in SWEPT:
        raise InputError(
            f"--variants {spec!r} sweeps {field}, whose values are not listed: a star may stand "
            f"for a value of {', '.join(SWEPT)}."
        )
    return SWEPT[field]


def _value(spec: str, field: str, text: str) -> Any:
    """The text as the field's type; whether a Literal has it, its config knows."""
    hint = HINTS[field]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if bool in kinds:
        words = [word for word, value in WORDS.items() if type(value) in kinds]
        if text.lower() in words:
            return WORDS[text.lower()]
        accepted = " or ".join(words)
    elif hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            accepted = "a whole number" if hint is int else "a number"
    else:
        return text
    raise InputError(f"--variants {spec!r}: {field} is {text!r}, and must be {accepted}.")


def _name(preset_name: str, overrides: dict[str, str], chosen: dict[str, Any]) -> str:
    """The spec that chooses these values: as it was given, but for stars and what they need."""
    texts = {field: text for field, text in overrides.items() if text != STAR}
    pieces = [f"{field}={texts.get(field, _text(value))}" for field, value in chosen.items()]
    return f"{preset_name}:{','.join(pieces)}" if pieces else preset_name


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _variant(
    name: str, chosen: dict[str, Any], base: TransformerConfig, comparison: Comparison
) -> Variant:
    """The preset with the chosen values.

    Raises:
      InputError: what the configs or the objective refuse.
    """
    of_model, of_optimizer = {}, {}
    for field, value in chosen.items():
        if field.startswith(OPTIMIZER):
            of_optimizer[field.removeprefix(OPTIMIZER)] = value
        else:
            of_model[field] = value
    try:
        model = dataclasses.replace(base, **of_model)
        optimizer = dataclasses.replace(comparison.optimizer, **of_optimizer)
        check_objective(comparison.data, model)
    except InputError as error:
        raise InputError(f"--variants {name!r}: {error}") from error
    return Variant(name, model, optimizer, RATE in chosen)


def _check_new(variant: Variant, variants: Sequence[Variant]) -> None:
    for other in variants:
        if variant[1:] == other[1:]:
            raise InputError(
                f"--variants {variant.name!r} is the same as {other.name!r}: each may be there "
                "once."
            )
