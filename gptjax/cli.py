"""The command line, thin over the modules: `python -m gptjax`, and the flags of experiments.

An error that a user can fix is one sentence on standard error, with an exit code by kind
(`gptjax.system.exits`); `--debug` shows the traceback.
"""

import contextlib
import difflib
import errno
import functools
import importlib.metadata
import io
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from gptjax import distributed
from gptjax.commands import commands, train
from gptjax.commands.training import trainable
from gptjax.config import ExperimentConfig, InputError, near_names, shown
from gptjax.config.values import Objective
from gptjax.system.disk import CheckpointFailed, is_failure
from gptjax.system.exits import Diverged, Exit, Interrupted, Interrupts
from gptjax.system.memory import ran_out

UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM)
"""Errors of invalid or inaccessible paths."""

OVERVIEW = """usage: gptjax COMMAND [OPTIONS]

Train, probe and compare models of the GPT family.

{}

gptjax COMMAND --help lists a command's flags; --debug shows the traceback of an
error, and gptjax --version the version."""
HELP_WIDTH = 79

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

RunExperiment = Callable[[ExperimentConfig, Path, bool], None]

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


def main() -> None:
    """Run `gptjax COMMAND …`, a command of `gptjax.commands`."""

    def parse_and_run(arguments: list[str]) -> None:
        if arguments == ["--version"]:
            print(f"gptjax {importlib.metadata.version('gptjax')}")
            return
        if arguments[:1] == ["train"]:
            _experiment(train, trainable(), Path("runs"), train.__doc__, "gptjax train")(
                arguments[1:]
            )
            return
        known = commands(arguments)
        name, *flags = _script_apart(arguments) or [""]
        if name in ("-h", "--help"):
            print(_overview(known))
        elif name in known:
            _parse(known[name], flags, prog=f"gptjax {name}")()
        elif name:
            raise InputError(f"Unknown command {name!r}: {near_names(name, known)}")
        else:
            raise InputError(f"A command is missing: known are {', '.join(known)}.")

    _guarded(parse_and_run)


def _overview(known: dict[str, Callable[..., None]]) -> str:
    """Returns what `gptjax --help` prints: the first line of each command's docstring."""
    lines = [
        textwrap.fill(
            f"{name:<15}{(command.__doc__ or '').splitlines()[0]}",
            width=HELP_WIDTH,
            initial_indent="  ",
            subsequent_indent=17 * " ",
        )
        for name, command in known.items()
    ]
    return OVERVIEW.format("\n".join(lines))


