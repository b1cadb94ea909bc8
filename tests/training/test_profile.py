"""Where the time of a step goes: from a trace to the table of `--train.profile`."""

import dataclasses
import re
from pathlib import Path

import jax
import pytest
from jax.profiler import ProfileData

from gptjax.certify.grid import axis_values
from gptjax.config import ExperimentConfig, InputError, TrainConfig, TransformerConfig
from gptjax.costs.hlo import read_program
from gptjax.costs.model import model_cost
from gptjax.models.presets import PRESETS, preset
from gptjax.training.dispatch import Pace
from gptjax.training.profile.page import page
from gptjax.training.profile.parts import (
    HOST,
    IDLE,
    OTHER,
    PARTS,
    PROGRAMS,
    Peaks,
    containers,
    forward_flops,
    part_of,
    step_times,
)
from gptjax.training.profile.steps import StepProfile
from gptjax.training.profile.table import table
from gptjax.training.profile.timeline import (
    OTHER_PROGRAMS,
    STEPS,
    WAIT,
    Timeline,
    read_timeline,
)

HLO = """\
HloModule jit_step, is_scheduled=true

%fused (p0: f32[8,8]) -> f32[8,8] {
  %p0 = f32[8,8]{1,0} parameter(0)
  ROOT %exp = f32[8,8]{1,0} exponential(%p0), metadata={op_name="jit(step)/jvp(mlp)/exp"}
}

%body (arg: f32[8,8]) -> f32[8,8] {
  %arg = f32[8,8]{1,0} parameter(0)
  ROOT %fusion.1 = f32[8,8]{1,0} fusion(%arg), kind=kLoop, calls=%fused
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %dot.1 = f32[8,8]{1,0} dot(%x, %x), metadata={op_name="jit(step)/transpose(jvp(attention))/dot"}
  %norm.1 = f32[8,8]{1,0} add(%dot.1, %x), metadata={op_name="jit(step)/attention/norm/add"}
  %call.1 = f32[8,8]{1,0} call(%norm.1), to_apply=%body
  %sum.1 = f32[8,8]{1,0} all-reduce(%call.1), metadata={op_name="jit(step)/loss/psum"}
  %add.1 = f32[8,8]{1,0} add(%sum.1, %x), metadata={op_name="jit(step)/jit(norm)/add"}
  ROOT %sub.1 = f32[8,8]{1,0} subtract(%add.1, %x), metadata={op_name="optimizer/jit(norm)/sub"}
}
"""
EACH = {
    "dot.1": "attention",
    "norm.1": "norms",
    "fusion.1": "MLP",
    "sum.1": "collectives",
    "add.1": "other",
    "sub.1": "optimizer",
}


class Plane:
    """An XPlane's text, of events (line, name, start, end in ns, stats)."""

    def __init__(self, name: str, events: list[tuple[str, str, int, int, dict[str, str]]]):
        names = list(dict.fromkeys(event[1] for event in events))
        stats = list(dict.fromkeys(key for event in events for key in event[4]))
        text = [f'name: "{name}"']
        for kind, keys in (("event", names), ("stat", stats)):
            text += [
                f'{kind}_metadata {{ key: {n} value {{ id: {n} name: "{key}" }} }}'
                for n, key in enumerate(keys, 1)
            ]
        for line in dict.fromkeys(event[0] for event in events):
            text.append(f'lines {{ name: "{line}"')
            for own, event, start, end, given in events:
                if own == line:
                    values = " ".join(
                        f'stats {{ metadata_id: {stats.index(key) + 1} str_value: "{value}" }}'
                        for key, value in given.items()
                    )
                    text.append(
                        f"events {{ metadata_id: {names.index(event) + 1} offset_ps: {1000 * start}"
                        f" duration_ps: {1000 * (end - start)} {values} }}"
                    )
            text.append("}")
        self.text = "planes {\n" + "\n".join(text) + "\n}\n"


def _op(name: str, device: int | None = None, module: str = "jit_step") -> dict[str, str]:
    stats = {"hlo_op": name, "hlo_module": module}
    return stats if device is None else {**stats, "device_ordinal": str(device)}


