"""The report of a preflight, as JSON and as a table."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax

from gptjax.config import ExperimentConfig, TransformerConfig
from gptjax.costs.model import model_cost
from gptjax.costs.traffic import memory_traffic
from gptjax.preflight.collectives import Collective, Expected, Shapes, Weight, expected
from gptjax.preflight.compilation import Compilation, compile_step
from gptjax.preflight.memory import Memory
from gptjax.preflight.program import Lowered
from gptjax.preflight.roofline import SHARES, Roofline, roofline
from gptjax.preflight.topology import MEMORY_FRACTION, Topology

GIB = 2**30
SMALL = 0.001
"""The share of sent bytes below which a kind of traffic is not listed by itself."""


@dataclass(frozen=True)
class Report:
    """One program on one topology."""

    name: str
    config: ExperimentConfig
    topology: Topology
    decode: bool
    mesh: dict[str, int]
    memory: Memory
    exhausted: bool
    kernel: str
    """The attention implementation, and why."""
    collectives: list[Collective]
    expected: list[Expected]
    model_flops: float
    """Model FLOPs per step over all devices, counted exactly."""
    roofline: Roofline
    compile_seconds: float
    compile_cpu_seconds: float

    @property
    def spare(self) -> int:
        """Free bytes per device; below 0 the program does not fit."""
        return self.topology.available - self.memory.peak

    @property
    def fits(self) -> bool:
        """Whether the program fits."""
        return not self.exhausted and self.spare >= 0

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def tokens(self) -> int:
        """Tokens per step over all devices."""
        rows = self.config.train.batch_size
        return rows if self.decode else rows * self.config.model.context_length

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilisation of the longest and of the shortest step."""
        chip = self.topology.chip
        least = self.model_flops / (self.devices * chip.flops / chip.devices)
        shortest, longest = self.roofline.seconds
        return least / longest, least / shortest


def preflight(
    name: str, config: ExperimentConfig, topology: Topology, *, decode: bool = False
) -> Report:
    """Compile one step and report its memory, communication and time.

    Raises:
      InputError: a mesh that does not match, a family that does not decode, or what XLA refuses.
    """
    compiled = compile_step(config, topology, decode=decode)
    mesh = dict(compiled.lowered.mesh.shape)
    cost = model_cost(config.model)
    rows = config.train.batch_size
    if decode:
        useful = repeated = rows * cost.forward_flops
    else:
        tokens = rows * config.model.context_length
        useful = tokens * cost.training_flops
        repeated = useful + tokens * _recomputed(config.model)
    return Report(
        name=name,
        config=config,
        topology=topology,
        decode=decode,
        mesh=mesh,
        memory=compiled.memory,
        exhausted=compiled.exhausted,
        kernel=compiled.lowered.kernel,
        collectives=compiled.collectives,
        expected=expected(_shapes(config, compiled.lowered, decode), mesh, compiled.collectives),
        model_flops=useful,
        roofline=roofline(
            repeated / compiled.lowered.mesh.size,
            sum(memory_traffic(compiled.program).values()),
            compiled.collectives,
            topology.chip,
            _crosses(compiled),
        ),
        compile_seconds=compiled.seconds,
        compile_cpu_seconds=compiled.cpu_seconds,
    )


def _recomputed(model: TransformerConfig) -> int:
    """Returns FLOPs per token that remat recomputes in the backward pass, an upper bound."""
    cost = model_cost(model)
    everything = cost.forward_flops - cost.unembedding_flops
    return {"none": 0, "dots": cost.attention_flops}.get(model.remat, everything)


def _shapes(config: ExperimentConfig, lowered: Lowered, decode: bool) -> Shapes:
    """Returns the sizes from which traffic is predicted."""
    model, mesh = config.model, lowered.mesh.shape

    def weight(path: Any, leaf: Any) -> Weight:
        named = [axis for axis in leaf.sharding.spec if axis is not None]
        axes = [name for axis in named for name in (axis if isinstance(axis, tuple) else (axis,))]
        axes = tuple(name for name in axes if mesh[name] > 1)
        where = jax.tree_util.keystr(path)
        # Layers are gathered again in the backward pass; each use of the table has a gradient.
        reads = 1 + model.tie_embeddings + (model.family == "encoder_decoder")
        return Weight(
            leaf.size,
            axes,
            gathers=2 if "['blocks']" in where else 1,
            sums=reads if where == "['embedding']['table']" else 1,
        )

    parts = mesh["data"] * mesh["fsdp"] * mesh["expert"] * mesh["sequence"]
    tokens = config.train.batch_size * (1 if decode else model.context_length)
    return Shapes(
        weights=[weight(*leaf) for leaf in jax.tree.leaves_with_path(lowered.params)],
        element=4 if model.dtype == "float32" else 2,
        layers=(model.depth + (model.encoder_depth or model.depth))
        if model.family == "encoder_decoder"
        else model.depth,
        tokens=tokens // parts,
        width=model.width,
        parts=1 if decode else config.train.grad_accumulation,
        remat=model.remat != "none" and not decode,
        training=not decode,
    )


