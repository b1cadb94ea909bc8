"""DESIGN.md: imports run downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gptjax

ROOT = Path(__file__).parents[1]

ROOMS = {
    # room: the rooms that its modules import, each of which stands above it here.
    "config": "",
    "system": "config",
    "costs": "config",
    "parallel": "config",
    "layers": "config parallel",
    "models": "config parallel layers",
    "data": "config system",
    "distributed": "config system",
    "training": "config system costs parallel data distributed",
    "decoding": "config layers parallel models",
    "huggingface": "config system models",
    "plots": "config system",
    "runs": "config system costs parallel layers models data distributed training",
    "probe": "config layers models runs",
    "certify": "config costs parallel layers models data training decoding runs",
    "compare": "config system costs parallel models data training decoding plots runs",
    "notebook": "config system models data huggingface plots runs probe",
    "preflight": "config costs parallel layers models data training decoding",
    "commands": "config system costs models data distributed training decoding huggingface plots "
    "runs probe certify compare notebook preflight",
    "cli": "config system distributed commands",
    "__main__": "cli",
    # The public face, which nothing of ours below the experiments imports.
    "gptjax": "config costs models decoding huggingface runs plots probe certify compare notebook",
}

HEAVY = ("jax", "flax", "numpy", "optax", "orbax", "grain", "matplotlib", "tensorboardX")
"""Packages that nobody waits for who has not yet asked for what needs them."""

LOADED = f"""
import sys
print(sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY})), file=sys.stderr)
"""
COMMAND = """
import contextlib, sys
from gptjax import cli
sys.argv = ["gptjax", *{}]
with contextlib.suppress(SystemExit):
    cli.main()
"""


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


def _room(module: str) -> str:
    """The first part of a module's name behind the package's own."""
    return [*module.split("."), "gptjax"][1]


def _imported_rooms() -> dict[str, dict[str, set[str]]]:
    """By room and by room that it imports, the modules that do."""
    found: dict[str, dict[str, set[str]]] = {}
    for module, path in MODULES.items():
        own = found.setdefault(_room(module), {})
        for imported in _ours(_imports(path.read_text(), MODULES)):
            if _room(imported) != _room(module):
                own.setdefault(_room(imported), set()).add(module)
    return found


def test_imports_are_found_wherever_they_stand():
    source = """
import gptjax.plots
from gptjax.models import presets
from gptjax import preset
from gptjax.config import InputError
def f():
    import orbax.checkpoint as ocp
    from gptjax.data import tokenizers
"""
    assert _imports(source, MODULES) == {
        "gptjax.models.presets",
        "gptjax.plots",
        "gptjax",
        "gptjax.config",
        "orbax.checkpoint",
        "gptjax.data.tokenizers",
    }


def test_rooms_import_what_the_table_says():
    found = _imported_rooms()
    assert set(found) == set(ROOMS)
    for room, imported in found.items():
        allowed = set(ROOMS[room].split())
        upward = {other: modules for other, modules in imported.items() if other not in allowed}
        assert not upward, f"{room} imports {upward}, and may import {sorted(allowed)}"
        assert set(imported) == allowed, f"{room} need not import {allowed - set(imported)}"


def test_the_table_runs_downwards():
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= above, room
        above.add(room)


def test_modules_import_each_other_in_no_circle():
    # A source that a worker unpickles asks its package to open it again: one circle, in functions.
    left = {
        module: _ours(_imports(path.read_text(), MODULES)) - {module, "gptjax.data.sources"}
        for module, path in MODULES.items()
    }
    while free := {module for module, imported in left.items() if not imported & set(left)}:
        left = {module: imported for module, imported in left.items() if module not in free}
    assert not left


def test_gptjax_never_imports_experiments():
    experiments = {path.stem for path in (ROOT / "experiments").glob("*.py")} | {"experiments"}
    assert len(experiments) > 1
    for path in MODULES.values():
        roots = {name.partition(".")[0] for name in _imports(path.read_text(), MODULES)}
        assert not roots & experiments, path


def test_only_the_checkpoint_modules_import_orbax():
    importers = {
        name
        for name, path in MODULES.items()
        if any(found.partition(".")[0] == "orbax" for found in _imports(path.read_text(), MODULES))
    }
    assert importers == {
        "gptjax.training.checkpoint",
        "gptjax.training.orbax_checkpointer",
    }


def test_no_module_is_called_utils():
    names = {part for name in MODULES for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize(
    "code",
    [
        "import gptjax",
        "from gptjax import TransformerConfig, model_cost, preset",
        COMMAND.format(["--help"]),
        COMMAND.format(["params", "gpt2"]),
        COMMAND.format(["compare", "--help"]),
        COMMAND.format(["train", "--help"]),
    ],
)
def test_nobody_waits_for_packages_that_are_not_needed_yet(code):
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LOADED}"], capture_output=True, text=True, check=True
    )
    assert ended.stderr == "[]\n"


def test_type_checkers_see_the_names_that_gptjax_has():
    source = ast.parse(MODULES["gptjax"].read_text())
    (block,) = (node for node in source.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    # A module of ours is imported from the package: `from gptjax import probe as probe`.
    assert seen == {
        name: "gptjax" if module == f"gptjax.{name}" else module
        for name, module in gptjax.MODULES.items()
    }
    assert all(getattr(gptjax, name) is not None for name in gptjax.MODULES)
    assert set(gptjax.MODULES) <= set(dir(gptjax))
    assert not hasattr(gptjax, "bulid")


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
