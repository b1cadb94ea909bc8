"""What is installed works without a checkout: train, sample, compare, from anywhere."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TINY = ("--model.depth", "1", "--model.width", "16", "--model.heads", "2")


def _setuptools() -> int:
    """The major version of what is installed; 0 is none, and 65 what Python 3.11's venv brings."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of nothing but the wheel's content."""
    made = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = made / "source"  # Where the build leaves its own files.
    shutil.copytree(ROOT / "gptjax", source / "gptjax")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--wheel-dir", str(made), str(source)]
    if _setuptools() >= 77:  # What pyproject asks for is here: no need of a network.
        build.append("--no-build-isolation")
    subprocess.run([*pip, *build], check=True, cwd=made)
    (wheel,) = made.glob("gptjax-*.whl")
    target = ["install", "--no-deps", "--target", str(made / "site"), str(wheel)]
    subprocess.run([*pip, *target], check=True, cwd=made)
    return made / "site"


@pytest.mark.slow
def test_a_wheel_trains_samples_and_compares(installed, tmp_path):
    def gptjax(*words: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "gptjax", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    (tmp_path / "where.py").write_text("import gptjax; print(gptjax.__file__)")
    where = subprocess.check_output(
        [sys.executable, "where.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}
    )
    assert Path(where.decode().strip()).is_relative_to(installed)
    text = "".join(f"{n} and {n * n} are a number and its square.\n" for n in range(300))
    (tmp_path / "text.txt").write_text(text)
    flags = ["--data.source", "text.txt", "--model.context-length", "32", *TINY]
    steps = ["--train.steps", "20", "--optimizer.warmup-steps", "2", "--train.batch-size", "4"]
    printed = gptjax("train", "--preset", "quickstart", *flags, *steps, "--out", "run")
    assert "Best validation loss" in printed
    assert {"loss.png", "attention.png", "samples.txt"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert gptjax("sample", "run", "--prompt", "3 and", "--max-new-tokens", "5")
    variants = [
        "quickstart:depth=1,width=16,heads=2",
        "quickstart:depth=1,width=16,heads=2,norm=rmsnorm",
    ]
    budget = ["--match", "none", "--budget", "tokens=4096", "--seeds", "2", "--rates", "1e-3"]
    shape = ["--context-length", "16", "--batch-size", "4", "--data.source", "text.txt"]
    gptjax("compare", "--variants", *variants, *budget, *shape, "--out", "study")
    assert (tmp_path / "study" / "report.html").exists()
