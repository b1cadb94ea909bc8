"""Convert Hugging Face models, both ways: `config.json` and safetensors.

| family | `model_type` |
|---|---|
| GPT-1, GPT-2 | openai-gpt, gpt2 |
| GPT-Neo, GPT-J, GPT-NeoX (Pythia) | gpt_neo, gptj, gpt_neox |
| Llama, Mistral, Qwen 2 | llama, mistral, qwen2 |
| BERT | bert |
| the Transformer itself, as Marian (OPUS-MT) has it | marian |

tensors.py maps tensors to our parameters, families.py and particulars.py fields of `config.json` to
ours; each serves both directions. gguf_files.py reads Llamas in GGUF.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.config import InputError, TransformerConfig, read_json_object
from gptjax.huggingface import files
from gptjax.huggingface.configs import config_from_huggingface, config_to_huggingface
from gptjax.huggingface.gguf_files import GGUFWeights
from gptjax.huggingface.particulars import stored_bert_heads
from gptjax.huggingface.tensors import BUFFERS, TABLES, TOKEN_TYPES, Entry, Tables, entries
from gptjax.models.build import abstract, split

__all__ = [
    "config_from_huggingface",
    "config_to_huggingface",
    "from_gguf",
    "from_huggingface",
    "to_huggingface",
]

DECODED = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Token ids of generation_config.json."""
Sharding = jax.sharding.Sharding
Placement = Callable[[str, jax.ShapeDtypeStruct], Sharding]


def from_huggingface(
    source: str | Path,
    *,
    dtype: Any = jnp.float32,
    sharding: Sharding | Placement | Mapping[str, Any] | None = None,
) -> Any:
    """Loads a model from a Hugging Face directory, or from the hub.

    Args:
      source: a directory with `config.json` and safetensors, or a name such as
        openai-community/gpt2 (which needs the extra `huggingface`, and the network).
      dtype: of the parameters.
      sharding: of the parameters: one for all, a tree of them in the parameters' structure, or a
      function of a parameter's path (embedding.table) and its shape. Each parameter is placed as
      it is read. None is the default device.

    Returns:
      A model as `gptjax.build` makes it.

    Raises:
      InputError: a family or a field that gptjax does not support; tensors that are missing,
      unexpected or of another shape, listed together; damaged files, or only pickles; numbers
      that are not finite, or too large for `dtype`.
    """
    directory = files.find(source)
    given = read_json_object(directory / files.CONFIG)
    weights = files.Weights(directory)
    if given.get("model_type") == "bert":
        given |= stored_bert_heads(weights.names)
    config = config_from_huggingface(given, str(directory / files.CONFIG))
    return _load(config, TABLES[given["model_type"]], weights, dtype, sharding)


def from_gguf(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    sharding: Sharding | Placement | Mapping[str, Any] | None = None,
) -> Any:
    """Loads a model of the Llama family from a GGUF file (needs the extra `gguf`).

    Args:
      path: of the file.
      dtype: of the parameters; quantised tensors are dequantised.
      sharding: as `from_huggingface`.

    Raises:
      InputError: another architecture, and as `from_huggingface`.
    """
    weights = GGUFWeights(Path(path))
    config = config_from_huggingface(weights.config, str(path))
    return _load(config, TABLES[weights.config["model_type"]], weights, dtype, sharding)


def _load(
    config: TransformerConfig,
    tables: Tables,
    weights: files.Weights | GGUFWeights,
    dtype: Any,
    sharding: Any,
) -> Any:
    """Builds the model: each parameter is read, converted to our axes and placed, one by one."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype is {np.dtype(dtype).name}: parameters are floating-point numbers.")
    depth, held = max(config.depth, config.encoder_depth), len(weights.names)
    if depth > held:
        raise InputError(
            f"{weights.directory} does not fit its config: for {depth:,} layers it has {held:,} "
            "tensors."
        )
    graphdef, shapes = abstract(config)
    leaves = _by_path(shapes)
    plan = _plan(tables, leaves, config)
    stored = _stored_names(tables, weights.names)
    _check(plan, leaves, tables, stored, weights)

    placed = {}
    for entry in plan:
        parts = _read(entry, leaves[entry.paths[0]].shape, stored, weights, dtype)
        for path, array in zip(entry.paths, parts, strict=True):
            shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
            placed[path] = jax.device_put(array, _sharding(sharding, path, shape))
    return nnx.merge(graphdef, _as_tree(placed, shapes))


def to_huggingface(
    model: Any, directory: str | Path, *, fields: Mapping[str, Any] | None = None
) -> None:
    """Write a model as a directory that transformers can load.

    Args:
      model: as `gptjax.build` makes it.
      directory: the output; it must be empty or new.
      fields: added to `config.json`, such as `eos_token_id`, which our models do not have; those
      in `DECODED` go to generation_config.json too.

    Raises:
      InputError: a model that no family of transformers computes exactly, or a directory in use.
    """
    files.check_unused(Path(directory))
    given = config_to_huggingface(model.config)
    params = _by_path(split(model)[1])
    tensors = {}
    for entry in _plan(TABLES[given["model_type"]], params, model.config):
        leaves = [np.asarray(params[path]) for path in entry.paths]
        for index, name in enumerate(entry.names):
            layer = [leaf[index] for leaf in leaves] if entry.stacked else leaves
            tensors[name] = entry.row.tensor(layer)
    dtype = params["embedding.table"].dtype
    if model.config.family == "encoder" and not model.config.token_types:
        tensors[TOKEN_TYPES] = np.zeros((given["type_vocab_size"], model.config.width), dtype)
    fields = fields or {}
    generates = model.config.family != "encoder"
    decoded = {name: fields[name] for name in DECODED if generates and fields.get(name) is not None}
    files.write(Path(directory), {**given, "dtype": str(dtype), **fields}, tensors, decoded)


def _by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, such as `decoder.blocks.attention.query.kernel`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _as_tree(leaves: Mapping[str, Any], like: Any) -> Any:
    """Inverse of `_by_path`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in _by_path(like)])