def _crosses(compiled: Compilation) -> Any:
    """Returns whether a collective leaves a TPU's slice or a GPU's host."""
    devices = list(compiled.lowered.mesh.devices.flat)

    def slice_and_host(device: Any) -> tuple[Any, Any]:
        host = device.process_index if device.platform in ("cuda", "gpu") else 0
        return getattr(device, "slice_index", 0), host

    return lambda one: len({slice_and_host(devices[number]) for number in one.group}) > 1


def as_json(report: Report) -> dict[str, Any]:
    """Returns the whole report as plain values: bytes, seconds, counts."""
    config, line = report.config, report.roofline
    shortest, longest = line.seconds
    return {
        "model": report.name,
        "topology": report.topology.name,
        "slices": report.topology.slices,
        "devices": report.devices,
        "mesh": report.mesh,
        "step": "decoding" if report.decode else "training",
        "batch": config.train.batch_size,
        "batch_per_device": config.train.batch_size / report.devices,
        "grad_accumulation": config.train.grad_accumulation,
        "sequence": config.model.context_length,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "remat_layers": config.model.remat_layers,
        "loss_chunk": config.train.loss_chunk,
        "dropout": config.model.dropout,
        "scan_layers": config.model.scan_layers,
        "attention": report.kernel,
        "fits": report.fits,
        "refused_by_the_compiler": report.exhausted,
        "available_bytes": report.topology.available,
        "peak_bytes": report.memory.peak,
        "spare_bytes": report.spare,
        "memory": {**report.memory.kinds, "padding of arguments": report.memory.padding},
        "largest": [buffer._asdict() for buffer in report.memory.largest],
        "collectives": [
            {key: value for key, value in asdict(one).items() if key != "group"}
            | {"devices": len(one.group), "sent": one.sent}
            for one in report.collectives
        ],
        "expected": [row._asdict() for row in report.expected],
        "model_flops": report.model_flops,
        "device_flops": line.flops,
        "memory_traffic_bytes": line.memory_bytes,
        "interconnect_bytes": line.sent_bytes,
        "network_bytes": line.network_bytes,
        "flops_per_byte": line.intensity,
        "bound": line.bound,
        "step_seconds": [shortest, longest],
        "tokens_per_second": [report.tokens / longest, report.tokens / shortest],
        "mfu": list(report.mfu),
        "assumptions": assumptions(report),
        "compile_seconds": report.compile_seconds,
        "compile_cpu_seconds": report.compile_cpu_seconds,
    }


def assumptions(report: Report) -> list[str]:
    """Returns the assumptions behind the figures, besides the compiled program."""
    chip = report.topology.chip
    shares = ", ".join(f"{name} {share:.0%}" for name, share in SHARES.items())
    peaks = (
        f"{chip.flops / 1e12:g} TFLOP/s, {chip.bandwidth / 1e9:g} GB/s of HBM, "
        f"{chip.interconnect / 1e9:g} GB/s of interconnect, {chip.network / 1e9:g} GB/s of network"
    )
    counted = f", which are {chip.devices} devices each" if chip.devices > 1 else ""
    lines = [
        f"peaks of {chip.name} chips{counted}: {peaks} ({chip.source})",
        "shortest step: these peaks, fully overlapped, every link in use",
        f"longest: no overlap, at {shares} of the peaks, on the links of one axis of {chip.axes}",
        "memory traffic by rule: every instruction reads its inputs and writes its outputs once",
        "parameters, optimizer, cache: exact; gradients, saved activations, logits: classified by "
        "rule; temporaries: the rest of the peak",
    ]
    if not chip.available:
        share = report.topology.available / chip.memory
        lines.append(f"a program may take {share:.0%} of the memory ({MEMORY_FRACTION})")
    return lines