def _trace(directory: Path, *planes: Plane) -> Path:
    text = "".join(plane.text for plane in planes)
    (directory / "plugins").mkdir()
    serialized = ProfileData.text_proto_to_serialized_xspace(text)
    (directory / "plugins" / "host.xplane.pb").write_bytes(serialized)
    return directory


def test_time_at_which_several_run_is_shared(tmp_path):
    host = Plane(
        "/host:CPU",
        [
            ("python", STEPS, 0, 10, {}),
            ("python", WAIT, 60, 90, {}),
            ("python", "Wait for LaunchOnDevice completion", 75, 200, {}),
            ("thread 1", "dot.1", 20, 60, _op("dot.1", 0)),
            # Its work is done by another thread, until 60.
            ("thread 2", "norm.1", 40, 41, _op("norm.1", 0) | {"_p": "7"}),
            ("thread 1", "end: norm.1", 60, 60, {"_c": "7"}),
            ("thread 1", "call.1", 80, 100, _op("call.1", 0)),
            ("thread 2", "fusion.1", 85, 95, _op("fusion.1", 0)),
            ("thread 1", "evaluate", 100, 110, _op("dot.1", 0, "jit_evaluate")),
        ],
    )
    found = read_timeline(_trace(tmp_path, host), "jit_step", {"call.1"})
    # 20 to 60 dot.1, of which norm.1 shares the second half; the call itself counts for nothing.
    assert found.instructions == pytest.approx(
        {"dot.1": 30e-9, "norm.1": 10e-9, "fusion.1": 10e-9, OTHER_PROGRAMS: 10e-9}
    )
    assert (found.host, found.idle) == pytest.approx((20e-9, 30e-9))
    assert sum([*found.instructions.values(), found.host, found.idle]) == pytest.approx(110e-9)


def test_devices_are_averaged_and_a_gpus_streams_alone_are_read(tmp_path):
    host = Plane("/host:CPU", [("python", STEPS, 0, 10, {}), ("python", WAIT, 0, 400, {})])
    first = Plane(
        "/device:GPU:0",
        [
            ("Stream #13(Compute)", "kernel", 0, 100, _op("dot.1")),
            ("Stream #14(MemcpyD2H)", "MemcpyD2H", 100, 120, {}),
            ("XLA Ops", "dot.1", 0, 100, _op("dot.1")),
        ],
    )
    second = Plane("/device:GPU:1", [("Stream #13(Compute)", "kernel", 10, 50, _op("dot.1"))])
    found = read_timeline(_trace(tmp_path, host, first, second), "jit_step", ())
    assert found.instructions == pytest.approx({"dot.1": 70e-9, OTHER_PROGRAMS: 10e-9})
    assert (found.host, found.idle) == pytest.approx((0, 5e-9))


def test_a_trace_without_the_program_is_refused(tmp_path):
    with pytest.raises(InputError, match="no instruction of jit_step"):
        read_timeline(tmp_path, "jit_step", ())
    ran = [("python", STEPS, 0, 9, {}), ("t", "dot.1", 0, 9, _op("dot.1", 0, "jit_other"))]
    with pytest.raises(InputError, match="made on CPUs and GPUs"):
        read_timeline(_trace(tmp_path, Plane("/host:CPU", ran)), "jit_step", ())


def test_an_instruction_belongs_to_its_innermost_scope():
    program = read_program(HLO)
    assert {name: part_of(program, program.instructions[name]) for name in EACH} == EACH
    assert containers(program) == {"call.1"}


@pytest.mark.parametrize("name", [*PRESETS, *axis_values()])
def test_flops_of_parts_add_up_to_the_models(name):
    config = preset(name) if name in PRESETS else axis_values()[name]
    config = dataclasses.replace(config, vocab_size=config.vocab_size or 11)
    assert sum(forward_flops(config).values()) == model_cost(config).forward_flops


