"""gptjax/config/README.md has every field as it is: flag, default, what is accepted, meaning.

    python tests/config/test_config_readme.py

writes its tables anew, from the dataclasses and the texts under their fields.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

from gptjax.config import ExperimentConfig, InputError

README = Path(__file__).parents[2] / "gptjax" / "config" / "README.md"
SECTIONS = typing.get_type_hints(ExperimentConfig)
NO_NUMBER = -5
"""Which every field of a number refuses, in a sentence that ends with what it accepts."""
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "`True`, `False`"}


def meanings(section: type) -> dict[str, str]:
    """The text under each field, on one line."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
    }


def accepted(section: type, name: str, kind: Any) -> str:
    """What a field takes: its values by name, or its numbers as the config itself says them."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        if typing.get_origin(typing.get_args(kind)[0]) is Literal:
            return f"several of {accepted(section, name, typing.get_args(kind)[0])}"
        return {str: "texts", float: "numbers above 0"}[typing.get_args(kind)[0]]
    options = typing.get_args(kind) or (kind,)
    words = ", ".join(NAMES.get(option, "`None`") for option in options)
    if int in options or float in options:
        try:
            section(**{name: NO_NUMBER})
        except InputError as error:
            words = words.replace(" number", f" number {str(error).split('must be ')[1][:-1]}")
    return words


def shown(default: Any) -> str:
    """A default as a flag has it."""
    if isinstance(default, tuple):
        return f"`{' '.join(default)}`" if default else "none"
    return "empty" if default == "" else f"`{default}`"


def table(name: str) -> str:
    """The fields of a section."""
    section = SECTIONS[name]
    kinds, texts = typing.get_type_hints(section), meanings(section)
    rows = [
        f"| `--{name}.{field.name.replace('_', '-')}` | {shown(field.default)} "
        f"| {accepted(section, field.name, kinds[field.name])} | {texts[field.name]} |"
        for field in dataclasses.fields(section)
    ]
    return "\n".join(["| flag | default | accepted | meaning |", "|---|---|---|---|", *rows, ""])


def written(name: str) -> str:
    """The section's table in the README."""
    return README.read_text().split(f"## `--{name}.…`")[1].split("\n\n")[2].rstrip("\n") + "\n"


@pytest.mark.parametrize("name", SECTIONS)
def test_the_readme_has_every_field_as_it_is(name):
    assert written(name) == table(name), f"python {Path(__file__).name} writes it anew"


def test_numbers_have_limits_but_where_another_field_sets_them():
    numbers = re.findall(r"`--\S+\.(\S+)` \|[^|]+\| a (?:whole )?number \|", README.read_text())
    assert numbers == ["rotary-fraction", "experts-per-token"]


if __name__ == "__main__":
    text = README.read_text()
    for section_name in SECTIONS:
        text = text.replace(written(section_name), table(section_name))
    README.write_text(text)