def table(report: Report) -> str:
    """Returns the report as a table."""
    config, memory = report.config, report.memory
    model = config.model
    sizes = " x ".join(f"{name} {size}" for name, size in report.mesh.items() if size > 1)
    step = "a decoding step" if report.decode else "a training step"
    slices = f", {report.topology.slices} slices" if report.topology.slices > 1 else ""
    parts = (
        f", {config.train.grad_accumulation} accumulation steps"
        if config.train.grad_accumulation > 1
        else ""
    )
    lines = [
        f"{report.name}: {step} on {report.topology.name}{slices}, "
        + (f"{report.devices} devices ({sizes})" if sizes else "one device"),
        f"  {config.train.batch_size:,} sequences of {model.context_length:,}, "
        f"{config.train.batch_size / report.devices:,g} per device{parts}",
        f"  {_choices(report)}",
        *([f"  {report.kernel}"] if report.kernel else []),
        _verdict(report),
        "memory per device at the peak, GiB",
    ]
    lines += [
        f"  {kind:<28}{size / GIB:>12.3f}{size / max(memory.peak, 1):>8.1%}"
        for kind, size in memory.kinds.items()
        if size
    ]
    lines.append(f"  {'peak':<28}{memory.peak / GIB:>12.3f}")
    if memory.padding:
        lines.append(f"  of the temporaries, {memory.padding / GIB:.3f} pad the arguments' tiles")
    if memory.largest:
        lines.append("largest buffers, GiB")
        lines += [
            f"  {buffer.bytes / GIB:>8.3f}  {buffer.shape:<26} {buffer.kind:<19} {buffer.source}"
            for buffer in memory.largest
        ]
    return "\n".join([*lines, *_traffic(report), *_times(report)])


def _choices(report: Report) -> str:
    """Returns the settings that decide most of the memory."""
    config, model = report.config, report.config.model
    said = [model.dtype, f"layers {'scanned' if model.scan_layers else 'unrolled'}"]
    if not report.decode:
        together = f" of {model.remat_layers} layers together" if model.remat_layers > 1 else ""
        chunk = config.train.loss_chunk
        loss = f"in chunks of {chunk:,} tokens" if chunk else "of all tokens at once"
        said += [f"remat {model.remat}{together}", f"loss {loss}", f"dropout {model.dropout:g}"]
    return ", ".join(said)


def _verdict(report: Report) -> str:
    available = f"{report.topology.available / GIB:.2f} GiB"
    peak = f"{report.memory.peak / GIB:.2f}"
    if report.fits:
        return f"  fits: {peak} of {available} per device, {report.spare / GIB:.2f} to spare"
    over = max(0, -report.spare) / GIB
    return f"  DOES NOT FIT: {peak} of {available} per device, {over:.2f} too much"


def _traffic(report: Report) -> list[str]:
    """Returns lines of collectives by kind and axes, and of the predicted traffic."""
    if not report.collectives:
        return []
    by_kind: dict[tuple[str, str], list[Collective]] = {}
    for one in report.collectives:
        by_kind.setdefault((one.kind, " x ".join(one.axes)), []).append(one)
    header = f"{'times':>10}{'GB':>12}{'GB sent':>12}"
    lines = [f"  {'collectives per step':<40}{header}"]
    total = sum(one.sent for one in report.collectives)
    for (kind, axes), ones in sorted(by_kind.items()):
        sent = sum(one.sent for one in ones)
        if sent < SMALL * total:
            continue
        size = sum(one.count * one.bytes for one in ones)
        lines.append(
            f"  {f'{kind} along {axes}':<40}{sum(one.count for one in ones):>10,}"
            f"{size / 1e9:>12.3f}{sent / 1e9:>12.3f}"
        )
    if report.expected:
        lines.append(f"  {'theory':<56}{'GB':>12}{'found':>12}")
    for row in report.expected:
        ratio = f"{row.found / row.bytes:.0%}" if row.bytes else "-"
        lines.append(
            f"  {f'{row.axis}: {row.what}':<56}{row.bytes / 1e9:>12.3f}{row.found / 1e9:>12.3f}"
            f"  {ratio}{f'; {row.note}' if row.note else ''}"
        )
    return lines


def milliseconds(seconds: float) -> str:
    """Returns milliseconds with three digits, or all before the point."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(report: Report) -> list[str]:
    line = report.roofline
    shortest, longest = line.seconds
    low, high = report.mfu
    rates = f"{report.tokens / longest:,.0f} to {report.tokens / shortest:,.0f}"
    parts = {
        name: f"{milliseconds(line.shortest[name])} to {milliseconds(line.longest[name])}"
        for name in line.shortest
    }
    return [
        "step time by the roofline, not measured",
        f"  {'model FLOPs, all devices':<28}{report.model_flops:>14.4g}",
        f"  {'FLOPs per device, as computed':<28}{line.flops:>14.4g}",
        f"  {'FLOPs per byte of HBM':<28}{line.intensity:>14.1f}",
        *(f"  {f'ms of {name}':<28}{value:>24}" for name, value in parts.items()),
        f"  {'ms per step':<28}{f'{milliseconds(shortest)} to {milliseconds(longest)}':>24}"
        f"  (bound by {line.bound})",
        f"  {'tokens per second':<28}{rates:>24}",
        f"  {'MFU':<28}{f'{low:.0%} to {high:.0%}':>24}",
        *(f"  - {assumption}" for assumption in assumptions(report)),
        f"compiled in {report.compile_seconds:.1f} s, {report.compile_cpu_seconds:.1f} s of CPU",
    ]