def test_rows_have_flops_bytes_and_the_roofline():
    program = read_program(HLO)
    seconds = dict.fromkeys(EACH, 2.0)
    timeline = Timeline(seconds, 1.0, 3.0)
    config = TransformerConfig(vocab_size=7, depth=1, width=8, heads=2, context_length=4)
    found = step_times(timeline, program, config, 10, range(5, 7), Peaks(1e3, 1e2, "here"))
    rows = {row.part: row for row in found.rows}
    assert (found.first, found.last) == (5, 6)
    assert found.seconds == pytest.approx((6 * 2 + 1 + 3) / 2)
    flops = 3 * 10 * forward_flops(config)["attention"]
    # Of dot.1: two operands read, one result written, 4 bytes each.
    assert rows["attention"][1:] == (1.0, flops, 3 * 4 * 64, max(flops / 1e3, 3 * 4 * 64 / 1e2))
    assert rows[HOST].seconds == 0.5
    assert rows[IDLE].seconds == 1.5
    text = table(found)
    assert re.search(r"^attention +1,000\.00 +12\.5%", text, re.MULTILINE)
    assert "above 100%" in text
    written = page(found)
    assert written.count('<th scope="row">') == len(found.rows)
    assert 'style="width: 100.00%"' in written


@pytest.mark.parametrize("window", ["20", "20:", ":25", "25:20", "0:5", "20:101", "2:3:4", "a:b"])
def test_a_window_that_is_none_of_the_runs_is_refused(window):
    with pytest.raises(InputError, match=rf"profile is '{window}': it must be FIRST:LAST"):
        TrainConfig(steps=100, profile=window)


def test_a_profile_starts_with_what_is_left_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    config = ExperimentConfig(train=TrainConfig(steps=300, profile="20:25"))
    profile = StepProfile(config, tmp_path)
    starts = [profile.starts(done) for done in (18, 19, 22, 24, 25)]
    assert starts == [False, True, True, True, False]
    assert not profile.ends(25)
    profile.start(19)
    assert not profile.starts(20)
    assert [profile.ends(done) for done in (20, 24, 25)] == [False, False, True]


def test_a_trace_that_is_not_ended_is_stopped(tmp_path):
    config = ExperimentConfig(train=TrainConfig(steps=300, profile="20:25"))

    def interrupted() -> None:
        with StepProfile(config, tmp_path) as profile:
            profile.start(19)
            raise KeyError

    for _ in range(2):  # The first one would refuse the second.
        with pytest.raises(KeyError):
            interrupted()


def test_a_group_of_steps_ends_where_a_profile_starts_and_ends():
    config = TrainConfig(steps=300, steps_per_dispatch=50, profile="20:25")
    pace, done, ends = Pace(config, 50), 0, []
    while done < 100:
        done += pace.steps(done)
        ends.append(done)
    assert ends == [19, 25, 75, 125]


def test_a_run_is_profiled(tmp_path, tiny_run, command):
    text = tiny_run.parent / "text.txt"
    out = tmp_path / "run"
    words = (
        *("train", "--out", out, "--data.source", text, "--data.tokenizer", "characters"),
        *("--model.depth", 2, "--model.width", 16, "--model.heads", 2),
        *("--model.context-length", 32, "--train.batch-size", 8, "--train.steps", 6),
        *("--train.profile", "3:5", "--train.eval-every", 4),
    )
    code, printed, err = command(*words)
    assert code == 0, err
    assert "Steps 3 to 5: " in printed
    lines = [re.split(r" {2,}", line) for line in printed.splitlines()]
    shares = {line[0]: float(line[2][:-1]) for line in lines if line[0] in (*PARTS, HOST, IDLE)}
    assert sum(shares.values()) == pytest.approx(100, abs=0.1 * len(shares))
    assert shares.keys() >= {"embedding", "attention", "MLP", "norms", "head and loss", "optimizer"}
    assert min(shares["attention"], shares["MLP"], shares["optimizer"]) > 0
    assert shares[OTHER] < 20
    assert shares[PROGRAMS] > 0  # The evaluation after step 4.
    assert list((out / "profile").rglob("*.xplane.pb"))
    assert "Time of steps 3 to 5" in (out / "profile.html").read_text()
    # What a profile costs is no time of steps.
    assert "profile" in (out / "sessions.jsonl").read_text()
