"""DESIGN.md: imports run downwards only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CONFIG = "gptjax.config.*"
LAYERS = "gptjax.layers.*"
DATA = "gptjax.data.*"
DISTRIBUTED = "gptjax.distributed.*"
TRAINING = "gptjax.training.*"
PREFLIGHT = "gptjax.preflight.*"
COMPARE = "gptjax.compare.*"

ALLOWED = {
    # module: what it may import of ours; the first line that fits a module is its own.
    CONFIG: [CONFIG],
    "gptjax.colours": [],
    "gptjax.exits": [],
    "gptjax.disk": [CONFIG],
    "gptjax.locks": [CONFIG],
    "gptjax.outputs": [CONFIG, "gptjax.disk", "gptjax.locks"],
    "gptjax.memory": [CONFIG],
    "gptjax.chips": [],
    "gptjax.keys": [],
    "gptjax.presets": [CONFIG],
    "gptjax.axes": [CONFIG],
    "gptjax.ledger": [CONFIG],
    "gptjax.sharding": [CONFIG],
    LAYERS: [CONFIG, "gptjax.sharding", LAYERS],
    DATA: [CONFIG, "gptjax.disk", "gptjax.locks", DATA],
    "gptjax.language_model": [CONFIG, "gptjax.sharding", LAYERS],
    "gptjax.transformer": [CONFIG, LAYERS, "gptjax.language_model"],
    DISTRIBUTED: [CONFIG, "gptjax.exits", DISTRIBUTED],
    TRAINING: [
        CONFIG,
        "gptjax.disk",
        "gptjax.exits",
        "gptjax.chips",
        "gptjax.keys",
        "gptjax.sharding",
        DATA,
        DISTRIBUTED,
        TRAINING,
    ],
    "gptjax.generate": [CONFIG, "gptjax.keys", "gptjax.transformer"],
    "gptjax.beam_search": [CONFIG, "gptjax.generate", "gptjax.transformer"],
    "gptjax.huggingface.*": [CONFIG, "gptjax.transformer", "gptjax.huggingface.*"],
    "gptjax.plots.*": [CONFIG, "gptjax.colours", "gptjax.outputs", "gptjax.plots.*"],
    "gptjax.attention_view": [CONFIG, "gptjax.colours", "gptjax.outputs"],
    "gptjax.runs": [
        CONFIG,
        "gptjax.disk",
        "gptjax.locks",
        DATA,
        DISTRIBUTED,
        TRAINING,
        "gptjax.transformer",
    ],
    "gptjax.probe.over_training": ["gptjax.runs"],
    "gptjax.probe.*": [CONFIG, LAYERS, "gptjax.transformer", "gptjax.probe.*"],
    "gptjax.mup": [CONFIG, LAYERS, "gptjax.transformer"],
    "gptjax.trial": [
        CONFIG,
        "gptjax.keys",
        "gptjax.sharding",
        TRAINING,
        "gptjax.transformer",
        "gptjax.runs",
        "gptjax.mup",
    ],
    "gptjax.together": [
        CONFIG,
        "gptjax.keys",
        "gptjax.ledger",
        "gptjax.sharding",
        DATA,
        TRAINING,
        "gptjax.transformer",
        "gptjax.mup",
        "gptjax.trial",
    ],
    "gptjax.statistics": [CONFIG],
    "gptjax.equivalence": [
        CONFIG,
        LAYERS,
        "gptjax.sharding",
        DATA,
        "gptjax.transformer",
        TRAINING,
        "gptjax.generate",
        "gptjax.ledger",
    ],
    "gptjax.certify": [
        CONFIG,
        "gptjax.presets",
        "gptjax.axes",
        "gptjax.equivalence",
        "gptjax.runs",
    ],
    COMPARE: [
        CONFIG,
        "gptjax.memory",
        "gptjax.outputs",
        "gptjax.disk",
        "gptjax.locks",
        "gptjax.axes",
        "gptjax.presets",
        "gptjax.ledger",
        "gptjax.sharding",
        DATA,
        TRAINING,
        "gptjax.transformer",
        "gptjax.generate",
        "gptjax.plots.*",
        "gptjax.runs",
        "gptjax.trial",
        "gptjax.together",
        "gptjax.statistics",
        COMPARE,
    ],
    "gptjax.preflight.settings": [CONFIG, "gptjax.presets"],
    PREFLIGHT: [
        CONFIG,
        "gptjax.chips",
        "gptjax.ledger",
        "gptjax.sharding",
        LAYERS,
        DATA,
        "gptjax.transformer",
        TRAINING,
        "gptjax.generate",
        PREFLIGHT,
    ],
    "gptjax.commands.*": [
        CONFIG,
        "gptjax.memory",
        "gptjax.outputs",
        "gptjax.exits",
        DISTRIBUTED,
        "gptjax.certify",
        PREFLIGHT,
        "gptjax.presets",
        "gptjax.ledger",
        DATA,
        "gptjax.generate",
        "gptjax.beam_search",
        "gptjax.huggingface.*",
        "gptjax.attention_view",
        "gptjax.runs",
        "gptjax.probe.*",
        "gptjax.commands.*",
    ],
    "gptjax.cli": [
        CONFIG,
        "gptjax.disk",
        "gptjax.exits",
        "gptjax.memory",
        DISTRIBUTED,
        "gptjax.commands.*",
        TRAINING,
    ],
    "gptjax.__main__": ["gptjax.cli"],
    # The public face, which nothing of ours below the experiments imports.
    "gptjax": [
        CONFIG,
        "gptjax.presets",
        "gptjax.ledger",
        "gptjax.transformer",
        "gptjax.generate",
        "gptjax.huggingface.*",
        "gptjax.beam_search",
    ],
}

HEAVY = ("orbax", "grain", "matplotlib", "tensorboardX", "tyro", "sentencepiece", "tokenizers")
"""Packages that `import gptjax` does not wait for."""


def _modules() -> dict[str, Path]:
    """Every module of gptjax by its name."""
    modules = {}
    for path in sorted((ROOT / "gptjax").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    return modules


MODULES = _modules()


def _imports(source: str, modules: dict[str, Path]) -> set[str]:
    """The modules that `source` imports anywhere, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"  # `from gptjax import plots` is gptjax.plots.
                found.add(name if name in modules else str(node.module))
    return found


