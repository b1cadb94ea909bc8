"""Search meshes, remat policies and batches that fit, by compiling them one after another."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gptjax.config import ExperimentConfig, InputError
from gptjax.costs.model import model_cost
from gptjax.preflight.report import GIB, Report, milliseconds, preflight
from gptjax.preflight.topology import Topology

REMATS = ("none", "dots", "names", "full", "offload")
"""Roughly from the most memory to the least."""
MOST_TENSOR = 16
"""Sizes of the tensor axis; its traffic grows with each device."""
TRIES_A_KIND = 3
"""Changes tried per kind."""


class Change(NamedTuple):
    """A config that was tried, and its report."""

    what: str
    report: Report


def nearest_changes(
    report: Report, say: Callable[[str], None], tries: int = TRIES_A_KIND
) -> list[Change]:
    """Returns the smallest change of each kind (remat, accumulation, batch, mesh) that fits.

    Args:
      report: of a program that does not fit.
      say: prints progress.
      tries: changes of each kind at most.
    """
    fitting = []
    for changes in (_remats, _accumulations, _batches, _axes):
        for what, config in itertools.islice(changes(report), tries):
            say(f"trying {what}")
            try:
                tried = preflight(report.name, config, report.topology, decode=report.decode)
            except InputError as error:
                say(f"  {error}")
                continue
            say(f"  {tried.memory.peak / GIB:.2f} GiB{'' if tried.fits else ', does not fit'}")
            if tried.fits:
                fitting.append(Change(what, tried))
                break
    return fitting


Changes = Iterator[tuple[str, ExperimentConfig]]


def _remats(report: Report) -> Changes:
    """Yields every remat policy that saves less."""
    if report.decode:
        return
    config = report.config
    for remat in REMATS[REMATS.index(config.model.remat) + 1 :]:
        model = dataclasses.replace(config.model, remat=remat)
        yield f"--model.remat {remat}", dataclasses.replace(config, model=model)


def _accumulations(report: Report) -> Changes:
    """Yields more accumulation steps, while each device has a sequence of every step."""
    if report.decode:
        return
    config = report.config
    shares = report.mesh["data"] * report.mesh["fsdp"] * report.mesh["expert"]
    parts = config.train.grad_accumulation * 2
    while config.train.batch_size % (parts * shares) == 0:
        train = dataclasses.replace(config.train, grad_accumulation=parts)
        yield f"--train.grad-accumulation {parts}", dataclasses.replace(config, train=train)
        parts *= 2


def _batches(report: Report) -> Changes:
    """Yields half the batch, and half of that."""
    config, batch = report.config, report.config.train.batch_size
    while batch % 2 == 0:
        batch //= 2
        train = dataclasses.replace(config.train, batch_size=batch, grad_accumulation=1)
        what = f"--batch-per-device {batch / report.devices:g}"
        yield what, dataclasses.replace(config, train=train)


def _axes(report: Report) -> Changes:
    """Yields larger fsdp, then tensor axes, with as many sequences per device."""
    now = (report.mesh["data"], report.mesh["fsdp"], report.mesh["tensor"])
    held = now[1] * now[2]
    for data, fsdp, tensor in sorted(
        meshes(report.config, _free(report.mesh)), key=lambda axes: (axes[2], axes[0])
    ):
        if (data, fsdp, tensor) != now and (fsdp * tensor > held or tensor > now[2]):
            yield _mesh_flag(data, fsdp, tensor), _with_mesh(report.config, data, fsdp, tensor)


def _free(mesh: dict[str, int]) -> int:
    """Returns the devices along the searched axes."""
    return mesh["data"] * mesh["fsdp"] * mesh["tensor"]


def meshes(config: ExperimentConfig, devices: int) -> list[tuple[int, int, int]]:
    """Returns all (data, fsdp, tensor) of product `devices` that divide heads and width."""
    model, slices = config.model, config.mesh.slices
    found = []
    for tensor in range(1, min(devices, MOST_TENSOR) + 1):
        heads = model.heads % tensor == 0 and model.actual_kv_heads % tensor == 0
        if devices % tensor or not heads or model.vocab_size % tensor:
            continue
        rest = devices // tensor
        for data in range(1, rest + 1):
            fsdp = rest // data
            if rest % data == 0 and data % slices == 0 and model.width % fsdp == 0:
                found.append((data, fsdp, tensor))
    return found


def _mesh_flag(data: int, fsdp: int, tensor: int) -> str:
    return f"--mesh data={data},fsdp={fsdp},tensor={tensor}"


def _with_mesh(config: ExperimentConfig, data: int, fsdp: int, tensor: int) -> ExperimentConfig:
    mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)
    return dataclasses.replace(config, mesh=mesh)


def search(
    name: str,
    config: ExperimentConfig,
    topology: Topology,
    *,
    decode: bool,
    tries: int,
    say: Callable[[str], None],
) -> list[Change]:
    """Returns programs that fit, by decreasing tokens per second in the longest step.

    Searched are meshes of data, fsdp and tensor, remat policies, and half, the same and double the
    batch. Configs whose state alone does not fit are not compiled; of the rest at most `tries`,
    first those that send least, and remat policies none and full before dots.
    """
    fitting = []
    candidates = sorted(_candidates(config, topology, decode), key=lambda found: found[0])
    say(f"{len(candidates)} candidates, of which {min(tries, len(candidates))} are compiled")
    for number, (_, what, candidate) in enumerate(candidates[:tries], 1):
        try:
            report = preflight(name, candidate, topology, decode=decode)
        except InputError as error:
            say(f"{number}: {what}: {error}")
            continue
        fits = "fits" if report.fits else "does not fit"
        say(f"{number}: {what}: {report.memory.peak / GIB:.2f} GiB, {fits}")
        if report.fits:
            fitting.append(Change(what, report))
    return sorted(
        fitting, key=lambda found: -found.report.tokens / found.report.roofline.seconds[1]
    )


def _candidates(
    config: ExperimentConfig, topology: Topology, decode: bool
) -> Iterator[tuple[tuple[float, ...], str, ExperimentConfig]]:
    """Yields configs with a sort key: the order in which they are tried."""
    devices = len(topology.devices)
    others = config.mesh.sequence * config.mesh.expert * config.mesh.pipeline
    held = sum(model_cost(config.model).state_bytes.values()) if not decode else 0
    remats = (config.model.remat,) if decode else ("none", "dots", "full")
    batch = config.train.batch_size
    for data, fsdp, tensor in meshes(config, devices // others):
        if held / (fsdp * tensor) > topology.available:
            continue
        for remat, size in itertools.product(remats, (batch // 2, batch, 2 * batch)):
            if size % (data * fsdp * config.mesh.expert) or not size:
                continue
            model = dataclasses.replace(config.model, remat=remat)
            train = dataclasses.replace(config.train, batch_size=size)
            changed = dataclasses.replace(
                _with_mesh(config, data, fsdp, tensor), model=model, train=train
            )
            what = (
                f"{_mesh_flag(data, fsdp, tensor)} --model.remat {remat} "
                f"--batch-per-device {size / devices:g}"
            )
            order = (tensor > 1, tensor, abs(size - batch), remat == "dots", data != 1)
            yield order, what, changed


def ranking(found: list[Change]) -> str:
    """Returns the programs that fit, as a table."""
    lines = [f"{'GiB':>8}{'spare':>8}{'ms per step':>20}{'tokens per second':>26}  flags"]
    for what, report in found:
        shortest, longest = report.roofline.seconds
        times = f"{milliseconds(shortest)} to {milliseconds(longest)}"
        rates = f"{report.tokens / longest:,.0f} to {report.tokens / shortest:,.0f}"
        memory = f"{report.memory.peak / GIB:>8.2f}{report.spare / GIB:>8.2f}"
        lines.append(f"{memory}{times:>20}{rates:>26}  {what}")
    return "\n".join(lines)
