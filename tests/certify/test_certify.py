import dataclasses
import math
import sys
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.certify import properties
from gptjax.certify.cases import Case, difference
from gptjax.certify.grid import (
    BASE,
    TINY,
    Cell,
    axis_values,
    certify,
    checked,
    failures,
    heading,
    line,
    page,
    shrunk,
    variants,
)
from gptjax.certify.properties import PROPERTIES, product_flops
from gptjax.config import InputError, TransformerConfig, to_dict
from gptjax.config.axes import COMPANIONS, OUTSIDE, SETTINGS
from gptjax.layers import linear, matrices, stack
from gptjax.layers.attention import module
from gptjax.layers.inputs import Inputs
from gptjax.models import language_model
from gptjax.models.presets import PRESETS, preset
from gptjax.training import cross_entropy, step
from gptjax.training.checkpoint import Checkpoints

FIELDS = typing.get_type_hints(TransformerConfig)


def _combined() -> dict[str, TransformerConfig]:
    """As few configs as hold every value of every axis, named by the values of each.

    A value joins the first config with which it can be built. Those of another family or pattern
    of attention stay apart, since to them some properties do not apply.
    """
    base, rows = to_dict(BASE), dict[tuple[str, ...], dict[str, Any]]()
    for name, config in axis_values().items():
        apart = {"family", "attention", name.partition("=")[0]}
        held = {
            field: value
            for field, value in to_dict(config).items()
            if field in apart or value != base[field]
        }
        names = next((names for names, row in rows.items() if _joins(held, row)), ())
        rows[*names, name] = rows.pop(names, {}) | held
    return {" ".join(names): dataclasses.replace(BASE, **row) for names, row in rows.items()}


def _joins(held: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a config can hold both; a field that both set must be the same."""
    if any(row.get(field, value) != value for field, value in held.items()):
        return False
    try:
        dataclasses.replace(BASE, **{**row, **held})
    except InputError:
        return False
    return True


COMBINED = _combined()


FAST = next(name for name in COMBINED if name.startswith("family=decoder "))
LARGE = "encoder_heads=pooler", "encoder_heads=masked_lm"
"""The heads for pre-training are these two."""


def _marked(name: str) -> Any:
    mark = pytest.mark.large if name in LARGE else pytest.mark.slow
    return name if name == FAST else pytest.param(name, marks=mark)


@pytest.mark.parametrize("name", [_marked(name) for name in COMBINED])
def test_every_axis_value_passes(name):
    """Each in company, since compiling takes most of the time; `certify --all` has each alone."""
    assert failures({name: checked(Case(COMBINED[name], COMBINED[name]), PROPERTIES)}) == []


def test_every_axis_value_is_in_a_combination():
    alone = axis_values()
    assert {value for name in COMBINED for value in name.split()} == alone.keys()
    for name, config in COMBINED.items():
        for value in name.split():
            axis = value.partition("=")[0]
            assert getattr(config, axis) == getattr(alone[value], axis), (name, value)


@pytest.mark.large
def test_attention_of_two_kinds_in_turn_passes():
    assert failures({"t-dmca": certify(preset("t-dmca"))}) == []


def test_a_dash_has_its_reason():
    encoder, recurrent = axis_values()["family=encoder"], axis_values()["family=recurrent"]
    (cached,) = checked(Case(encoder, encoder), ["cached"]).values()
    (attended,) = checked(Case(recurrent, recurrent), ["attention"]).values()
    assert (str(cached), cached.reason) == ("–", "an encoder predicts no next token")
    assert (str(attended), attended.reason) == ("–", "an LSTM has no attention")


class Broken(NamedTuple):
    """A fault, and the property that must notice it."""

    noticed_by: str
    of: Any
    """What has the broken attribute."""
    attribute: str
    broken: Callable[[Any], Any]
    """The attribute → a wrong one."""
    changes: Mapping[str, Any] = MappingProxyType({})


def _scaled(run: Callable, field: str) -> Callable:
    """`run_layers` with a stream that enters 1% too large where the config's `field` is on."""

    def wrong(layer, stacks, x, rows, *, config, **named):
        entering = 1.01 * x if getattr(config, field) not in (False, "none") else x
        return run(layer, stacks, entering, rows, config=config, **named)

    return wrong


def _steeper(attend: Callable) -> Callable:
    """The same values, a gradient that is 0.1% too large."""

    def wrong(*arguments: Any) -> jax.Array:
        mixture = attend(*arguments)
        return mixture + 0.001 * (mixture - jax.lax.stop_gradient(mixture))

    return wrong


def _means_of_means(summed: Callable) -> Callable:
    def wrong(params, batch, key, loss, grad_accumulation, *scale):
        sums, gradients = summed(params, batch, key, loss, grad_accumulation, *scale)
        return sums._replace(weight=sums.weight * grad_accumulation), gradients

    return wrong


def _rounded(save: Callable) -> Callable:
    def wrong(self, state, *arguments):
        rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), state)
        save(self, rounded._replace(step=state.step), *arguments)

    return wrong


