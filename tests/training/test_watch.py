"""What `--train.watch` measures, against the same computed one by one."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import probe
from gptjax.certify.cases import Case
from gptjax.certify.grid import axis_values
from gptjax.config import ExperimentConfig, InputError, MeshConfig, TrainConfig, TransformerConfig
from gptjax.data.batch import Batch
from gptjax.layers.stack import unstacked
from gptjax.models.build import abstract, build, split
from gptjax.parallel.sharding import build_mesh
from gptjax.plots import watched
from gptjax.runs.activations import DEAD, activations
from gptjax.runs.assembly import assemble
from gptjax.training.dispatch import Pace
from gptjax.training.leaves import by_name
from gptjax.training.step import compile_train_step, init_state
from gptjax.training.watch import lower_watch_step, norms_by_layer, scalars_of

TINY = TransformerConfig(
    vocab_size=8, depth=2, width=8, heads=2, context_length=6, mlp_dim=16, activation="relu"
)
ROWS = 8


def _batch() -> Batch:
    draw = np.random.default_rng(0)
    tokens = draw.integers(8, size=(ROWS, 7), dtype=np.int32)
    weights = draw.uniform(size=(ROWS, 6)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


@functools.cache
def _watched(devices: int = 1, fsdp: int = 1, tensor: int = 1):
    """The scalars, the state before the step, the state after it and the step's metrics."""
    config = ExperimentConfig(model=TINY, train=TrainConfig(steps=9, batch_size=ROWS))
    own = build_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), ROWS, tuple(jax.devices()[:devices]))
    assembly = assemble(config, own)
    optimizer = assembly.optimizer(1e-2)
    state = init_state(assembly.init, optimizer, own, assembly.axes)
    # Larger, so that scores and activations differ; one unit of the first layer is dead.
    params = jax.tree.map(lambda leaf: 5 * leaf, state.params)
    up = params["decoder"]["blocks"]["mlp"]["up"]
    up["bias"] = up["bias"].at[0, 3].set(-1e6)
    state = state._replace(params=params)
    how = {"loss": assembly.loss, "optimizer": optimizer, "activations": assembly.activations}
    watch = lower_watch_step(state, _batch(), mesh=own, stacked=False, **how).compile()
    measured = watch(state, _batch())
    # A process of several can fetch it.
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(measured))
    scalars = scalars_of(measured)
    before = jax.device_get(state)
    step = compile_train_step(assembly.loss, optimizer, state, _batch(), own)
    after, metrics = jax.device_get(step(state, _batch()))
    return scalars, before, after, metrics


def _squares(scalars: dict[str, float], kind: str) -> float:
    return sum(value**2 for name, value in scalars.items() if name.startswith(f"{kind}/"))


def _sum_of_squares(tree: object) -> float:
    return sum(float(np.square(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(tree))


def test_norms_are_those_of_the_step():
    scalars, before, after, metrics = _watched()
    assert _squares(scalars, "gradients") == pytest.approx(float(metrics.grad_norm) ** 2, rel=1e-5)
    moved = jax.tree.map(np.subtract, after.params, before.params)
    for kind, tree in (("updates", moved), ("parameters", before.params)):
        layers = unstacked([tree["decoder"]["blocks"]], 2)
        for layer, of in enumerate(layers):
            total = _sum_of_squares(of)
            assert scalars[f"{kind}/decoder.{layer}"] ** 2 == pytest.approx(total, rel=1e-3)
        for name in ("embedding", "positions", "decoder.norm"):
            own = [leaf for path, leaf in by_name(tree).items() if path.startswith(f"{name}.")]
            total = _sum_of_squares(own)
            assert scalars[f"{kind}/{name}"] ** 2 == pytest.approx(total, rel=1e-3)


def test_activations_are_those_of_the_probe():
    scalars, before, *_ = _watched()
    model = nnx.merge(abstract(TINY)[0], jax.tree.map(jnp.asarray, before.params))
    points = ("residual", "attention_output", "mlp_output", "scores", "attention", "activation")
    seen = probe.observe(model, _batch().tokens, capture=points)
    masked = []
    for layer in range(2):
        arrays = {name: np.asarray(seen.captured[name][layer], np.float64) for name in points}
        for name in points[:3]:
            rms = np.sqrt(np.square(arrays[name]).mean())
            assert scalars[f"{name}/decoder.{layer}"] == pytest.approx(rms, rel=1e-4)
        seen_keys = np.tri(6, dtype=bool)
        largest = arrays["scores"][:, :, seen_keys].max()
        assert scalars[f"largest_score/decoder.{layer}"] == pytest.approx(largest, rel=1e-4)
        masked.append(largest < arrays["scores"].max())
        weights = arrays["attention"]
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1).mean()
        assert scalars[f"attention_entropy/decoder.{layer}"] == pytest.approx(entropy, rel=1e-4)
        peaks = np.abs(arrays["activation"]).max((0, 1))
        dead = (peaks <= DEAD * peaks.max()).mean()
        assert scalars[f"dead_units/decoder.{layer}"] == pytest.approx(dead)
    assert any(masked)  # So the mask matters.
    assert scalars["dead_units/decoder.0"] > 0
    chances = np.asarray(jax.nn.softmax(model(_batch().tokens)), np.float64)
    entropy = -(chances * np.log(chances)).sum(-1).mean()
    assert scalars["token_entropy/model"] == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("shards", [(1, 1), (2, 2)], ids=["data", "others"])
def test_devices_measure_what_one_does(shards):
    scalars, alone = _watched(4, *shards)[0], _watched()[0]
    assert scalars.keys() == alone.keys()
    assert scalars == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_in_a_pipeline_norms_alone_are_measured():
    config = ExperimentConfig(model=TINY, train=TrainConfig(steps=9, batch_size=ROWS, watch=True))
    staged = build_mesh(MeshConfig(pipeline=2), ROWS, tuple(jax.devices()[:2]))
    assembly = assemble(config, staged)
    assert assembly.activations is None
    assert "the stages of a pipeline capture no activations" in "".join(assembly.lines)
    optimizer = assembly.optimizer(1e-2)
    state = init_state(assembly.init, optimizer, staged, assembly.axes)
    how = {"loss": assembly.loss, "optimizer": optimizer, "activations": None}
    watch = lower_watch_step(state, _batch(), mesh=staged, stacked=False, **how).compile()
    measured = watch(state, _batch())
    assert measured.keys() == {"parameters", "gradients", "updates"}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(measured))