def run_experiment(
    run: RunExperiment,
    presets: dict[str, ExperimentConfig],
    out: str,
    description: str | None,
    *,
    objectives: tuple[Objective, ...] = (),
) -> None:
    """Parse an experiment's flags and run it.

    Every field of the config is a flag; the first preset gives the defaults, and `--preset NAME`
    another if there are several. Further flags: `--out`, `--overwrite`, `--debug`. Objectives
    other than `objectives`, if given, are refused.
    """

    def run_its_own(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
        if objectives and config.data.objective not in objectives:
            raise InputError(
                f"data.objective is {config.data.objective!r}: this experiment is for "
                f"{' or '.join(objectives)}."
            )
        run(config, out, overwrite)

    _guarded(_experiment(run_its_own, presets, Path(out), description, None))


def _experiment(
    run: RunExperiment,
    presets: dict[str, ExperimentConfig],
    out: Path,
    description: str | None,
    prog: str | None,
) -> Callable[[list[str]], None]:
    """Returns a function that parses an experiment's flags and runs it."""
    help_text = f"{description}\n--debug shows the traceback of an error."
    if len(presets) > 1:
        first, *others = presets
        help_text += f" --preset NAME sets the defaults: {first}, or {', '.join(others)}."

    def parse_and_run(arguments: list[str]) -> None:
        default, name = next(iter(presets.values())), next(iter(presets))
        directory = out
        if len(presets) > 1:
            name, arguments = _take_preset(arguments, presets)
            default, directory = presets[name], out / name

        def experiment(
            config: Annotated[ExperimentConfig, tyro.conf.arg(name="")] = default,
            out: Path = directory,
            overwrite: bool = False,
        ) -> None:
            """The experiment's own flags.

            Args:
              config: The run's config.
              out: Directory of all outputs; the same one resumes the run.
              overwrite: Delete an existing run and start over.
            """
            with distributed.joined(config):
                run(config, out, overwrite)

        options = {} if prog is None else {"prog": prog}
        _parse(experiment, arguments, description=help_text, **options)()

    return parse_and_run


def run_command(command: Callable[..., None], description: str | None) -> None:
    """Parse the flags that are a function's parameters, and run it."""
    help_text = f"{description}\n--debug shows the traceback of an error."

    def parse_and_run(arguments: list[str]) -> None:
        _parse(command, arguments, description=help_text)()

    _guarded(parse_and_run)


def _script_apart(arguments: list[str]) -> list[str]:
    """Insert the `--` that tyro needs before the flags of `launch`'s script."""
    place = next((place for place, word in enumerate(arguments) if word.endswith(".py")), None)
    if arguments[:1] != ["launch"] or place is None:
        return arguments
    script, flags, of_script = arguments[place], arguments[1:place], arguments[place + 1 :]
    return ["launch", script, *flags, "--", *of_script]


def _take_preset(
    arguments: list[str], presets: dict[str, ExperimentConfig]
) -> tuple[str, list[str]]:
    """Returns the value of `--preset`, by default the first, and the arguments without it."""
    rest, name = [], next(iter(presets))
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--preset":
            name = value if equals else next(words, "")
            if name not in presets:
                raise InputError(f"Unknown --preset {name!r}: {near_names(name, presets)}")
        else:
            rest.append(word)
    return name, rest


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Returns the command with the same flags, returning a function instead of running."""

    @functools.wraps(command)
    def parsed(*arguments: Any, **flags: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **flags)

    return parsed


def _parse(command: Callable[..., None], arguments: list[str], **options: Any):
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


def _guarded(command: Callable[[list[str]], None]) -> None:
    """Run a command; user errors are sentences, and `--debug` shows the traceback."""
    accept_all_characters()
    interrupts = Interrupts()
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Else a job's handler.
    if default:
        signal.signal(signal.SIGINT, interrupts)
    try:
        _with_sentences(command)
    except BaseException as error:
        distributed.leave_at_once(error)
        raise
    finally:
        if default and not interrupts.noted:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def accept_all_characters() -> None:
    """Print a question mark for characters outside standard output's encoding."""
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # A notebook's has another class, and all characters.
        sys.stdout.reconfigure(errors="replace")


def _with_sentences(command: Callable[[list[str]], None]) -> None:
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1

    try:
        command(arguments)
        sys.stdout.flush()
    except CheckpointFailed as error:
        _fail_at_once(str(error), Exit.DISK, debug)
    except InputError as error:
        _fail(str(error), Exit.DISK if is_failure(error) else Exit.MISTAKE, debug)
    except Diverged as error:
        _fail_together(str(error), Exit.DIVERGED, debug)
    except Interrupted as error:
        _fail_together(str(error), error.exit_code, debug)
    except BrokenPipeError:
        _let_go_of_output()  # The reader, such as `head`, has closed the pipe.
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.filename and error.errno in UNUSABLE:
            _fail(f"{shown(error.filename)}: {error.strerror}.", Exit.MISTAKE, debug)
        if not is_failure(error):
            raise
        _let_go_of_output()  # Its disk may be the full one.
        _fail(f"{error.filename or 'the output'}: {error.strerror}.", Exit.DISK, debug)
    except KeyboardInterrupt:
        _fail("Stopped.", Exit.INTERRUPTED, debug)
    except Exception as error:
        if not ran_out(error):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
        _fail(f"There is not enough memory ({reason}): choose smaller sizes.", Exit.MISTAKE, debug)


def _let_go_of_output() -> None:
    """Redirect standard output to nowhere if it is broken, so that the flush at exit succeeds."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail_at_once(sentence: str, code: int, debug: bool) -> NoReturn:
    """Exit without waiting for Orbax's threads, which would print their own errors."""
    with contextlib.suppress(SystemExit):
        _fail(sentence, code, debug)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _fail_together(sentence: str, code: int, debug: bool) -> NoReturn:
    """Exit on all processes; only the first prints the sentence."""
    if distributed.is_first():
        _fail(sentence, code, debug)
    raise SystemExit(code)


def _fail(sentence: str, code: int, debug: bool) -> NoReturn:
    with contextlib.suppress(OSError):  # Its disk may be full, too.
        if debug:
            traceback.print_exc()
        print(sentence, file=sys.stderr)
    raise SystemExit(code)
