"""What a person sees of a run that goes on."""

from gptjax.training.console import ConsoleTracker, ProgressLine


def lines(printed: str) -> list[str]:
    """What stood in the line one after another."""
    return [line.rstrip() for line in printed.split("\r")[1:]]


def test_a_notebook_has_one_line_that_is_written_over(capsys):
    line = ProgressLine(20, every=0)
    assert capsys.readouterr().out == "step 0 of 20  compiling"
    line.write(10, {"loss": 2.5, "validation_loss": 3.25, "grad_norm": 1.0})
    line.write(20, {"loss": 1.5})
    printed = capsys.readouterr().out
    assert printed.endswith("\n")
    assert printed.count("\n") == 1
    first, last = lines(printed)
    assert first == "step 10 of 20  loss 2.500  validation 3.250  0 s"
    assert last == "step 20 of 20  loss 1.500  validation 3.250  0 s"


def test_several_trainings_share_one_line(capsys):
    line = ProgressLine(6, every=0)
    for _ in range(3):
        line(2)
    assert lines(capsys.readouterr().out) == [f"step {done} of 6  0 s" for done in (2, 4, 6)]


def test_what_was_longer_is_wiped_out(capsys):
    line = ProgressLine(2, every=0)
    line.write(1, {"loss": 1000.0})
    line.write(2, {"loss": 1.0})
    first, last = capsys.readouterr().out.split("\r")[1:]
    assert len(first) == len(last.rstrip("\n"))


def test_a_line_is_not_written_for_every_step(capsys):
    line = ProgressLine(1000, every=60)
    for step in range(1, 1001):
        line.write(step, {"loss": 1.0})
    assert lines(capsys.readouterr().out) == [
        "step 1 of 1,000  loss 1.000  0 s",
        "step 1,000 of 1,000  loss 1.000  0 s",
    ]


def test_the_log_says_a_validation_loss_at_its_step_alone(capsys):
    tracker = ConsoleTracker(steps=3)
    for step, validation in ((1, {}), (2, {"validation_loss": 2.5}), (3, {})):
        tracker.write(step, {"loss": 3.0, "tokens_per_second": 10.0, "mfu": 0.5, **validation})
    tracker.close()
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "step 1/3  loss 3.0000  10 tokens/s  MFU 50.0%"
    assert second.startswith(
        "step 2/3  loss 3.0000  validation 2.5000  10 tokens/s  MFU 50.0%  0:0"
    )
    assert third.startswith("step 3/3  loss 3.0000  10 tokens/s  MFU 50.0%  0:00 left")
