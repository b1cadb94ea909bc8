"""Batches on their devices, ahead of the step, and a place that is the next one's."""

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import OptimizerConfig, TrainConfig, TransformerConfig, build, split
from gptjax.config import DataConfig, InputError, MeshConfig
from gptjax.data.batch import Batch
from gptjax.data.corpus import open_corpus, open_sources
from gptjax.data.pipeline import EvaluationBatches, training_batches
from gptjax.data.streaming import streamed_batches
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.parallel.sharding import build_mesh
from gptjax.system.exits import Interrupted
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.loop import Fit, fit
from gptjax.training.losses import token_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.prefetch import AHEAD, DevicePrefetch, own_rows, share_of

CONTEXT, BATCH_SIZE, RUN_BATCH, STEPS = 16, 8, 1, 7
MIXED = {"packing": "first_fit", "weights": (1.0, 2.0)}
PAIRS = {"objective": "sequence_to_sequence", "buckets": 2}


class Counting(grain.DatasetIterator):
    """Batches of their own number, which count how many were made."""

    def __init__(self, made: int = 0):
        super().__init__()
        self.made = made

    def __next__(self) -> Batch:
        self.made += 1
        time.sleep(0.01)
        full = np.full((BATCH_SIZE, 4), self.made)
        rows = full + 100 * np.arange(BATCH_SIZE)[:, None]
        return Batch(rows, rows, np.ones((BATCH_SIZE, 4), np.float32))

    def get_state(self) -> dict[str, int]:
        return {"made": self.made}

    def set_state(self, state: dict[str, int]) -> None:
        self.made = state["made"]


def number(batch: Batch) -> int:
    return int(np.asarray(batch.tokens)[0, 0])


def test_the_place_is_that_of_the_next_batch_whatever_lies_ahead():
    batches = Counting()
    feed = DevicePrefetch(batches, build_mesh(MeshConfig(), BATCH_SIZE))
    assert feed.get_state() == {"made": 0}
    for step in range(1, 5):
        if step == 1:
            assert feed.tokens() == BATCH_SIZE * 4
            shapes = feed.shapes().tokens
            assert shapes.shape == (BATCH_SIZE, 4)
        assert feed.get_state() == {"made": step - 1}
        assert number(feed.take(1).batches) == step
        assert batches.made == step + AHEAD
        assert feed.get_state() == {"made": step}
    feed.set_state({"made": 1})
    assert number(feed.take(1).batches) == 2


def test_a_stack_is_taken_in_parts_and_resumed_at_each_of_them():
    """In stacks of 4 that end at steps 4, 8, 12, from step 2: batches 3 and 4, 5 … 8."""
    mesh = build_mesh(MeshConfig(), 2)
    feed = DevicePrefetch(Counting(made=2), mesh)
    feed.stack(4, step=2)
    group = None
    parts = [(3, 0, 2, 4), (5, 0, 3, 7), (8, 3, 1, 8), (9, 0, 3, 11)]
    for first, index, count, state in parts:
        group = feed.take(3)
        assert [value.tolist() for value in group.part] == [[index, count]]
        assert group.tokens == count * BATCH_SIZE * 4
        numbers = np.asarray(group.batches.tokens)[index : index + count, 0, 0]
        assert numbers.tolist() == list(range(first, first + count))
        assert feed.get_state() == {"made": state}
    assert group is not None
    assert isinstance(group.batches.tokens, jax.Array)
    assert group.batches.tokens.shape == (4, BATCH_SIZE, 4)
    expected = NamedSharding(mesh, P(None, "data"))
    assert group.batches.tokens.sharding.is_equivalent_to(expected, 3)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_each_device_has_its_rows_and_nothing_else(devices):
    mesh = build_mesh(MeshConfig(), devices)
    batch = DevicePrefetch(Counting(), mesh).take(1).batches
    assert mesh.size == devices
    for array in (batch.tokens, batch.loss_weights):
        assert isinstance(array, jax.Array)
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), array.ndim)
        assert array.committed
    assert batch.padding_mask is None
    share = BATCH_SIZE // devices
    assert isinstance(batch.tokens, jax.Array)
    for place, shard in enumerate(batch.tokens.addressable_shards):
        firsts = [1 + 100 * row for row in range(place * share, (place + 1) * share)]
        assert np.asarray(shard.data)[:, 0].tolist() == firsts


