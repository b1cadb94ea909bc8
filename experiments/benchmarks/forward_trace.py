"""How much gptjax code one forward pass of the quickstart runs: files, functions, lines.

    python experiments/benchmarks/forward_trace.py

The preset's model is called on a few tokens, and the gptjax code that runs is counted: files,
functions, executed lines, and source lines of these functions. `--list` names the functions.
"""

import inspect
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import jax.numpy as jnp
import tyro
from flax import nnx

import gptjax

PACKAGE = Path(gptjax.__file__).parent


def forward_trace(preset: str = "quickstart", list: bool = False) -> None:
    """Run one forward pass, and print what ran.

    Args:
      preset: The model.
      list: Name every function.
    """
    config = gptjax.preset(preset)
    model = gptjax.build(config, rngs=nnx.Rngs(0))
    executed: dict[CodeType, set[int]] = {}

    def traced(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if not Path(code.co_filename).is_relative_to(PACKAGE):
            return None
        if event == "line":
            executed.setdefault(code, set()).add(frame.f_lineno)
        return traced

    sys.settrace(traced)
    model(jnp.zeros((1, 8), jnp.int32))
    sys.settrace(None)
    named = [code for code in executed if not code.co_name.startswith("<")]
    named.sort(key=lambda code: (code.co_filename, code.co_firstlineno))
    if list:
        for code in named:
            path = Path(code.co_filename).relative_to(PACKAGE)
            print(f"{path}:{code.co_firstlineno} {code.co_name}, {len(executed[code])} lines run")
    ran = {(code.co_filename, line) for code, lines in executed.items() for line in lines}
    source = {(code.co_filename, line) for code in named for line in _source(code)}
    print(
        f"{preset}: {len({code.co_filename for code in named})} files, {len(named)} functions, "
        f"{len(ran)} lines run, of {len(source)} of their source."
    )


def _source(code: CodeType) -> range:
    """Returns the lines of a function, docstring included."""
    lines, first = inspect.getsourcelines(code)
    return range(first, first + len(lines))


if __name__ == "__main__":
    tyro.cli(forward_trace)
