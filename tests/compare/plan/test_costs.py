import dataclasses
import importlib.util
import inspect
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tyro

from gptjax import ExperimentConfig, TrainConfig, TransformerConfig, model_cost
from gptjax.commands.preflight import preflight_for
from gptjax.compare.plan import costs
from gptjax.data.batch import Batch

MODEL = TransformerConfig(vocab_size=11, context_length=8, depth=1, width=16, heads=2)
BATCH = Batch.causal(np.zeros((4, 9), int))


def config(**fields) -> ExperimentConfig:
    return ExperimentConfig(
        model=dataclasses.replace(MODEL, **fields), train=TrainConfig(steps=200, batch_size=4)
    )


@pytest.mark.slow
def test_every_variant_has_its_costs():
    lstm = {"family": "recurrent", "position_embedding": "none"}
    taken = costs.measure({"small": config(), "lstm": config(**lstm)}, BATCH)
    assert list(taken) == ["small", "lstm"]
    for each in taken.values():
        assert each.tokens_per_second > 0
        assert each.compile_seconds > 0
        assert each.decode_tokens_per_second is not None
        assert each.decode_tokens_per_second > 0
    # Parameters, two moments, gradients, and the logits of the share of a batch, at the least.
    many = config(vocab_size=4096)
    step, parameters = costs.compiled_step(many, BATCH), model_cost(many.model).parameters
    logits = 4 * BATCH.tokens.size * 4096 // jax.device_count()
    assert 16 * parameters + logits < step.peak_bytes < 20 * parameters + 8 * logits


def test_an_encoder_does_not_decode():
    encoder = TransformerConfig(
        family="encoder", vocab_size=11, context_length=8, depth=1, width=16
    )
    assert costs._decoding(encoder) is None


def test_variants_are_timed_in_turn(monkeypatch):
    called, now = [], 0.0

    def slow() -> None:
        nonlocal now
        called.append("slow")
        now += 0.2

    def quick() -> None:
        nonlocal now
        called.append("quick")
        now += 0.1

    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: now))
    seconds = costs.seconds_in_turn([slow, quick], rounds=3)
    assert seconds == pytest.approx([0.2, 0.1])
    assert called == ["slow"] * 2 + ["quick"] * 2 + ["slow", "quick", "quick"] * 3


def test_without_libtpu_there_is_no_tpu_peak(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert costs.tpu_peak(config()) is None


def test_a_tpu_compilation_that_takes_too_long_is_given_up(monkeypatch):
    def late(words, timeout, **options):
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", late)
    assert costs.tpu_peak(config()) is None


@pytest.mark.parametrize(("code", "expected"), [(0, 123), (1, 123), (2, None)])
def test_the_tpu_peak_is_preflights(monkeypatch, code, expected):
    asked = []

    def run(words, **options):
        asked.extend(words)
        return subprocess.CompletedProcess(words, code, stdout='{"peak_bytes": 123}')

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", run)
    model = {
        "attention": "local,full",
        "window": 3,
        "depth": 2,
        "tie_embeddings": False,
        "query_bias": False,
    }
    assert costs.tpu_peak(config(**model)) == expected
    flags = asked[asked.index("preflight") + 1 :]
    # Those of the command, and they give the very model.
    assert {"topology", "batch_per_device"} <= inspect.signature(
        preflight_for([])
    ).parameters.keys()
    of_config = [flag for flag in flags if flag.startswith(("--model.", "--train."))]
    assert tyro.cli(ExperimentConfig, args=of_config).model == config(**model).model
