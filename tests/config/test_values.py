"""Every value that can be named is implemented, and computes what no other one does."""

import ast
import dataclasses
import itertools
import typing
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from flax import nnx

from gptjax import build, split
from gptjax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig, TransformerConfig
from gptjax.config import values as module
from gptjax.config.axes import AXES, companions
from gptjax.config.values import Packing, exhaustive
from gptjax.data.corpus import open_corpus, open_sources
from gptjax.data.objectives.rows import FAMILIES, finisher, objective_vocabulary
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.layers.attention.kernels import PLATFORMS
from gptjax.models.build import abstract
from gptjax.training.optimizers import build_optimizer, learning_rate_schedule

LITERALS = {
    name: typing.get_args(value)
    for name, value in vars(module).items()
    if typing.get_origin(value) is Literal
}
TINY = TransformerConfig(vocab_size=11, context_length=8, depth=2, width=16, heads=4)
TOKENS = jnp.arange(16).reshape(2, 8) % 11


def dispatched() -> tuple[set[str], list[set[str]]]:
    """The Literals that have an exhaustive table, and the cases of each exhaustive `match`."""
    tables, matches = set(), []
    for path in sorted((ROOT / "gptjax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "exhaustive":
                tables.add(ast.unparse(node.args[0]))
            if isinstance(node, ast.Match) and "assert_never" in ast.unparse(node.cases[-1]):
                patterns = [pattern for case in node.cases for pattern in ast.walk(case.pattern)]
                values = [each.value for each in patterns if isinstance(each, ast.MatchValue)]
                matches.append({ast.literal_eval(value) for value in values})
    return tables, matches


def test_each_value_stands_in_an_exhaustive_table_or_match():
    tables, matches = dispatched()
    assert {"Activation", "Family", "Remat"} <= LITERALS.keys()
    for name, values in LITERALS.items():
        assert name in tables or set(values) in matches, name


def test_a_field_chosen_by_name_has_its_values_in_one_place():
    for section in (TransformerConfig, DataConfig, OptimizerConfig, TrainConfig, MeshConfig):
        source = Path(ROOT / section.__module__.replace(".", "/")).with_suffix(".py").read_text()
        assert "Literal[" not in source, section


def test_a_table_without_a_value_or_with_another_one_is_refused():
    assert exhaustive(Packing, {"split": 1, "first_fit": 2})["split"] == 1
    with pytest.raises(TypeError, match=r"no entry for \['first_fit'\]"):
        exhaustive(Packing, {"split": 1})
    with pytest.raises(TypeError, match=r"entries \['best_fit'\]"):
        exhaustive(Packing, {"split": 1, "first_fit": 2, "best_fit": 3})


def all_differ(results: dict[str, Any]) -> None:
    """Each result, an array or a text, differs from each other one."""
    for (first, a), (second, b) in itertools.combinations(results.items(), 2):
        same = a == b if isinstance(a, str) else a.shape == b.shape and np.allclose(a, b, atol=1e-5)
        assert not same, f"{first} and {second} are the same"


def variant(axis: str, value: str) -> TransformerConfig:
    needed = companions(axis, value, TINY)
    return dataclasses.replace(TINY, **needed, **{axis: value})


NAMED = [axis for axis, values in AXES.items() if all(isinstance(value, str) for value in values)]


@pytest.mark.slow
@pytest.mark.parametrize("axis", NAMED)
def test_no_two_values_of_a_model_compute_the_same(axis):
    """Those with the same parameters get the same numbers; others are other models."""
    assert len(AXES[axis]) > 1
    computed: dict[str, dict[str, np.ndarray]] = {}
    drawn: dict[str, Any] = {}
    for value in AXES[axis]:
        config = variant(axis, value)
        graphdef, shapes = abstract(config)
        leaves = str(jax.tree.map(lambda leaf: leaf.shape, shapes))
        if leaves not in drawn:
            params = split(build(config, rngs=nnx.Rngs(0)))[1]
            # Of the size of trained ones, which make positions and keys tell.
            drawn[leaves] = jax.tree.map(lambda leaf: 5 * leaf + 0.1, params)
        source = {"source": TOKENS[::-1]} if config.family == "encoder_decoder" else {}
        logits = nnx.merge(graphdef, drawn[leaves])(TOKENS, **source)
        computed.setdefault(leaves, {})[value] = np.asarray(logits)
    for group in computed.values():
        all_differ(group)


def test_types_of_activations_and_ways_of_remat_differ():
    _, params = abstract(TINY)

    def program(**changes: Any) -> str:
        graphdef, _ = abstract(dataclasses.replace(TINY, **changes))
        loss = jax.grad(lambda params: nnx.merge(graphdef, params)(TOKENS).sum())
        return str(jax.make_jaxpr(loss)(params))

    all_differ({value: program(dtype=value) for value in LITERALS["Dtype"]})
    all_differ({value: program(remat=value) for value in LITERALS["Remat"]})


def test_each_attention_kernel_but_the_plain_ones_has_a_platform():
    assert {"auto", "xla", *PLATFORMS} == set(LITERALS["AttentionKernel"])


def test_no_two_optimizers_or_schedules_take_the_same_steps():
    params = {"blocks": {"up": {"kernel": jnp.full((1, 3, 4), 0.5)}}}
    gradients = [
        jax.tree.map(lambda leaf, n=n: jnp.sin(jnp.arange(12.0) + n).reshape(leaf.shape), params)
        for n in range(6)
    ]

    def trained(name: Any) -> np.ndarray:
        config = OptimizerConfig(name=name, learning_rate=0.01, muon_learning_rate=0.01)
        optimizer = build_optimizer(config, 6)
        now, state = params, optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
        return np.asarray(jax.tree.leaves(now)[0])

    all_differ({name: trained(name) for name in LITERALS["OptimizerName"]})

    def rates(schedule: Any) -> np.ndarray:
        config = OptimizerConfig(schedule=schedule, learning_rate=1.0)
        return np.array(list(map(learning_rate_schedule(config, 1.0, 100), range(100))))

    all_differ({name: rates(name) for name in LITERALS["Schedule"]})


def test_no_two_objectives_make_the_same_row():
    text = np.frombuffer(b"the cat that sat on the mat", np.uint8).astype(np.int32)
    rows: dict[str, Any] = {}
    for objective in LITERALS["Objective"]:
        encoder: dict[str, Any] = {"encoder_heads": "pretraining", "token_types": 2}
        (family, *_) = FAMILIES[objective]
        model = dataclasses.replace(
            TINY, family=family, context_length=32, **encoder if family == "encoder" else {}
        )
        pairs: dict[str, Any] = {"target": ("b",)} if objective == "sequence_to_sequence" else {}
        data = DataConfig(source=("a",), objective=objective, **pairs)
        words = objective_vocabulary(data, model, ByteTokenizer(ends=True))
        read: Any = (text, text[::-1]) if objective == "sequence_to_sequence" else text
        if objective == "next_sentence":
            read = 0, Piece(text)
        row = finisher(data, 32, words)(read, np.random.default_rng(0))
        rows[objective] = str([np.asarray(array).tolist() for array in row if array is not None])
    all_differ(rows)


class Piece:
    """One document of one piece, which is followed by itself."""

    def __init__(self, tokens: np.ndarray):
        self.kept = tokens

    def tokens(self, number: int) -> np.ndarray:
        return self.kept

    def of_another_document(self, number: int, rng: np.random.Generator) -> int:
        return 0


def test_no_two_packings_make_the_same_rows(tmp_path):
    (tmp_path / "text.txt").write_text("a first line\nand\nanother\nand the last one\n" * 20)
    rows = {}
    for packing in LITERALS["Packing"]:
        data = DataConfig(source=(f"{tmp_path}/text.txt#documents=line",), packing=packing)
        corpus = open_corpus(open_sources(data), ByteTokenizer(ends=True), data, TINY)
        (bucket,) = corpus.train
        rows[packing] = str(bucket.row(0))
    all_differ(rows)
