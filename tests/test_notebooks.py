"""Every notebook runs as its reader would start it, without a network; all are kept in one form."""

import ast
import json
import os
import re
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 180
"""All cells of a notebook together."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
INSTALL = f"""\
import importlib.util
import os

# Where gptjax is installed, nothing is done. Colab has GPUs, TPUs: Runtime → Change runtime type.
if importlib.util.find_spec("gptjax") is None:
    gpu, tpu = os.path.exists("/dev/nvidia0"), importlib.util.find_spec("libtpu")
    extra = "cuda" if gpu else "tpu" if tpu else ""
    # JAX and its plugin for a GPU or TPU must be of one version, so that none of another may stay.
    %pip uninstall --yes jax-cuda12-plugin jax-cuda12-pjrt jax-cuda13-plugin jax-cuda13-pjrt libtpu
    %pip install "gptjax[{{extra}}] @ git+{REPOSITORY}"
    importlib.invalidate_caches()
    assert importlib.util.find_spec("gptjax"), "It could not be installed: the reason stands above."
    print("The runtime restarts now, to load what was installed: then run the cells from here on.")
    get_ipython().kernel.do_shutdown(restart=True)"""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
IMPORTED = {"gptjax", "flax", "jax", "numpy", "IPython"}
STANDARD = {
    "collections", "concurrent", "dataclasses", "functools", "importlib", "itertools", "math", "os",
    "pathlib", "re", "string", "tempfile", "time", "typing",
}  # fmt: skip
LINES = 25
COLOUR = re.compile(r"\x1b\[[0-9;]*m")

GATED = "quickstart", "attention_step_by_step"
"""Those that the gate runs: about 20 s each. The others run by hand, with the large tests."""
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


class OfflineKernel(AsyncKernelManager):
    """Kernels of this very Python, which reach no other machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        program = str(ROOT / "tests" / "offline_kernel.py")
        return KernelSpec(argv=[sys.executable, program, "-f", "{connection_file}"])


def users_environment(folder: Path) -> dict[str, str]:
    """Without what tests/conftest.py asks of JAX, pytest of its processes, or IPython's user."""
    ours = ("JAX_", "XLA_", "PYTEST_", "JUPYTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**environment, "JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder / "ipython")}


def execute(notebook: NotebookNode, name: str, folder: Path, seconds: float = SECONDS) -> None:
    """Run all cells in an empty folder; fail with the cell that raises, is late, or complains."""
    work = folder / "work"
    work.mkdir()
    end = time.monotonic() + seconds
    client = NotebookClient(
        notebook,
        kernel_manager_class=OfflineKernel,
        timeout_func=lambda cell: max(1, round(end - time.monotonic())),
        resources={"metadata": {"path": str(work)}},
    )
    complaints = []
    try:
        client.execute(env=users_environment(folder))
    except (CellExecutionError, CellTimeoutError) as error:
        complaints.append(COLOUR.sub("", str(error)))
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                complaints.append(f"written to standard error: {output.text}\n{cell.source}")
    if complaints:
        pytest.fail(f"{name}: " + "\n".join(complaints), pytrace=False)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python_of(notebook: NotebookNode) -> ast.Module:
    """All code but the install cell's, which alone has magics."""
    sources = [cell.source for cell in code_cells(notebook) if cell.source != INSTALL]
    return ast.parse("\n".join(sources))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            marks=pytest.mark.slow if path.stem in GATED else pytest.mark.large,
            id=path.stem,
        )
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs_and_shows_pictures_in_words_too(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, path.name, tmp_path)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    assert not any("image/png" in each for each in data)  # It would have no words.
    images = re.findall("<img [^>]+>", "".join(each.get("text/html", "") for each in data))
    assert images
    assert all(re.search(' alt="[^"]{10,}"', image) for image in images)
    written = "".join(output.text for output in outputs if output.output_type == "stream")
    trains = any(
        name in str(notebook) for name in ("gptjax.train(", "trial.train(", "train_ensemble(")
    )
    assert not trains or re.search(r"\rstep ([\d,]+) of \1\b", written)  # To the last one.


@every_notebook
def test_a_notebook_is_kept_without_what_running_it_leaves(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == METADATA
    for cell in notebook.cells:
        assert cell.cell_type in ("markdown", "code"), cell.id
        assert cell.metadata == {}, cell.id
        assert not cell.get("attachments"), cell.id
    for cell in code_cells(notebook):
        assert cell.outputs == [], cell.id
        assert cell.execution_count is None, cell.id
    # As Jupyter writes it, so that a saved notebook differs in what was edited alone.
    written = json.dumps(json.loads(path.read_text()), indent=1, sort_keys=True, ensure_ascii=False)
    assert path.read_text() == written + "\n"


@every_notebook
def test_a_cell_keeps_a_name_that_can_be_read(path):
    names = [cell.id for cell in nbformat.read(path, as_version=4).cells]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name), name
        assert not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){0,3}(-[0-9a-f]{12})?", name), name