def test_the_time_spent_in_waiting_is_counted():
    feed = DevicePrefetch(Counting(), build_mesh(MeshConfig(), BATCH_SIZE))
    assert feed.waited == 0
    feed.take(1)
    first = feed.waited
    assert first >= 0.01 * (1 + AHEAD)
    feed.take(1)
    assert feed.waited >= first + 0.01


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(1)
    for name in "ab":
        sizes = rng.integers(0, 7, 80) + 8 * (np.arange(80) % 3 == 0)
        lines = ["x y x y x y x y"[:size] for size in sizes.tolist()]
        (directory / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return [f"{directory}/{name}.txt#documents=line" for name in "ab"]


def opened(texts: list[str], kind: dict, *, streaming: bool = False):
    """The model's config, the corpus, and what makes its batches anew."""
    if kind is PAIRS:
        parts = {"source": tuple(texts[:1]), "target": tuple(texts[1:])}
    else:
        parts = {"source": tuple(texts)}
    data = DataConfig(**parts, **kind, streaming=streaming)
    family = "encoder_decoder" if kind is PAIRS else "decoder"
    model = TransformerConfig(
        family=family,
        vocab_size=258,
        context_length=CONTEXT,
        depth=1,
        width=8,
        heads=1,
        dropout=0.1,
    )
    sources, tokenizer = open_sources(data), ByteTokenizer()
    corpus = open_corpus(sources, tokenizer, data, model)
    order: dict[str, Any] = {"batch_size": RUN_BATCH, "seed": 3}

    def batches() -> grain.DatasetIterator:
        if not streaming:
            return training_batches(corpus.train, data.weights, **order)
        return streamed_batches(sources, tokenizer, corpus.vocabulary, data, CONTEXT, **order)

    return model, corpus, batches


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [MIXED, PAIRS], ids=["mixed", "pairs"])
def test_a_place_that_was_kept_while_others_were_made_is_still_that_place(texts, kind, streaming):
    _, _, batches = opened(texts, kind, streaming=streaming)
    feed = DevicePrefetch(batches(), build_mesh(MeshConfig(), RUN_BATCH))
    feed.stack(3, step=0)  # Cut where the next pair has another length.
    places, expected = [], []
    for _ in range(12):
        places.append(feed.get_state())
        group = feed.take(1)
        index = np.concatenate(group.part)[0]
        expected.append(group.batches.apply(lambda stack, index=index: stack[index]))
    for step in (0, 1, 5, 11):
        resumed = DevicePrefetch(batches(), build_mesh(MeshConfig(), RUN_BATCH))
        resumed.set_state(json.loads(json.dumps(places[step])))
        for one, other in zip(resumed.take(1).batches, expected[step], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other)


class Recorder:
    """A tracker that keeps what it is given, and stops the run at a step."""

    def __init__(self, stop: int = 0):
        self.lines: dict[int, dict[str, float]] = {}
        self._stop = stop

    def write(self, step, scalars):
        self.lines[step] = scalars
        if step == self._stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self):
        pass


def run(directory: Path, made, tracker: Recorder) -> Fit:
    model, corpus, batches = made
    graphdef, params = split(build(model, rngs=nnx.Rngs(0)))
    with Checkpoints(directory) as checkpoints:
        return fit(
            TrainConfig(steps=STEPS, batch_size=RUN_BATCH, log_every=1, eval_every=STEPS, seed=3),
            lambda: params,
            mesh=build_mesh(MeshConfig(), RUN_BATCH),
            loss=token_loss(graphdef),
            optimizer=build_optimizer(OptimizerConfig(warmup_steps=1), steps=STEPS),
            batches=batches(),
            validation=EvaluationBatches(corpus.validation[:1], RUN_BATCH),
            checkpoints=checkpoints,
            trackers=[tracker],
            describe=lambda step, tokens_per_second: {},
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [pytest.param(MIXED, id="mixed"), pytest.param(PAIRS, id="pairs", marks=pytest.mark.large)],
)
def test_a_run_on_such_batches_goes_on_bit_for_bit(texts, tmp_path, kind):
    made = opened(texts, kind, streaming=kind is MIXED)
    if kind is PAIRS:  # Both shapes are met before and after the stop.
        shapes = [batch.tokens.shape[1] for batch in itertools.islice(made[2](), STEPS)]
        assert set(shapes[:4]) == set(shapes[4:]) == {8, 16}
    whole, before, after = Recorder(), Recorder(stop=3), Recorder()
    expected = run(tmp_path / "whole", made, whole)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", made, before)
    resumed = run(tmp_path / "parts", made, after)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, expected.params)
    assert resumed.progress.data == expected.progress.data
    assert resumed.progress.tokens == expected.progress.tokens
    losses = {step: line["loss"] for step, line in whole.lines.items()}
    parts = {step: line["loss"] for step, line in {**before.lines, **after.lines}.items()}
    assert parts == losses
    assert list(losses) == list(range(1, STEPS + 1))
    assert all(0 <= line["data_wait"] <= 1 for line in whole.lines.values())


@pytest.mark.parametrize(
    ("held", "shares"),
    [
        ([{0, 1}, {2, 3}], [(0, 2), (1, 2)]),
        ([{0}, {0}, {1}, {1}], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # Two share heads.
        ([{0, 1}, {0, 1}], [(0, 1), (0, 1)]),
        ([{1, 3}, {0, 2}], [(1, 2), (0, 2)]),
    ],
)
def test_processes_read_the_rows_that_their_devices_hold(held, shares):
    for process, (host, hosts) in enumerate(shares):
        assert share_of(held, process) == {"host": host, "hosts": hosts}


def test_processes_without_rows_or_with_some_in_common_are_refused():
    with pytest.raises(InputError, match="no device of process 1: all need one"):
        share_of([{0}, set()], 0)
    with pytest.raises(InputError, match="some rows in common and others not"):
        share_of([{0, 1}, {1, 2}], 0)


def test_one_process_reads_all_rows():
    for config in (MeshConfig(), MeshConfig(tensor=2), MeshConfig(fsdp=2, sequence=2)):
        mesh = build_mesh(config, BATCH_SIZE)
        assert own_rows(mesh) == {"host": 0, "hosts": 1}
