"""Which kernel computes attention on the devices that a program is compiled for."""

import dataclasses
import importlib.util

from jax.sharding import Mesh

from gptjax.config import InputError, TransformerConfig
from gptjax.layers.attention.flash import LANES

PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "triton": "gpu"}
"""The platform of each kernel, as in `jax.Device.platform`."""
NAMES = {"splash": "the splash kernel", "cudnn": "cuDNN", "triton": "the Triton kernel"}
FASTEST = {"tpu": ("splash",), "gpu": ("cudnn", "triton")}
"""What auto takes: the first that supports the config.

On an H200 a step of GPT-2 with dropout takes 67.7 ms with the Triton kernel, where XLA's attention
took 149 (experiments/README.md); without dropout cuDNN is faster.
"""
CAPABILITY = 8.0
"""The least compute capability of NVIDIA's GPUs that have bfloat16 and take flash attention."""
HEAD_DIMS = 16, 32, 64, 128
"""Those that Triton multiplies, up to what fits into a GPU's shared memory."""


def resolve_kernel(
    config: TransformerConfig, platform: str, capability: str = "", *, sequence: int = 1
) -> tuple[TransformerConfig, list[str]]:
    """The config with the kernel that its attention uses, and log lines that name it and say why.

    Args:
      config: its `attention_kernel` is the request; a model itself takes "auto" as "xla".
      platform: of the devices that the program is compiled for: "tpu", "gpu" or "cpu".
      capability: a GPU's, such as "9.0".
      sequence: size of the mesh axis `sequence`, over which the tokens of a row are sharded.

    Raises:
      InputError: the kernel requested by name does not run there, or does not support the config.
    """
    on_xla = dataclasses.replace(config, attention_kernel="xla")
    requested = config.attention_kernel
    known = _number(capability)
    emulated = []
    if platform == "gpu" and config.dtype == "bfloat16" and known is not None:
        said = f"bfloat16: emulated, since this GPU's compute capability is {capability}."
        emulated = [said] if known < CAPABILITY else []
    if config.family == "recurrent":
        return on_xla, ["Attention: none in an LSTM.", *emulated]
    candidates = FASTEST.get(platform, ()) if requested == "auto" else (requested,)
    if not candidates or requested == "xla":
        return on_xla, ["Attention: XLA.", *emulated]
    obstacles = {
        kernel: _why_not_there(kernel, platform, capability)
        or why_unsupported(config, kernel, sequence)
        for kernel in candidates
    }
    kernel = next((name for name, why in obstacles.items() if not why), None)
    if kernel is None:
        why = obstacles[candidates[0]]
        if requested == "auto":
            return on_xla, [f"Attention: XLA, since {why}.", *emulated]
        raise InputError(
            f"TransformerConfig.attention_kernel is {requested!r}: it must be auto or xla here, "
            f"since {why}."
        )
    lines = [f"Attention: {NAMES[kernel]} on {platform.upper()}."]
    if "compressed" in config.attention_pattern:
        lines.append("Compressed attention: XLA, since its keys are groups of tokens.")
    if kernel == "splash" and config.family == "encoder_decoder":
        lines.append(f"Attention in rows whose length is not a multiple of {LANES} tokens: XLA.")
    return dataclasses.replace(config, attention_kernel=kernel), lines


def target(mesh: Mesh) -> tuple[str, str]:
    """The platform and compute capability, "" but for GPUs, of the devices of a mesh."""
    device = mesh.devices.flat[0]
    # A described GPU, which is not there, may be of the platform "cuda".
    return device.platform.replace("cuda", "gpu"), getattr(device, "compute_capability", "")


def _why_not_there(kernel: str, platform: str, capability: str) -> str | None:
    """Why `kernel` does not run on such devices, as a clause; None if it does."""
    if platform != PLATFORMS[kernel]:
        return f"{NAMES[kernel]} runs on a {PLATFORMS[kernel].upper()}, not on a {platform.upper()}"
    known = _number(capability)
    if platform == "gpu" and (known is None or known < CAPABILITY):
        has = f"and this GPU's is {capability or 'not known'}"
        return f"{NAMES[kernel]} needs compute capability {CAPABILITY}, {has}"
    if kernel == "triton" and not importlib.util.find_spec("jax.experimental.pallas.triton"):
        return "this JAX has no Pallas for Triton"
    return None


def _number(capability: str) -> float | None:
    """An NVIDIA GPU's compute capability; None of another one's, such as AMD's gfx90a."""
    try:
        return float(capability)
    except ValueError:
        return None


def why_unsupported(config: TransformerConfig, kernel: str, sequence: int = 1) -> str | None:
    """Why `kernel` does not support the config, as a clause; None if it does."""
    causal_window = config.window == 0 or config.family == "decoder"
    reasons = [
        (
            config.position_embedding in ("alibi", "relative"),
            f"{config.position_embedding} positions add a bias to the scores",
        ),
        (
            config.attention_normalizer != "softmax",
            f"kernels compute a softmax, not {config.attention_normalizer}",
        ),
        (
            config.dropout > 0 and kernel != "triton",
            f"dropout {config.dropout:g} applies to attention weights, which {NAMES[kernel]} does "
            "not drop",
        ),
        (set(config.attention_pattern) == {"compressed"}, "its keys are groups of tokens"),
    ]
    if kernel == "splash":
        multiple = LANES * sequence
        aligned = config.context_length % multiple == 0
        reasons += [
            (config.dtype == "float16", "TPUs compute in bfloat16, not in float16"),
            (
                not aligned,
                f"context_length {config.context_length} is not a multiple of {multiple}",
            ),
        ]
    else:
        name, width = NAMES[kernel], config.actual_head_dim
        fits, dims = width <= 128 and width % 8 == 0, "8, 16 ... 128"
        if kernel == "triton":
            fits, dims = width in HEAD_DIMS, ", ".join(map(str, HEAD_DIMS))
        earlier = kernel == "cudnn" and not causal_window
        reasons += [
            (config.dtype != "bfloat16", f"{name} takes bfloat16, not {config.dtype}"),
            (config.attention_softcap > 0, f"{name} does not soft-cap scores"),
            (not fits, f"{name} takes head dims {dims}, not {width}"),
            (earlier, "cuDNN's windows attend to earlier keys only"),
            (sequence > 1, f"{name} does not shard a sequence over devices"),
        ]
    return next((why for holds, why in reasons if holds), None)
