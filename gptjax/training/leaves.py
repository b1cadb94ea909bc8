"""A tree of arrays by the names of its leaves, and whether a saved tree fits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gptjax.config import InputError


def leaf_names(tree: Any) -> list[str]:
    """The path of every leaf in order, such as `blocks.attention.query.kernel`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def by_name(tree: Any) -> dict[str, jax.Array]:
    """A flat dict of a tree of any node types, so that Orbax need not rebuild Optax's tuples."""
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def described(tree: Any) -> dict[str, str]:
    """The dtype and shape of every leaf, such as `float32[16, 4]`, by name."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in by_name(tree).items()}


def shapes_of(tree: Any) -> Any:
    """The tree with the shape, dtype and sharding of every leaf in place of the array."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def check_leaves(
    checkpoint: Path, saved: Mapping[str, dict[str, str]], wanted: Mapping[str, Any]
) -> None:
    """Check the saved leaves of each item against the tree wanted of it.

    Args:
      checkpoint: named in the error.
      saved: `described` of each item.
      wanted: a tree for each item.

    Raises:
      InputError: every leaf that is missing, unexpected, or of another shape or dtype, at once.
    """
    problems = []
    for item, tree in wanted.items():
        found, expected = saved[item], described(tree)
        problems += [f"{item}.{name} is missing" for name in expected if name not in found]
        problems += [f"{item}.{name} is unexpected" for name in found if name not in expected]
        problems += [
            f"{item}.{name} is {found[name]}, not {expected[name]}"
            for name in expected.keys() & found.keys()
            if found[name] != expected[name]
        ]
    if problems:
        raise InputError(
            f"The checkpoint {checkpoint} does not fit the model: {'; '.join(sorted(problems))}."
        )
