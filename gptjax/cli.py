"""The command line, thin over the modules: `python -m gptjax`, and the flags of experiments.

An error that a user can fix is one sentence on standard error, with an exit code by kind
(`gptjax.system.exits`); `--debug` shows the traceback.
"""

import contextlib
import errno
import importlib.metadata
import io
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from gptjax import distributed
from gptjax.commands import commands, train
from gptjax.commands.flags import parse_flags
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

RunExperiment = Callable[[ExperimentConfig, Path, bool], None]


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
            parse_flags(known[name], flags, prog=f"gptjax {name}")()
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
        parse_flags(experiment, arguments, description=help_text, **options)()

    return parse_and_run


def run_command(command: Callable[..., None], description: str | None) -> None:
    """Parse the flags that are a function's parameters, and run it."""
    help_text = f"{description}\n--debug shows the traceback of an error."

    def parse_and_run(arguments: list[str]) -> None:
        parse_flags(command, arguments, description=help_text)()

    _guarded(parse_and_run)


def _script_apart(arguments: list[str]) -> list[str]:
    """Insert the `--` that tyro needs before the flags of `launch`'s script."""
    index = next((index for index, word in enumerate(arguments) if word.endswith(".py")), None)
    if arguments[:1] != ["launch"] or index is None:
        return arguments
    script, flags, of_script = arguments[index], arguments[1:index], arguments[index + 1 :]
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
    # A notebook's output is of another class, and has all characters.
    if isinstance(sys.stdout, io.TextIOWrapper):
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