def _ours(imports: set[str]) -> set[str]:
    return {name for name in imports if name.partition(".")[0] == "gptjax"}


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or (
        pattern.endswith(".*") and f"{name}.".startswith(pattern.removesuffix("*"))
    )


def _allowed(module: str) -> list[str]:
    """What the table allows `module`; a module that is in no line fails."""
    return next(allowed for pattern, allowed in ALLOWED.items() if _fits(module, pattern))


def test_imports_are_found_wherever_they_stand():
    source = """
import gptjax.plots
from gptjax import presets, preset
from gptjax.config import InputError
def f():
    import orbax.checkpoint as ocp
    from gptjax.data import tokenizers
"""
    assert _imports(source, MODULES) == {
        "gptjax.plots",
        "gptjax.presets",
        "gptjax",
        "gptjax.config",
        "orbax.checkpoint",
        "gptjax.data.tokenizers",
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below_it(module):
    allowed = _allowed(module)
    upward = {
        name
        for name in _ours(_imports(MODULES[module].read_text(), MODULES))
        if not any(_fits(name, pattern) for pattern in allowed)
    }
    assert not upward, f"{module} may import {allowed or 'nothing of ours'}"


def test_the_table_itself_runs_downwards():
    below: dict[str, list[str]] = {}
    for module, allowed in ALLOWED.items():
        for pattern in allowed:
            assert pattern in below or pattern == module, f"{module}: {pattern} is not below it"
        below[module] = allowed


def test_the_table_has_no_line_that_is_not_needed():
    unused = set()
    for pattern, allowed in ALLOWED.items():
        modules = [name for name in MODULES if _fits(name, pattern)]
        assert modules, f"no module is {pattern}"
        imports = set().union(
            *(_ours(_imports(MODULES[module].read_text(), MODULES)) for module in modules)
        )
        unused |= {
            (pattern, target)
            for target in allowed
            if not any(_fits(name, target) for name in imports)
        }
    assert not unused


def test_gptjax_never_imports_experiments():
    experiments = {path.stem for path in (ROOT / "experiments").glob("*.py")} | {"experiments"}
    assert len(experiments) > 1
    for path in MODULES.values():
        roots = {name.partition(".")[0] for name in _imports(path.read_text(), MODULES)}
        assert not roots & experiments, path


def test_only_the_checkpoint_module_imports_orbax():
    importers = {
        name
        for name, path in MODULES.items()
        if any(found.partition(".")[0] == "orbax" for found in _imports(path.read_text(), MODULES))
    }
    assert importers == {"gptjax.training.checkpoint"}


def test_no_module_is_called_utils():
    names = {part for name in MODULES for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_importing_gptjax_waits_for_no_heavy_package():
    code = f"""
import sys
import gptjax
print(sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY})))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert ended.stdout == "[]\n"


def test_what_grains_workers_import_starts_no_jax():
    code = """
import sys, types
from pathlib import Path
sys.modules["jax"] = None  # An import of it fails.
package = types.ModuleType("gptjax")
package.__path__ = [str(Path.cwd() / "gptjax")]
sys.modules["gptjax"] = package
import gptjax.data.pipeline, gptjax.data.report
from gptjax.data.sources import open_source, tfds
assert open_source("embedded")[0]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
