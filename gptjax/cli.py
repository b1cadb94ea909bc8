"""The command line, thin over the modules: `python -m gptjax`, and the flags of experiments.

A mistake of the user's is one sentence on standard error and exit code 2; `--debug` shows where it
was noticed.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from gptjax.config import ExperimentConfig, InputError, near_names
from gptjax.ledger import Ledger, ledger
from gptjax.presets import PRESETS, preset

RunExperiment = Callable[[ExperimentConfig, Path, bool], None]


def sample(
    run: Annotated[str, tyro.conf.Positional],
    /,
    prompt: str = "\n",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
    sliding_window: bool = False,
    step: int | None = None,
) -> None:
    """Continue a prompt with a trained run, printing the text as it comes.

    Args:
      run: Directory of the run, such as runs/quickstart.
      prompt: Text to continue.
      max_new_tokens: Tokens to add; fewer at the end token or at the context's end.
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Choose among this many of the most likely tokens; 0 takes all.
      top_p: Choose among the most likely tokens that together reach this probability.
      seed: Seed of the choices.
      num_samples: Continuations, decoded as one batch; more than one are printed when all end.
      sliding_window: Past the context's end, go on from its second half.
      step: Checkpoint to load; the best by default.
    """
    import numpy as np

    from gptjax.data.tokenizers import stream_text
    from gptjax.generate import Sampling, generate
    from gptjax.runs import load_run

    if num_samples < 1:
        raise InputError(f"num-samples is {num_samples}: it must be at least 1.")
    if max_new_tokens < 1:
        raise InputError(f"max-new-tokens is {max_new_tokens}: it must be at least 1.")
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed is {seed}: it must be at least 0 and below 2**32.")
    sampling = Sampling(temperature, top_k, top_p)
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"prompt is {prompt!r}: it must be UTF-8.") from error
    loaded = load_run(run, step)
    tokens = loaded.tokenizer.encode(prompt)
    rows = generate(
        loaded.model,
        np.tile(tokens, (num_samples, 1)),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        end_token=loaded.tokenizer.end_token,
        sliding_window=sliding_window,
    )
    if num_samples == 1:
        for text in stream_text(loaded.tokenizer, (row[0] for row in rows)):
            print(text, end="", flush=True)
        print()
        return
    for number, column in enumerate(np.stack(list(rows), axis=1)):
        print(f"--- sample {number + 1}")
        print("".join(stream_text(loaded.tokenizer, column)))


def params(
    name: Annotated[str, tyro.conf.Positional],
    /,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Print what a model is made of and what a token costs.

    Args:
      name: A preset's name, or the directory of a run.
      as_json: Print JSON for machines.
    """
    from gptjax.runs import CONFIG, load_config

    is_run = name not in PRESETS and (Path(name) / CONFIG).exists()
    counted = ledger(load_config(name).model if is_run else preset(name))
    print(json.dumps(_ledger_json(counted), indent=2) if as_json else _ledger_table(name, counted))


def _ledger_json(counted: Ledger) -> dict:
    return {
        "parts": [dataclasses.asdict(part) for part in counted.parts],
        "parameters": counted.parameters,
        "forward_flops_per_token": counted.forward_flops,
        "attention_flops_per_token": counted.attention_flops,
        "training_flops_per_token": counted.training_flops,
        "state_bytes": counted.state_bytes,
    }


def _ledger_table(name: str, counted: Ledger) -> str:
    lines = [f"{name}", f"  {'part':<14}{'matrices':>10}{'parameters':>16}{'share':>8}"]
    for part in counted.parts:
        share = part.parameters / counted.parameters
        lines.append(f"  {part.name:<14}{part.matrices:>10,}{part.parameters:>16,}{share:>8.1%}")
    lines += [
        f"  {'total':<24}{counted.parameters:>16,}",
        "FLOPs a token, at full context",
        f"  {'forward':<24}{counted.forward_flops:>16,}",
        f"  {'  of it attention':<24}{counted.attention_flops:>16,}",
        f"  {'training':<24}{counted.training_flops:>16,}",
        "bytes of training state, float32",
        *(f"  {kind:<24}{size:>16,}" for kind, size in counted.state_bytes.items()),
        f"  {'total':<24}{sum(counted.state_bytes.values()):>16,}",
    ]
    return "\n".join(lines)


COMMANDS = {"sample": sample, "params": params}