@pytest.mark.parametrize(
    ("name", "owners"),
    {
        "attention=local,full": {"decoder": 4},
        "family=encoder": {"encoder": 2},
        "family=encoder_decoder": {"encoder": 2, "decoder": 2},
        "family=recurrent": {"layers": 2},
    }.items(),
)
def test_layers_of_every_family_are_told_apart(name, owners):
    config = dataclasses.replace(axis_values()[name], vocab_size=7)
    _, params = split(build(config, rngs=nnx.Rngs(1)))
    # Of layer i, every value is i + 1: with kinds that take turns, i is 2 · index + kind.
    kinds = len(config.attention_pattern)

    def numbered(path: str, leaf: jax.Array) -> jax.Array:
        parts = path.split(".")
        if not {"blocks", "layers"} & set(parts):
            return 100 * jnp.ones_like(leaf)
        kind = next((int(part) for part in parts if part.isdecimal()), 0)
        layers = 1 + kinds * jnp.arange(len(leaf)) + kind
        return layers.reshape(-1, *[1] * (leaf.ndim - 1)) * jnp.ones_like(leaf)

    leaves, structure = jax.tree.flatten(params)
    names = by_name(params)
    tree = structure.unflatten([numbered(*each) for each in zip(names, leaves, strict=True)])
    norms = norms_by_layer(tree)
    for owner, depth in owners.items():
        assert norms[owner].shape == (depth,)
        ratio = norms[owner] / jnp.arange(1, depth + 1)
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert all(value.ndim == 0 for owner, value in norms.items() if owner not in owners)
    squares = [_sum_of_squares(norms), _sum_of_squares(tree)]
    assert squares[0] == pytest.approx(squares[1])


@pytest.mark.parametrize(
    ("name", "kinds"),
    {
        "family=encoder": {"largest_score", "dead_units"},
        "family=encoder_decoder": {"largest_score", "cross_largest_score", "dead_units"},
        "family=recurrent": {"residual"},
        "num_experts=4": {"largest_score", "mlp_output"},
        "attention=compressed": {"largest_score", "attention_entropy"},
    }.items(),
)
def test_every_family_is_measured(name, kinds):
    config = dataclasses.replace(axis_values()[name], vocab_size=8)
    case = Case(config, config)
    inside = activations(abstract(config)[0], config)
    measured = jax.jit(lambda params: inside(params, case.batch, None))(case.params)
    assert measured.keys() >= kinds | {"residual", "token_entropy"}
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(measured))
    depths = {"decoder": config.depth, "encoder": config.encoder_depth or config.depth}
    for kind in kinds:
        for stack, value in measured[kind].items():
            assert value.shape == (depths.get(stack, config.depth),)


def test_a_group_of_steps_begins_with_what_is_watched():
    config = TrainConfig(steps=300, steps_per_dispatch=50, watch=True, watch_every=30)
    pace, done, begins = Pace(config, 50), 0, []
    while done < 100:
        begins.append(done)
        done += pace.steps(done)
    assert begins == [0, 29, 59, 89]


def test_what_is_watched_is_logged():
    with pytest.raises(
        InputError, match="watch_every is 25: it must be a multiple of log_every 10"
    ):
        TrainConfig(watch=True, watch_every=25)
    assert TrainConfig(log_every=7).watch_every == 250


def test_a_watched_run_is_the_run(tmp_path, tiny_run, command):
    lines = {}
    for name, words in {
        "alone": (),
        # A group's lines are written while the next group is measured.
        "watched": ("--train.watch", "--train.watch-every", 2, "--train.steps-per-dispatch", 3),
    }.items():
        out = tmp_path / name
        code, printed, err = command(
            *("train", "--out", out, "--data.source", tiny_run.parent / "text.txt"),
            *("--data.tokenizer", "characters", "--model.depth", 2, "--model.width", 16),
            *("--model.heads", 2, "--model.context-length", 32, "--train.batch-size", 8),
            *("--train.steps", 6, "--train.log-every", 1, "--train.eval-every", 6, *words),
        )
        assert code == 0, err
        assert ("watch.png" in printed) is (out / "watch.png").exists() is (name != "alone")
        lines[name] = [
            json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
    for line, alone in zip(lines["watched"], lines["alone"], strict=True):
        assert (line["loss"], line["grad_norm"]) == (alone["loss"], alone["grad_norm"])
        inside = {key for key in line if "/" in key}
        assert bool(inside) is (line["step"] % 2 == 0)
        if inside:
            squares = _squares(line, "gradients")
            assert line["grad_norm"] ** 2 == pytest.approx(squares, rel=1e-4)


def test_the_figure_has_a_panel_for_each_measurement():
    assert watched([{"step": 1, "loss": 2.0}]) is None
    lines = [{"step": step, **_watched()[0]} for step in (1, 2)]
    figure = watched(lines)
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[:3] == ["norm of parameters", "norm of gradients", "norm of updates"]
    # None of what is measured is left out.
    assert len(titles) == len({name.partition("/")[0] for name in _watched()[0]})
