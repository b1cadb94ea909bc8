"""Memory and time of computing one head's attention in a long text.

    python experiments/benchmarks/long_attention.py --block 256

GPT-2 small with random weights and a context of 4,096 tokens; the 16 keys with the largest weights
per query. Peak memory is that of the whole process, so each setting needs its own.
"""

import dataclasses
import resource
import time

import jax
import numpy as np
import tyro
from flax import nnx

from gptjax import build, preset, probe

GIB = 1 << 30


def long_attention(
    tokens: int = 4096, block: int = 0, layer: int = 5, head: int = 1, model: str = "gpt2"
) -> None:
    """Compute one head's attention, and print time and peak memory.

    Args:
      tokens: Length of the text.
      block: Queries at a time; 0 takes all at once.
      layer: Its number, from 0.
      head: Its number, from 0.
      model: A preset.
    """
    config = dataclasses.replace(preset(model), context_length=tokens, vocab_size=1000)
    looker = build(config, rngs=nnx.Rngs(0))
    text = np.random.default_rng(0).integers(config.vocab_size, size=(1, tokens))
    before, start = _peak(), time.perf_counter()
    top = probe.attention(looker, text, layers=[layer], heads=[head], top=16, block=block)
    jax.block_until_ready(top)
    seconds = time.perf_counter() - start
    all_weights = 4 * config.depth * config.heads * tokens**2
    print(
        f"{tokens} tokens, block {block}: {seconds:.1f} s with compilation, peak {_peak():.2f} GiB "
        f"({before:.2f} before); all weights would be {all_weights / GIB:.2f} GiB."
    )


def _peak() -> float:
    """Returns the peak memory of this process, GiB; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


if __name__ == "__main__":
    tyro.cli(long_attention)
