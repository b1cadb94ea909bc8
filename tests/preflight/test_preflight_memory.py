from pathlib import Path

from gptjax.costs.hlo import read_program
from gptjax.preflight.memory import Model, memory_at_peak, parameter_shapes, read_plan

MIB = 2**20
MODEL = Model(
    vocabulary=frozenset({50257}),
    width=frozenset({256}),
    layers=frozenset({4}),
    gradients=parameter_shapes([(4, 256, 1024)]),
)
HERE = Path(__file__).parent


def plan_of(tmp_path: Path, text: str):
    (tmp_path / "module.after_optimizations-buffer-assignment.txt").write_text(text)
    return read_plan(tmp_path)


def test_the_peak_is_split_into_what_is_alive_together(tmp_path):
    program = read_program((HERE / "step.hlo").read_text())
    plan = plan_of(tmp_path, (HERE / "step-buffer-assignment.txt").read_text())
    assert plan.arguments == {0: 5 * MIB, 1: 9 * MIB}
    held = {"parameters": 4 * MIB, "optimizer": 8 * MIB}
    memory = memory_at_peak(program, plan, 100 * MIB, held, MODEL)
    kinds = {kind: size / MIB for kind, size in memory.kinds.items()}
    assert kinds == {
        "parameters": 4,
        "optimizer": 8,
        "cache": 0,
        "gradients": 4,
        "saved activations": 8,
        "logits": 0,  # They are gone when the backward pass is at its largest.
        "temporaries": 76,
    }
    assert sum(memory.kinds.values()) == memory.peak
    assert memory.padding == 2 * MIB
    names = [(buffer.bytes // MIB, buffer.kind, buffer.source) for buffer in memory.largest]
    assert names == [
        (32, "temporaries", "Attention.__call__ (layers/attention.py:20), dot_general, backward"),
        (8, "saved activations", "while"),
        (4, "gradients", "carried by a loop"),
    ]


def test_a_value_that_a_later_instruction_reads_lives_until_then(tmp_path):
    text = (HERE / "step.hlo").read_text()
    # The logits are read after the backward pass, as a scheduler may have it.
    late = text.replace("add(%mean, %mean)", "add(%mean, %logits)")
    assert late != text
    plan = plan_of(tmp_path, (HERE / "step-buffer-assignment.txt").read_text())
    memory = memory_at_peak(read_program(late), plan, 100 * MIB, {}, MODEL)
    assert memory.kinds["logits"] == 16 * MIB


def test_without_a_plan_all_but_the_state_is_temporary(tmp_path):
    program = read_program((HERE / "step.hlo").read_text())
    memory = memory_at_peak(program, read_plan(tmp_path), 100, {"parameters": 40}, MODEL)
    assert (memory.kinds["parameters"], memory.kinds["temporaries"]) == (40, 60)
    assert memory.largest == ()


def test_a_sequence_as_long_as_the_vocabulary_makes_no_logits(tmp_path):
    program = read_program((HERE / "step.hlo").read_text())
    plan = plan_of(tmp_path, (HERE / "step-buffer-assignment.txt").read_text())
    bytewise = MODEL._replace(vocabulary=frozenset({128}), width=frozenset({64}))
    memory = memory_at_peak(program, plan, 100 * MIB, {}, bytewise)
    assert memory.kinds["logits"] == 0
    assert memory.kinds["saved activations"] == 8 * MIB
