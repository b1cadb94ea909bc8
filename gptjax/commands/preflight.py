"""The `preflight` command: compile a step for absent accelerators."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from gptjax.config import ExperimentConfig, InputError
from gptjax.models.presets import PRESETS, preset
from gptjax.preflight.settings import default_config, with_sizes


def preflight_for(arguments: Sequence[str]) -> Callable[..., None]:
    """Returns the command, with the defaults of the preset in `arguments`."""
    named = next((word for word in arguments if word in PRESETS), "gpt2")
    defaults = default_config(named)

    def preflight(
        name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")],
        /,
        topology: Annotated[str, tyro.conf.arg(metavar="TOPOLOGY")],
        mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=SIZE,...")] = "",
        slices: int = 1,
        batch_per_device: float = 8,
        seq: int = 0,
        decode: bool = False,
        search: bool = False,
        tries: int = 12,
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
        config: Annotated[ExperimentConfig, tyro.conf.arg(name="")] = defaults,
    ) -> None:
        """Compile a step for absent accelerators: does it fit, and how long does it take?

        Exit code 1 if it does not fit. By default: bfloat16, scanned layers, full remat
        and the loss in chunks of 1,024 tokens (--model.dtype, --model.scan-layers, --model.remat,
        --train.loss-chunk); all else as in the preset, dropout too, which rules out a TPU's
        attention kernel: --model.dropout 0 allows it. Needs the extra `preflight`.

        Args:
          name: A preset's name.
          topology: v5e:4x4, v5p:8x8x8, tpu7x:4x4x4, h100:8, b200:64 ...
          mesh: Devices along each axis, as data=1,fsdp=16; other axes are as in --mesh.*.
          slices: TPU slices of that topology.
          batch_per_device: Sequences per device; sets --train.batch-size.
          seq: Tokens per sequence; sets --model.context-length, 0 leaves it.
          decode: Compile a decoding step with a full cache instead of a training step.
          search: Try meshes, remat policies and batches, and rank those that fit.
          tries: With --search, the most programs to compile.
          as_json: Print JSON for machines.
          config: Every choice of the run, as in experiments.
        """
        preset(name)
        if tries < 1:
            raise InputError(f"--tries is {tries}: it must be at least 1.")
        _run(
            name,
            topology,
            config,
            sizes={
                "mesh": mesh,
                "slices": slices,
                "batch_per_device": batch_per_device,
                "sequence": seq,
            },
            decode=decode,
            tries=tries if search else 0,
            as_json=as_json,
        )

    return preflight


def _run(
    name: str,
    topology: str,
    config: ExperimentConfig,
    *,
    sizes: dict,
    decode: bool,
    tries: int,
    as_json: bool,
) -> None:
    from gptjax.preflight.topology import open_topology, prepare_environment

    prepare_environment()
    opened = open_topology(topology, sizes["slices"])
    config = with_sizes(config, len(opened.devices), **sizes)

    from gptjax.preflight.report import as_json as plain
    from gptjax.preflight.report import preflight, table
    from gptjax.preflight.search import nearest_changes, ranking, search

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if tries:
        found = search(name, config, opened, decode=decode, tries=tries, say=say)
        listed = [{"flags": what, **plain(report)} for what, report in found]
        print(json.dumps(listed, indent=2) if as_json else ranking(found))
        if not found:
            raise InputError(f"None of the {tries} programs tried fits on {topology}.")
        return
    report = preflight(name, config, opened, decode=decode)
    if not as_json:
        print(table(report), flush=True)
    changes = [] if report.fits else nearest_changes(report, say)
    if as_json:
        fitting = [{"flags": what, **plain(changed)} for what, changed in changes]
        print(json.dumps({**plain(report), "changes_that_fit": fitting}, indent=2))
    elif not report.fits:
        print(f"what would fit\n{ranking(changes)}" if changes else "none of the changes fits")
    if not report.fits:
        raise SystemExit(1)
