"""What is too large for the machine is refused before it is made."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from gptjax.config import ExperimentConfig, InputError, TrainConfig, TransformerConfig
from gptjax.system import memory
from gptjax.system.memory import (
    check_fits,
    check_training_fits,
    devices_bytes,
    machine_bytes,
    ran_out,
)

GIB = 2**30
CONFIG = ExperimentConfig(
    model=TransformerConfig(width=1024, heads=1, context_length=1024),
    train=TrainConfig(batch_size=64, grad_accumulation=4),
)


def device(process: int = 0, limit: int = 0) -> SimpleNamespace:
    return SimpleNamespace(process_index=process, memory_stats=lambda: {"bytes_limit": limit})


def test_all_that_there_is_fits_and_a_byte_more_does_not():
    check_fits("It", machine_bytes())
    check_fits("It", 5, 5)
    with pytest.raises(InputError, match=r"^It takes at least .+ GiB: there are .+\.$"):
        check_fits("It", machine_bytes() + 1)
    sentence = r"^Width takes at least 9.31e\+20 GiB: there are 1.5\.$"
    with pytest.raises(InputError, match=sentence):
        check_fits("Width", 10**30, 3 * GIB // 2)


def test_devices_have_their_own_memory_or_share_their_machines():
    assert devices_bytes(jax.devices()) == machine_bytes()
    assert devices_bytes([device(0), device(0), device(1)]) == 2 * machine_bytes()
    assert devices_bytes([device(0, GIB), device(0, GIB), device(1, GIB)]) == 3 * GIB


@pytest.mark.parametrize(
    ("state", "changes", "sentence"),
    [
        (4 * GIB + 1, {}, r"The training state takes at least 4 GiB: there are 4\."),
        (
            GIB,
            {"context_length": 2**23},
            r"A batch of 64 rows of 8388608 tokens takes at least 6 GiB",
        ),
        (GIB, {"width": 2**17}, r"The input of a layer, 16384 tokens, takes at least 8 GiB"),
    ],
)
def test_a_run_that_cannot_fit_is_refused(state, changes, sentence, monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 4 * GIB)
    check_training_fits(CONFIG, 4 * GIB, [device()])
    model = dataclasses.replace(CONFIG.model, **changes)
    with pytest.raises(InputError, match=sentence):
        check_training_fits(dataclasses.replace(CONFIG, model=model), state, [device()])


def test_errors_of_memory_are_known_by_what_they_say():
    jax_error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    assert ran_out(jax_error)
    assert ran_out(MemoryError())
    assert not ran_out(ValueError("memory"))