@every_notebook
def test_a_notebook_begins_with_its_title_its_badge_and_the_install_cell(path):
    first, *others = nbformat.read(path, as_version=4).cells
    page = REPOSITORY.replace("https://github.com/", "https://colab.research.google.com/github/")
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert f"[![Open in Colab]({badge})]({page}/blob/main/notebooks/{path.name})" in first.source
    assert [cell.source for cell in others].count(INSTALL) == 1
    assert next(cell for cell in others if cell.cell_type == "code").source == INSTALL


@every_notebook
def test_code_is_short_asserts_and_imports_nothing_that_a_reader_lacks(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        assert 0 < len(cell.source.splitlines()) <= LINES, f"{path.name}\n{cell.source}"
    nodes = list(ast.walk(python_of(notebook)))
    assert any(isinstance(node, ast.Assert) for node in nodes)
    plain = (node.names for node in nodes if isinstance(node, ast.Import))
    imported = {alias.name for names in plain for alias in names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= IMPORTED | STANDARD


@pytest.mark.parametrize(
    ("installed", "gpu", "extra"),
    [("", True, "cuda"), ("libtpu", False, "tpu"), ("", False, ""), ("gptjax", True, None)],
)
def test_the_install_cell_brings_jax_with_the_plugin_of_the_chip(
    installed, gpu, extra, monkeypatch, capsys
):
    done, found = [], {installed}

    class Shell:
        @property
        def kernel(self):
            return self

        def run_line_magic(self, name, line):
            assert name == "pip"
            done.append(line.format(**names))
            if line.startswith("install"):
                found.add("gptjax")

        def do_shutdown(self, restart):
            assert restart
            done.append("restart")

    names = {"get_ipython": Shell}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in found or None)
    monkeypatch.setattr("os.path.exists", lambda path: gpu and path == "/dev/nvidia0")
    exec(TransformerManager().transform_cell(INSTALL), names)
    if extra is None:
        assert done == []
        return
    removed, brought, last = done
    assert removed.startswith("uninstall --yes jax-cuda12-plugin")
    assert brought == f'install "gptjax[{extra}] @ git+{REPOSITORY}"'
    assert last == "restart"
    assert "restarts" in capsys.readouterr().out
    assert {"cuda", "tpu"} <= PROJECT["optional-dependencies"].keys()


@pytest.fixture
def fails(tmp_path):
    """What a notebook of one cell fails with."""

    def message(source: str, seconds: float = SECONDS) -> str:
        with pytest.raises(pytest.fail.Exception) as failure:
            execute(new_notebook(cells=[new_code_cell(source)]), "made.ipynb", tmp_path, seconds)
        return str(failure.value)

    return message


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("found = 2\nassert found == 3", "AssertionError"),
        ("import urllib.request\nurllib.request.urlopen('http://localhost.example')", "offline"),
        ("import socket\nsocket.create_connection(('192.0.2.1', 80))", "offline"),
        ("import warnings\nwarnings.warn('old')", "written to standard error"),
        ("import os\n_ = os.write(2, b'from C')", "written to standard error"),
    ],
)
def test_a_failing_cell_is_shown_with_its_notebook(source, reason, fails):
    message = fails(source)
    assert message.startswith("made.ipynb: ")
    assert source in message
    assert reason in message


def test_a_notebook_that_takes_too_long_is_stopped_at_its_cell(fails):
    message = fails("import time\ntime.sleep(60)", seconds=2)
    assert message.startswith("made.ipynb: ")
    assert "time.sleep(60)" in message
    assert "timed out" in message


def test_a_kernel_is_a_users(tmp_path):
    """One device, nothing imported, nothing in its folder, all of XLA's optimizations."""
    source = (
        "import os, sys\n"
        "assert not os.listdir()\n"
        "assert not {'jax', 'numpy', 'gptjax', 'pytest'} & sys.modules.keys()\n"
        "import jax\n"
        "assert jax.device_count() == 1\n"
        "ours = [name for name in os.environ if name.startswith(('JAX_', 'XLA_', 'PYTEST_'))]\n"
        "assert ours == ['JAX_PLATFORMS']\n"
        "assert 'refuse_other_hosts' not in globals()"
    )
    execute(new_notebook(cells=[new_code_cell(source)]), "made.ipynb", tmp_path)