def main() -> None:
    """`gptjax sample|params …`."""
    commands = {name: _deferred(command) for name, command in COMMANDS.items()}

    def parse_and_run(arguments: list[str]) -> None:
        _parse(
            tyro.extras.subcommand_cli_from_dict,
            commands,
            prog="gptjax",
            description=__doc__,
            args=arguments,
        )()

    _guarded(parse_and_run)


def run_experiment(
    run: RunExperiment, presets: dict[str, ExperimentConfig], out: str, description: str | None
) -> None:
    """Parse an experiment's flags and run it.

    Every field of the config is a flag; the first preset gives the defaults, and `--preset NAME`
    picks another where there are several. Beside them: `--out`, `--overwrite`, `--debug`.
    """
    help_text = f"{description}\n--debug shows the traceback of a mistake."
    if len(presets) > 1:
        first, *others = presets
        help_text += f" --preset NAME sets the defaults: {first}, or {', '.join(others)}."

    def parse_and_run(arguments: list[str]) -> None:
        default, name = next(iter(presets.values())), next(iter(presets))
        directory = Path(out)
        if len(presets) > 1:
            name, arguments = _take_preset(arguments, presets)
            default, directory = presets[name], directory / name

        def experiment(
            config: Annotated[ExperimentConfig, tyro.conf.arg(name="")] = default,
            out: Path = directory,
            overwrite: bool = False,
        ) -> None:
            """The experiment's own flags.

            Args:
              config: Every choice of the run.
              out: Directory for all that the run writes; the same one resumes it.
              overwrite: Delete the run that is there and start anew.
            """
            run(config, out, overwrite)

        _parse(tyro.cli, _deferred(experiment), args=arguments, description=help_text)()

    _guarded(parse_and_run)


def _take_preset(
    arguments: list[str], presets: dict[str, ExperimentConfig]
) -> tuple[str, list[str]]:
    """The value of `--preset` (the first preset without it), and the arguments without it."""
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
    """The command with the same flags, which returns what is to be run and does not run it."""

    @functools.wraps(command)
    def parsed(*arguments: Any, **flags: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **flags)

    return parsed


def _parse(parser: Callable[..., Callable[[], None]], *arguments: Any, **options: Any):
    """What tyro makes of the flags; a mistake in them is a sentence instead of tyro's box.

    Raises:
      InputError: an unknown flag, or a value that is not accepted.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return parser(*arguments, **options)
    except SystemExit as exit:
        if not exit.code:
            raise  # --help was shown.
        error = exit.__context__
        while error is not None and not isinstance(error, InputError):
            error = error.__context__
        raise error or InputError(_sentence(box.getvalue())) from None


def _sentence(box: str) -> str:
    """The message in tyro's box; an unknown flag or command is followed by the near ones.

    The box has parts with rules between them: a title, the message, and what tyro adds to it.
    """
    colourless = re.sub(r"\x1b\[[\d;]*m", "", box)
    lines = "\n".join(line.strip(" │╭╮╰╯") for line in colourless.splitlines())
    parts = re.split(r"^(?:─ .+ )?[─-]{3,}$", lines, flags=re.MULTILINE)
    message, added = " ".join(parts[1].split()), "".join(parts[2:]).partition("For full help")[0]
    kind, _, listed = message.partition("Unrecognized options: ")
    if kind or not listed:
        return message if message.endswith(".") else f"{message}."
    words = listed.split(", ")
    flags = [word for word in words if word.startswith("--")]
    names = re.findall(r"^--[\w.-]+", added, flags=re.MULTILINE)
    if commands := re.search(r"Available subcommands: (.*)", added):
        names = commands[1].split(", ")
    hint = f"did you mean {' or '.join(names)}?" if names else "see --help."
    return f"Unknown {'flag' if flags else 'argument'} {', '.join(flags or words)}: {hint}"


def _guarded(command: Callable[[list[str]], None]) -> None:
    """Run a command; what the user can mend is a sentence, and `--debug` shows the traceback."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    from gptjax.training.loop import Diverged, Interrupted

    try:
        command(arguments)
        sys.stdout.flush()
    except InputError as error:
        _fail(str(error), 2, debug)
    except Diverged as error:
        _fail(str(error), 1, debug)
    except Interrupted as error:
        _fail(str(error), error.exit_code, debug)
    except BrokenPipeError:
        # The reader, say `head`, has seen enough; what Python flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        _fail("Stopped.", 130, debug)


def _fail(sentence: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(sentence, file=sys.stderr)
    raise SystemExit(code)
