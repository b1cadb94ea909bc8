"""Print who holds what of every preset, where each axis of the mesh has two devices.

    python tests/golden/make_layouts.py > tests/golden/layouts.txt

A line is a parameter: preset, name, its axes' letters, its shape, and over which mesh axis each is
parted; where the mesh cannot part it, the sentence that refuses it. tests/parallel/test_sharding.py
compares it, so that a change of layout is seen in review.
"""

from collections.abc import Iterator

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from gptjax.config import InputError
from gptjax.models.build import build, parameter_axes, split
from gptjax.models.presets import PRESETS
from gptjax.parallel.sharding import AXES, mesh_axes, parameter_sharding

MESH = AbstractMesh((2,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def layouts() -> Iterator[str]:
    """The lines."""
    for preset, config in PRESETS.items():
        _, params = split(nnx.eval_shape(lambda config=config: build(config, rngs=nnx.Rngs(0))))
        parameters = jax.tree_util.tree_leaves_with_path(parameter_axes(config))
        for (path, letters), leaf in zip(parameters, jax.tree.leaves(params), strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            try:
                spec = parameter_sharding(name, letters, leaf.shape, MESH).spec
                parts = " ".join("+".join(mesh_axes(P(part))) or "-" for part in spec)
            except InputError as error:
                parts = str(error)
            yield f"{preset} {name} {letters} {'x'.join(map(str, leaf.shape))} {parts}"


if __name__ == "__main__":
    print("\n".join(layouts()))
