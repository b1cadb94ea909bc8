"""One call from a text to a trained model, and one to its attention."""

import dataclasses
import signal
from typing import Any

import numpy as np
import pytest

from gptjax.config import ExperimentConfig, InputError
from gptjax.notebook import training
from gptjax.notebook.attention import attention_view
from gptjax.notebook.training import train
from gptjax.runs.defaults import defaults, with_fields
from gptjax.system.exits import Interrupted

TINY: dict[str, Any] = {
    "steps": 3,
    "batch_size": 2,
    "depth": 1,
    "width": 16,
    "heads": 2,
    "context_length": 16,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a cat and a dog and another cat\n" * 20)
    return path


@pytest.mark.slow
def test_a_text_becomes_a_trained_model_and_its_attention(text, tmp_path, capsys):
    trained = train(text, tokenizer="characters", learning_rate=1e-2, out=tmp_path / "run", **TINY)
    assert trained.config.model.width == 16
    assert trained.config.optimizer.learning_rate == 1e-2
    assert [line["step"] for line in trained.metrics] == [3]
    assert trained.tokenizer.decode(trained.tokenizer.encode("a cat")) == "a cat"
    assert "Best validation loss" in capsys.readouterr().out

    again = train(text, tokenizer="characters", learning_rate=1e-2, out=tmp_path / "run", **TINY)
    assert "holds a finished run" in capsys.readouterr().out
    assert again.metrics == trained.metrics

    view, page = attention_view(trained, "a cat"), attention_view(tmp_path / "run", "a cat")
    (part,), (of_page,) = view.parts, page.parts
    assert part.rows == ["a", "·", "c", "a", "t"]
    assert part.weights.shape == (1, 2, 5, 5)
    np.testing.assert_array_equal(part.weights, of_page.weights)
    np.testing.assert_allclose(part.weights.sum(axis=-1), 1, rtol=1e-5)
    assert view.title == "a cat"
    assert attention_view(trained, "a cat", heads=[1]).parts[0].weights.shape == (1, 1, 5, 5)


def test_an_interrupted_run_says_whether_it_can_be_resumed(text, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise Interrupted(3, signal.SIGINT)

    monkeypatch.setattr(training, "run", interrupted)
    with pytest.raises(Interrupted, match="step 3 is saved, the same command resumes"):
        train(text, out=tmp_path / "run", **TINY)
    with pytest.raises(Interrupted) as stopped:
        train(text, **TINY)
    lost = "Stopped by SIGINT at step 3; without a directory nothing of the run is kept."
    assert str(stopped.value) == lost
    assert stopped.value.exit_code == 130


def test_a_field_is_of_one_section_and_a_wrong_one_is_refused():
    config = ExperimentConfig()
    sections = [getattr(config, field.name) for field in dataclasses.fields(config)]
    names = [field.name for section in sections for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))
    changed = with_fields(defaults("quickstart"), depth=1, steps=5, source=("a.txt",), seed=2)
    assert (changed.model.depth, changed.train.steps, changed.train.seed) == (1, 5, 2)
    assert changed.data.source == ("a.txt",)
    with pytest.raises(InputError, match=r"stepz is no field .* did you mean steps\?"):
        with_fields(config, stepz=5)
    with pytest.raises(InputError, match="depth is 0"):
        with_fields(config, depth=0)


@pytest.mark.slow
def test_what_cannot_be_trained_or_shown_is_refused(text, tmp_path):
    with pytest.raises(InputError, match="did you mean quickstart"):
        train(text, "quickstrat")
    with pytest.raises(InputError, match=r"absent\.txt"):
        train(tmp_path / "absent.txt", **TINY)
    with pytest.raises(InputError, match="text is empty"):
        attention_view(train([text], **TINY), "")
