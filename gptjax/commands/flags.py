"""Parsing a command's flags, with errors as sentences that name the flags that may be meant."""

import contextlib
import difflib
import functools
import io
import re
from collections.abc import Callable
from typing import Any

import tyro

from gptjax.config import InputError

SYNONYMS = {
    "lr": ("rates", "learning-rate"),
    "max-lr": ("learning-rate",),
    "wd": ("weight-decay",),
    "grad-clip": ("clip-norm",),
    "max-grad-norm": ("clip-norm",),
    "warmup": ("warmup-steps",),
    "iters": ("steps",),
    "max-iters": ("steps",),
    "max-steps": ("steps",),
    "epochs": ("steps",),
    "bs": ("batch-size",),
    "batch": ("batch-size",),
    "block-size": ("context-length",),
    "seq-len": ("context-length",),
    "seq-length": ("context-length",),
    "layers": ("depth",),
    "num-layers": ("depth",),
    "n-layer": ("depth",),
    "num-heads": ("heads",),
    "n-head": ("heads",),
    "n-embd": ("width",),
    "d-model": ("width",),
    "hidden-size": ("width",),
    "d-ff": ("mlp-dim",),
    "gradient-accumulation-steps": ("grad-accumulation",),
    "data": ("source",),
    "dataset": ("source",),
    "file": ("source",),
    "model": ("preset",),
    "output": ("out",),
    "output-dir": ("out",),
    "max-tokens": ("max-new-tokens",),
}
"""Names of flags elsewhere → the last part of ours; the first that the command has counts."""

MOST_MEANT = 3
"""Most flags suggested for an unknown one."""

TYPES = tyro.constructors.ConstructorRegistry()


@TYPES.primitive_rule
def _text(
    type_info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Show strings as TEXT in help, where tyro has STR."""
    if type_info.type is not str:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Returns the command with the same flags, returning a function instead of running."""

    @functools.wraps(command)
    def parsed(*arguments: Any, **flags: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **flags)

    return parsed


def parse_flags(command: Callable[..., None], arguments: list[str], **options: Any):
    """Returns the command with parsed flags; errors are sentences instead of tyro's box.

    Raises:
      InputError: an unknown flag, or a value that is not accepted.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(_deferred(command), args=arguments, registry=TYPES, **options)
    except SystemExit as exit:
        if not exit.code:
            raise  # --help was shown.
        error = exit.__context__
        while error is not None and not isinstance(error, InputError):
            error = error.__context__
        raise error or InputError(_sentence(box.getvalue(), command, options)) from None


def _sentence(box: str, command: Callable[..., None], options: dict[str, Any]) -> str:
    """Returns the message in tyro's box, with suggestions for unknown flags.

    The box has parts separated by rules: a title, the message, and tyro's additions.
    """
    lines = "\n".join(line.strip(" │╭╮╰╯") for line in _colourless(box).splitlines())
    parts = re.split(r"^(?:─ .+ )?[─-]{3,}$", lines, flags=re.MULTILINE)
    message = " ".join(parts[1].split())
    kind, _, listed = message.partition("Unrecognized options: ")
    if kind or not listed:
        return message if message.endswith(".") else f"{message}."
    words = listed.split(", ")
    flags = [word for word in words if word.startswith("--")]
    known = _flags(command, options)
    meant = [" or ".join(near) for flag in flags if (near := _near_flags(flag, known))]
    hint = f"did you mean {' and '.join(meant)}?" if meant else "see --help."
    return f"Unknown {'flag' if flags else 'argument'} {', '.join(flags or words)}: {hint}"


def _colourless(text: str) -> str:
    """Returns the text without terminal colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def _flags(command: Callable[..., None], options: dict[str, Any]) -> list[str]:
    """Returns all flags in a command's help, except --no-… ones."""
    with contextlib.redirect_stdout(io.StringIO()) as help, contextlib.suppress(SystemExit):
        tyro.cli(_deferred(command), args=["--help"], registry=TYPES, **options)
    named = dict.fromkeys(re.findall(r"(?<![\w-])--\w[\w.-]*\w", _colourless(help.getvalue())))
    return [flag for flag in named if not re.search(r"[.-]no-", flag)]


def _near_flags(given: str, known: list[str]) -> list[str]:
    """Returns flags close to `given`: of the same last part, a synonym, or a similar spelling."""
    name = given.lstrip("-").partition("=")[0].replace("_", "-")
    last = name.rpartition(".")[2]
    for wanted in (*SYNONYMS.get(last, ()), last):
        if same := [flag for flag in known if flag[2:].rpartition(".")[2] == wanted]:
            return same
    # A flag given without its section is compared without it.
    parts = {flag: flag[2:] if "." in name else flag[2:].rpartition(".")[2] for flag in known}
    near = difflib.get_close_matches(name, set(parts.values()), cutoff=0.7)
    return [flag for part in near for flag in known if parts[flag] == part][:MOST_MEANT]
