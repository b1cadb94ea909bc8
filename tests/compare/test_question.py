import dataclasses

import pytest

from gptjax.compare.question import BUDGETS, MEASURES, Comparison, parse_quantity
from gptjax.config import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params", ("params", ())),
        ("params=1M", ("params", (1e6,))),
        ("params=0.3M,1M,3M", ("params", (0.3e6, 1e6, 3e6))),
        ("flops=2e15", ("flops", (2e15,))),
        ("flops=2P", ("flops", (2e15,))),
        ("seconds=90", ("seconds", (90.0,))),
        ("params=124B", ("params", (124e9,))),
        ("params=100k,100K,3m,3M,1b,1B,1g,1G", ("params", (1e5, 1e5, 3e6, 3e6, *[1e9] * 4))),
    ],
)
def test_a_quantity_is_a_name_and_amounts(text, expected):
    assert parse_quantity("match", text, MEASURES) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("parms", "--match has an unknown measure 'parms': did you mean params?"),
        ("epochs=3", "--match has an unknown measure 'epochs': known are flops, params, seconds."),
        ("params=", "--match is 'params=': '' must be a number above 0"),
        ("params=1M,", "'' must be a number above 0"),
        ("params=-3", "'-3' must be a number above 0"),
        ("params=M", "'M' must be a number above 0"),
        ("params=nan", "'nan' must be a number above 0"),
        ("params=1e400", "'1e400' must be a number above 0"),
        ("params=3x", "'3x' must be a number above 0, as 300000, 0.3M or 3e5"),
    ],
)
def test_what_is_no_quantity_is_told(text, sentence):
    with pytest.raises(InputError) as error:
        parse_quantity("match", text, MEASURES)
    assert sentence in str(error.value)


def test_the_flag_is_named():
    with pytest.raises(InputError, match="--budget has an unknown measure 'steps'"):
        parse_quantity("budget", "steps=5", BUDGETS)


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("variants", (), "at least one variant"),
        ("seeds", 0, "at least 1"),
        ("search_seeds", 0, "at least 1"),
        ("evaluations", 0, "at least 1"),
        ("rates", (), "at least one learning rate"),
        ("rates", (1e-3, 0.0), "above 0"),
        ("tolerance", 0.0, "between 0 and 1"),
        ("confidence", 1.0, "between 0 and 1"),
        ("dropout", 1.0, "at least 0 and below 1"),
        ("mup_width", -1, "at least 0"),
    ],
)
def test_a_wrong_value_is_told_by_its_field(field, value, accepted):
    with pytest.raises(InputError) as error:
        dataclasses.replace(Comparison(("gpt2",)), **{field: value})
    assert str(error.value).startswith(f"Comparison.{field} is ")
    assert str(error.value).endswith(f"{accepted}.")
