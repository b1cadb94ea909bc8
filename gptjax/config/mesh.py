"""The device mesh: how many devices each kind of parallelism takes."""

from dataclasses import dataclass

from gptjax.config.checks import check, check_minimum, check_types


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices."""

    data: int = 0
    """Parts of a batch, with parameters replicated; 0 takes what the other axes leave."""
    fsdp: int = 1
    """Parts of a batch and of every parameter, gathered where it is used (FSDP)."""
    tensor: int = 1
    """Parts of heads, MLP and vocabulary (tensor parallelism)."""
    sequence: int = 1
    """Parts of a sequence, each attending to the keys and values of all (context parallelism)."""
    expert: int = 1
    """Parts of a batch and of the experts (expert parallelism)."""
    pipeline: int = 1
    """Stages of consecutive layers, fed with microbatches (model.microbatches)."""
    slices: int = 1
    """TPU slices that the axis data spans; no other axis crosses their slow network."""
    pmap: bool = False
    """Compile with jax.pmap; for data parallelism alone."""

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(self, 0, "data")
        check_minimum(self, 1, "fsdp", "tensor", "sequence", "expert", "pipeline", "slices")
        of_slices = self.data % self.slices == 0
        check(self, "data", of_slices, f"a multiple of the {self.slices} slices, or 0")
        alone = self.fsdp * self.tensor * self.sequence * self.expert * self.pipeline == 1
        check(self, "pmap", alone or not self.pmap, "False with other axes than data")
