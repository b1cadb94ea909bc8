from pathlib import Path

import pytest

from gptjax.costs.hlo import Array, arrays, read_program

LOOPS = Path(__file__).with_name("loops.hlo").read_text()


@pytest.fixture(scope="module")
def program():
    return read_program(LOOPS)


def test_loops_multiply_what_is_in_them(program):
    assert program.entry == "main"
    assert program.counts["body"] == 3
    # 3 times 5 in the nested loop, whose limit is in a fusion, and 7 that XLA says itself.
    assert program.counts["inner_body"] == 3 * 5 + 7
    # From 0 by 2 to below 3.
    assert program.counts["body_by_two"] == 2
    assert program.counts["taken"] == program.counts["left"] == 1


def test_a_computation_ends_at_a_bare_brace_alone(program):
    kernel = program.instructions["kernel"]
    assert kernel.opcode == "custom-call"
    assert list(program.computations["inner_body"]) == ["carried.2", "kernel", "next.2"]


def test_instructions_say_what_they_give_and_where_they_are_from(program):
    x = program.instructions["x"]
    assert x.arrays == [Array("f32", (8,), 1)]
    assert x.op_name == "state.params[\\'table\\']"
    outer = program.instructions["outer"]
    assert (outer.bytes, outer.operands) == (4 + 32, ("start",))
    assert program.instructions["picked"].called == ["taken", "left"]
    assert program.instructions["c"].root


def test_a_stack_frame_is_read_from_the_inside_out():
    plain = "compare(%index, %three), direction=LT"
    text = LOOPS.replace(plain, f"{plain}, metadata={{stack_frame_id=2}}")
    read = read_program(text)
    assert read.source(read.instructions["smaller"]) == [
        ("/home/me/gptjax/layers/block.py", "Block.__call__", 20),
        ("/home/me/gptjax/training/step.py", "train_step", 80),
    ]
    assert read.source(read.instructions["index"]) == []


def test_bytes_of_arrays():
    shape = "(bf16[2,3]{1,0:T(8,128)(2,1)S(5)}, /*index=1*/pred[4], s4[6], f8e4m3fn[10], token[])"
    found = arrays(shape)
    assert [array.bytes for array in found] == [12, 4, 3, 10, 0]
    assert found[0].space == 5
