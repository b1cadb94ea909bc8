"""The end of a run: its summary, and figures and samples that fail or are not made to their end."""

import dataclasses
import shutil

import pytest

from gptjax.runs.directory import RESULT, SHOWING, load_config
from gptjax.runs.run import run


@pytest.fixture
def directory(tiny_run, tmp_path):
    """A finished run, as a process leaves it that is killed while it makes figures."""
    copied = tmp_path / "run"
    shutil.copytree(tiny_run, copied)
    (copied / SHOWING).touch()
    return copied


def test_figures_that_were_not_made_to_their_end_are_made_by_the_next_call(directory, capsys):
    shown = []
    config, before = load_config(directory), (directory / "metrics.jsonl").read_bytes()
    assert run(config, directory, show=lambda *given: shown.append(given) or "a.png")
    assert len(shown) == 1
    assert "a.png, result.json" in capsys.readouterr().out
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert not run(config, directory, show=lambda *given: shown.append(given) or "a.png")
    assert len(shown) == 1


def test_a_figure_that_fails_is_a_warning_and_the_run_is_finished(directory, capsys):
    def fails(*given) -> str:
        assert (directory / RESULT).exists()
        raise ValueError("no font")

    config = load_config(directory)
    assert run(config, directory, show=fails)
    assert "Warning: no figures or samples were made: no font" in capsys.readouterr().err
    assert not run(config, directory, show=fails)


@pytest.mark.parametrize(("track", "named"), [(("tensorboard",), True), ((), False)])
def test_the_summary_names_what_the_run_has(directory, capsys, track, named):
    config = load_config(directory)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, track=track))
    assert run(config, directory, show=lambda *given: "a.png")
    assert ("for TensorBoard" in capsys.readouterr().out) == named