def _without_last(over: Callable) -> Callable:
    def wrong(add_chunk, start, chunks):
        count = max(1, len(chunks.targets) - 1)
        sums, output = over(add_chunk, start, jax.tree.map(lambda leaf: leaf[:count], chunks))
        return sums, jnp.pad(output, ((0, len(chunks.targets) - count), (0, 0), (0, 0)))

    return wrong


def _mask(**changes: Any) -> Callable:
    return lambda mask: lambda distance, rule: mask(distance, dataclasses.replace(rule, **changes))


FAULTS = {
    "sees later tokens": Broken("mask", stack, "attention_mask", _mask(causal=False)),
    "an encoder that looks back only": Broken(
        "mask", stack, "attention_mask", _mask(causal=True), {"family": "encoder"}
    ),
    "an encoder that sees padding": Broken(
        "mask", stack, "attention_mask", _mask(padding_mask=None), {"family": "encoder"}
    ),
    "a document that sees its neighbours": Broken(
        "packed", stack, "attention_mask", _mask(segment_ids=None)
    ),
    "positions that do not restart": Broken(
        "packed",
        language_model.LanguageModel,
        "embed",
        lambda embed: lambda self, inputs, key: embed(self, Inputs(inputs.tokens), key),
    ),
    "another loop when scanned": Broken(
        "scanned",
        stack,
        "run_layers",
        lambda run: _scaled(run, "scan_layers"),
    ),
    "another block when recomputed": Broken(
        "remat",
        stack,
        "run_layers",
        lambda run: _scaled(run, "remat"),
    ),
    "the cache written a place late": Broken(
        "cached",
        module.KVCache,
        "write",
        lambda write: lambda self, new, start: write(self, new, start + 1),
    ),
    "another activation in one page": Broken(
        "plain",
        jax.nn,
        "gelu",
        lambda gelu: lambda x, approximate: gelu(x, approximate=False),
    ),
    "attention's gradient scaled": Broken("attention", module, "attend", _steeper),
    "a chunk left out": Broken("chunked", cross_entropy, "_over_chunks", _without_last),
    "parts averaged twice": Broken("accumulated", step, "_summed_gradients", _means_of_means),
    "devices not added up": Broken(
        "sharded", step, "sum_over_devices", lambda _: lambda tree, axis: tree
    ),
    "bfloat16 products too large": Broken(
        "rounded",
        linear.Linear,
        "__call__",
        lambda call: lambda self, x: call(self, x) * (1.3 if x.dtype == jnp.bfloat16 else 1),
    ),
    "int8 products too large": Broken(
        "rounded",
        matrices.Int8Matrix,
        "products",
        lambda products: lambda self, x: 1.3 * products(self, x),
        {"mlp_dim": 12},  # The decoding of the model above is compiled.
    ),
    "parameters saved in bfloat16": Broken("restored", Checkpoints, "save", _rounded),
    "a parameter too many": Broken(
        "parameters",
        properties,
        "model_cost",
        lambda model_cost: lambda config: model_cost(dataclasses.replace(config, vocab_size=8)),
    ),
    "a FLOP too many": Broken(
        "flops",
        properties,
        "model_cost",
        lambda model_cost: (
            lambda config: dataclasses.replace(
                model_cost(config), attention_flops=model_cost(config).attention_flops + 1
            )
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_broken_model_fails(fault, monkeypatch):
    # A vocabulary of its own, so that no program compiled of the whole model is met again.
    config = dataclasses.replace(BASE, vocab_size=7, **fault.changes)
    sound = getattr(fault.of, fault.attribute)
    monkeypatch.setattr(fault.of, fault.attribute, fault.broken(sound))
    cell = checked(Case(config, config), [fault.noticed_by])[fault.noticed_by]
    assert not cell.reason
    assert not cell.passed
    assert cell.error > 10 * cell.tolerance or fault.noticed_by == "rounded"


@pytest.mark.slow
def test_of_properties_checked_together_only_the_broken_one_fails(monkeypatch):
    config = dataclasses.replace(BASE, vocab_size=7)
    monkeypatch.setattr(step, "sum_over_devices", lambda tree, axis: tree)
    together = ["scanned", "remat", "chunked", "accumulated", "sharded"]
    row = checked(Case(config, config), together)
    assert [name for name, cell in row.items() if not cell.passed] == ["sharded"]


def test_every_property_is_seen_to_fail():
    assert {fault.noticed_by for fault in FAULTS.values()} == set(PROPERTIES)


def test_a_check_that_breaks_is_a_cell_that_fails(monkeypatch):
    def none_there(config):
        raise KeyError(config.family)

    monkeypatch.setattr(properties, "model_cost", none_there)
    row = checked(Case(BASE, BASE), ["parameters"])
    assert not row["parameters"].passed
    (sentence,) = failures({"base": row})
    assert "KeyError: 'decoder'" in sentence


def test_a_difference_is_relative_and_not_finite_is_infinite():
    expected = {"a": np.array([4.0, 0.0]), "b": np.array([1.0])}
    assert difference({"a": np.array([4.0, 0.0]), "b": np.array([1.5])}, expected) == 0.125
    assert difference(np.array([math.nan]), np.array([math.nan])) == math.inf
    assert difference((np.float32(1.5), np.array([9.0])), (np.float32(1), np.array([9.0]))) == 0.5


def test_every_field_is_an_axis_or_left_out_for_a_reason():
    axes = {name.partition("=")[0] for name in axis_values()}
    assert axes | OUTSIDE.keys() == FIELDS.keys()
    assert not axes & OUTSIDE.keys()
    assert axes >= SETTINGS.keys() | TINY.keys()
    assert {name.partition("=")[0] for name in COMPANIONS} <= axes


def test_every_value_of_a_literal_is_in_the_grid_without_a_line_of_its_own():
    names = axis_values()
    for field, hint in FIELDS.items():
        if typing.get_origin(hint) is Literal and field not in OUTSIDE:
            for value in typing.get_args(hint):
                assert getattr(names[f"{field}={value}"], field) == value


SET = SETTINGS.keys() | TINY.keys()
KEPT = FIELDS.keys() - OUTSIDE.keys() - SET


@pytest.mark.parametrize("name", PRESETS)
def test_a_shrunk_preset_keeps_its_architecture(name):
    real, tiny = preset(name), shrunk(preset(name))
    assert {field: getattr(tiny, field) for field in KEPT} == {
        field: getattr(real, field) for field in KEPT
    }
    for field in ("attention", "rotary_fraction", "token_types", "norm_epsilon", "compression"):
        assert getattr(tiny, field) == getattr(real, field)
    for field in SET - {"kv_heads", "head_dim"} | {"window", "num_experts"}:
        assert bool(getattr(tiny, field)) == bool(getattr(real, field))
    assert (tiny.heads == tiny.actual_kv_heads) == (real.heads == real.actual_kv_heads)
    assert (tiny.actual_kv_heads == 1) == (real.actual_kv_heads == 1)
    assert (tiny.heads & tiny.heads - 1 == 0) == (real.heads & real.heads - 1 == 0)
    filled = [config.heads * config.actual_head_dim == config.width for config in (tiny, real)]
    assert filled[0] == filled[1]
    assert tiny.width <= 64
    assert tiny.depth == 2 * len(real.attention_pattern)


def test_an_unknown_variant_lists_the_near_ones():
    assert list(variants(["gpt2", "position_embedding=alibi"])) == [
        "gpt2",
        "position_embedding=alibi",
    ]
    assert variants().keys() == axis_values().keys() | PRESETS.keys()
    with pytest.raises(InputError, match=r"alibbi': did you mean position_embedding=alibi"):
        variants(["position_embedding=alibbi"])


def test_grouped_products_are_counted_by_row():
    def loss(x, kernels):
        return jax.lax.ragged_dot(x, kernels, jnp.array([1, 4, 2])).sum()

    shapes = jnp.zeros((7, 5)), jnp.zeros((3, 5, 4))
    assert product_flops(jax.make_jaxpr(loss)(*shapes).jaxpr) == 2 * 7 * 5 * 4
    gradient = jax.grad(loss, argnums=(0, 1))
    assert product_flops(jax.make_jaxpr(gradient)(*shapes).jaxpr) == 3 * 2 * 7 * 5 * 4


def test_the_page_shows_what_fails():
    good = {name: Cell(0.0, each.tolerance) for name, each in PROPERTIES.items()}
    dash = {**good, "cached": Cell(math.nan, 1e-5, "an encoder predicts no next token")}
    bad = {**good, "mask": Cell(0.25, 1e-5)}
    passing = page({"a": good, "b": dash}, "certify")
    assert f"2 variants, {2 * len(good) - 1} checks, all pass" in passing
    assert "A dash: an encoder predicts no next token." in passing
    failing = page({"a": good, "c": bad}, "certify")
    assert "**1 fail**" in failing
    assert "| `c` | **2e-01** | 0 |" in failing
    assert "- c: no token attends to padding, or if causal" in failing


@pytest.fixture
def only_counts(monkeypatch):
    """A grid of the two cheapest columns."""
    for name in ("gptjax.certify.grid", "gptjax.certify.properties"):
        kept = {name: PROPERTIES[name] for name in ("parameters", "flops")}
        monkeypatch.setattr(f"{name}.PROPERTIES", kept)
    monkeypatch.setattr(
        "gptjax.certify.grid._tiny_row", sys.modules["gptjax.certify.grid"]._tiny_row.__wrapped__
    )


@pytest.mark.usefixtures("only_counts")
def test_the_command_prints_a_line_a_variant(command):
    code, out, err = command("certify", "gpt2", "position_embedding=alibi")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["1", "parameters"], ["2", "flops"]]
    assert [line.split() for line in lines[3:-1]] == [
        ["error", "of", "property", "1", "2"],
        ["gpt2", "0", "0"],
        ["position_embedding=alibi", "0", "0"],
    ]
    assert lines[-1] == "2 variants: 2 of 2 properties hold, 4 of 4 checks."


def test_the_table_fits_into_a_terminal_of_100_columns():
    row = {name: Cell(1e-7, 0.0) for name in PROPERTIES}  # All fail, and have a mark.
    lines = [*heading().splitlines(), *(line(name, row) for name in variants())]
    assert max(map(len, lines)) <= 100


@pytest.mark.usefixtures("only_counts")
def test_the_command_prints_the_page(command):
    code, out, err = command("certify", "gpt2", "--markdown")
    assert code == 0
    assert out.startswith("# Certificate\n\n`python -m gptjax certify gpt2 --markdown`: 1 variants")
    assert err.splitlines()[-1].split() == ["gpt2", "0", "0"]


@pytest.mark.usefixtures("only_counts")
def test_the_command_fails_with_a_sentence(command, monkeypatch):
    monkeypatch.setattr(properties, "product_flops", lambda jaxpr: 1)
    code, out, _ = command("certify", "gpt2")
    assert code == 1
    *_, sentence, verdict = out.splitlines()
    assert sentence.startswith(
        "gpt2: counted FLOPs (costs/model.py) = those of traced products: error"
    )
    assert verdict == "1 variant: 1 of 2 properties hold, 1 of 2 checks; failed: flops of gpt2."


@pytest.mark.parametrize("arguments", [(), ("gpt2", "--all")])
def test_the_command_takes_names_or_all(command, arguments):
    code, out, err = command("certify", *arguments)
    assert (code, out) == (2, "")
    assert err == "certify takes names, such as gpt2 or position_embedding=alibi, or else --all.\n"


def test_the_command_lists_the_near_names(command):
    code, out, err = command("certify", "gtp2")
    assert (code, out) == (2, "")
    assert err.startswith("Unknown variant 'gtp2': did you mean gpt2")