def _plan(tables: Tables, leaves: Mapping[str, Any], config: TransformerConfig) -> list[Entry]:
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    plan = entries(tables, shapes, len(config.attention_pattern))
    uncovered = set(leaves) - {path for entry in plan for path in entry.paths}
    assert not uncovered, f"no row of the table has {sorted(uncovered)}"
    return plan


def _stored_names(tables: Tables, names: list[str]) -> dict[str, str]:
    """Maps names in the table to names in the file.

    Checkpoints of models without heads lack the prefix, and those from TensorFlow call the scale of
    a norm gamma and its bias beta. Of tied tensors, any name may have been kept.
    """
    bare = not any(name.startswith(tables.prefix) for name in names)
    stored = {}
    for name in names:
        known = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        if bare and not known.startswith(tables.heads):
            known = tables.prefix + known
        if not BUFFERS.search(known):
            stored[known] = name
    for copy, original in tables.copies.items():
        if copy in stored:
            stored.setdefault(original, stored[copy])
    return stored


def _check(
    plan: list[Entry],
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    tables: Tables,
    stored: Mapping[str, str],
    weights: files.Weights | GGUFWeights,
) -> None:
    """Refuse tensors that are missing, unexpected, or of another shape, all in one sentence."""
    expected = {}
    for entry in plan:
        shape = leaves[entry.paths[0]].shape[1 if entry.stacked else 0 :]
        expected |= dict.fromkeys(entry.names, entry.row.shape(shape))
    problems = [f"{name} is missing" for name in expected if name not in stored]
    for name, original in tables.copies.items():
        if name in stored and name not in expected and original in stored:
            first, second = (weights.read(stored[each]).ravel() for each in (name, original))
            if not np.array_equal(first, second):
                problems.append(f"{name} differs from {original}, though config.json ties the two")
    problems += [
        f"{stored[name]} is unexpected"
        for name in stored
        if name not in expected and name not in tables.copies
    ]
    for name in expected.keys() & stored.keys():
        found = weights.shape(stored[name])
        if found != expected[name]:
            problems.append(f"{stored[name]} is {list(found)}, not {list(expected[name])}")
    if problems:
        problems = files.listed(sorted(problems))
        raise InputError(f"{weights.directory} does not fit its config: {problems}.")


def _read(
    entry: Entry,
    leaf_shape: tuple[int, ...],
    stored: Mapping[str, str],
    weights: files.Weights | GGUFWeights,
    dtype: Any,
) -> list[np.ndarray]:
    """Returns the leaves of an entry, several if the tensor is fused."""
    shape = leaf_shape[1:] if entry.stacked else leaf_shape
    arrays = [np.empty(leaf_shape, dtype) for _ in entry.paths]
    for index, name in enumerate(entry.names):
        what = f"{weights.directory}: {stored[name]}"
        tensor = files.converted(weights.read(stored[name]), dtype, what)
        leaves = entry.row.leaves(tensor, shape)
        for array, leaf in zip(arrays, leaves, strict=True):
            array[index if entry.stacked else ...] = leaf
    return arrays


def _sharding(sharding: Any, path: str, shape: jax.ShapeDtypeStruct) -> Any:
    """Returns the sharding of one parameter."""
    if sharding is None or isinstance(sharding, Sharding):
        return sharding
    if callable(sharding):
        return sharding(path, shape)
    return _by_path(sharding)[path]
