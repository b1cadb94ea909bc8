"""Variants: presets, presets with overrides, and sweeps over the values of an axis.

`gpt2`, `gpt2:norm=rmsnorm,optimizer.name=muon`, `gpt2:position_embedding=*`; a piece without =
continues the value before it, as in `gemma-style:attention=full,local`.
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
"""Fields that may be overridden, and their types."""
SWEPT: dict[str, tuple[Any, ...]] = AXES | {
    name: listed(hint) for name, hint in HINTS.items() if OPTIMIZER in name and listed(hint)
}
"""Values that a star stands for, by field."""
COMMON = {"context_length": "--context-length sets it", "vocab_size": "the tokenizer sets it"}
"""Fields that all variants share, as the comparison would not be fair otherwise."""
WORDS = {"true": True, "false": False, "none": None}


class Variant(NamedTuple):
    """One of the compared variants."""

    name: str
    """A spec that gives this variant; in a sweep, with its value instead of the star, and with the
    fields that had to change with it."""
    model: TransformerConfig
    """With the common context length; `vocab_size` is 0, set by the tokenizer later."""
    optimizer: OptimizerConfig
    fixed_rate: bool
    """Whether its learning rate is given, so that none is searched."""


def read_variants(specs: Sequence[str], comparison: Comparison) -> list[Variant]:
    """Returns the variants in the order given; the first is the baseline.

    A sweep has the values that the preset and the objective allow. Where a value needs other fields
    (`attention=local` needs a window), they change with it and are in its name. A value that gives
    a variant already in the list is left out.

    Args:
      specs: at least one.
      comparison: gives all variants' context length (or the baseline's), dropout, optimizer and
      objective.

    Raises:
      InputError: a spec that cannot be read, that the config or the objective refuses, or that is
      given twice; a sweep of which nothing is left.
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
    """Parses `gpt2:norm=rmsnorm,attention=full,local` into a preset's name, and values by field.

    Raises:
      InputError: not field=value; a field that is unknown, set twice, or common to all variants.
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
    """Yields values by field for each combination of the stars' values, with the fields they need.

    Raises:
      InputError: a value of another type than the field's, or a star for a field without a list.
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
            f"--variants {spec!r} sweeps {field}, whose values are not listed: a star works "
            f"for {', '.join(SWEPT)}."
        )
    return SWEPT[field]


def _value(spec: str, field: str, text: str) -> Any:
    """Returns the text as the field's type; the config checks values of a Literal."""
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
    """Returns the spec of these values: as given, stars resolved and the needed fields added."""
    texts = {field: text for field, text in overrides.items() if text != STAR}
    pieces = [f"{field}={texts.get(field, _text(value))}" for field, value in chosen.items()]
    return f"{preset_name}:{','.join(pieces)}" if pieces else preset_name


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _variant(
    name: str, chosen: dict[str, Any], base: TransformerConfig, comparison: Comparison
) -> Variant:
    """Returns the preset with the chosen values.

    Raises:
      InputError: values that the config or the objective refuses.
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
