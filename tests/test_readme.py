"""What the READMEs tell a user to do is done by CI or by these tests, and what they name is there.

Each block of shell commands stands behind a comment that says who runs it:

| comment | its commands |
|---|---|
| ci: NAME | .ci/run runs them |
| run | they run here, in order, as on a fresh clone; training is made tiny |
| shown: WHY | they need hardware, files or minutes, as the text says: here flags are read |
"""

import functools
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from typing import Any, NamedTuple

import pytest
from conftest import ROOT

from gptjax import cli
from gptjax.commands import flags

README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()
# The README first: others go on from what its commands leave.
DOCUMENTS = sorted(
    (path for path in ROOT.rglob("README.md") if "." not in path.parts[len(ROOT.parts)][:1]),
    key=lambda path: (len(path.parts), path),
)
MODEL = ["--model.depth", "1", "--model.width", "16", "--model.heads", "2"]
TINY = [*MODEL, "--train.steps", "4", "--train.batch-size", "2"]
"""Behind a command that trains; of a flag that is given twice the last one counts."""


class Block(NamedTuple):
    """A block of shell commands."""

    document: str
    mark: str
    """Of the comment before it; nothing where there is none."""
    lines: list[str]


def blocks() -> list[Block]:
    found = []
    for path in DOCUMENTS:
        for mark, text in re.findall(
            r"^(?:<!-- ([^\n]+) -->\n)?```sh\n(.*?)^```$",
            path.read_text(),
            re.DOTALL | re.MULTILINE,
        ):
            lines = [line for line in text.splitlines() if line and not line.startswith("#")]
            found.append(Block(path.relative_to(ROOT).as_posix(), mark, lines))
    return found


def ours(line: str) -> list[str]:
    """The words of gptjax's command in a line: no launcher before it, nothing behind it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""  # A source may have a # within.
    words = list(lexer)
    for place, word in enumerate(words):
        if word == "gptjax" or words[place : place + 3] == ["python", "-m", "gptjax"]:
            command = ["gptjax", *words[place + (1 if word == "gptjax" else 3) :]]
        elif word == "python" and words[place + 1].startswith("experiments/"):
            command = words[place + 1 :]
        else:
            continue
        return list(itertools.takewhile(lambda word: word not in (";", "&&", "#"), command))
    return []


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one of our commands in this process; a mistake ends in SystemExit."""
    monkeypatch.setattr(sys, "argv", words)
    if words[0] == "gptjax":
        cli.main()
    else:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def test_every_block_of_commands_says_who_runs_it():
    for block in blocks():
        assert re.fullmatch(r"run|ci: \w+|shown: .+", block.mark), block


def test_ci_runs_the_commands_that_are_marked_for_it():
    marked = {block.mark.removeprefix("ci: "): block for block in blocks() if "ci: " in block.mark}
    assert {name: block.document for name, block in marked.items()} == {
        "train": "README.md",
        "test": "README.md",
    }
    assert marked["train"].lines == ["pip install -e . && python experiments/quickstart.py"]
    assert marked["test"].lines == ["pip install -e '.[test]' && pytest"]
    assert all(f"$(readme_command {name})" in CI for name in marked)


def test_flags_of_every_command_are_read(monkeypatch, capsys):
    def only_read(command):  # What it returns would be run.
        return functools.wraps(command)(lambda *given, **flags: lambda: None)

    monkeypatch.setattr(flags, "_deferred", only_read)
    read = []
    for block in blocks():
        for line in block.lines:
            if words := ours(line):
                call(words, monkeypatch)
                read.append(words)
    assert len(read) > 20


@pytest.mark.slow
def test_commands_that_are_marked_run_as_on_a_fresh_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("gptjax", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks():
        for line in block.lines:
            trains = "gptjax train " in line or block.mark == "ci: train"
            if block.mark == "run" or trains:
                call([*ours(line), *(TINY if trains else [])], monkeypatch)
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}
    assert {"runs/quickstart", "runs/mine", "runs/imported", "datasets/my_corpus"} <= made


def test_the_code_of_the_readme_runs():
    for code in re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        if "import gptjax" in code:  # Else it shows lines of a module.
            names: dict[str, Any] = {}
            exec(code, names)
            assert names["logits"].shape == (1, 16, names["model"].config.vocab_size)
            assert names["weights"].shape == (4, 1, 4, 16, 16)
            return
    raise AssertionError("there is none")


def paths_of(document: str) -> set[str]:
    """What a document's tree names."""
    tree = document.split("```text\n")[1].split("```")[0]
    folders: list[str] = []
    found = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], line.split()[0]]
        found.add("".join(folders))
    return found


def test_the_readme_names_every_room_and_every_experiment():
    named = paths_of(README)
    assert all((ROOT / path).exists() for path in named), named
    rooms = {f"gptjax/{path.parent.name}/" for path in (ROOT / "gptjax").glob("*/__init__.py")}
    runs = {f"experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")}
    assert rooms | runs <= named


def test_the_map_names_every_module():
    rooms = {f"gptjax/{path}" for path in paths_of((ROOT / "gptjax" / "README.md").read_text())}
    assert all((ROOT / path).exists() for path in rooms), rooms
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gptjax").rglob("*.py")}
    assert {path for path in modules if not path.rpartition("/")[2].startswith("__")} <= rooms


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_pictures_and_links_into_the_project_are_there(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)|<img src=\"([^\"]+)\"", path.read_text()):
        linked = target[0] or target[1]
        assert linked.startswith(("http", "#")) or (path.parent / linked).exists(), linked


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) < 2000


def test_the_address_is_that_of_the_project_and_so_is_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address, version = project["urls"]["Repository"], project["version"]
    assert f"version = {{{version}}}, url = {{{address}}}" in README
    named = address.removeprefix("https://github.com/")
    folders = ("gptjax", "experiments", "notebooks", "tests", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [ROOT / "README.md", *files]:
        if path.suffix in (".md", ".ipynb", ".py"):
            for mention in re.findall(r"github(?:\.com)?/([\w-]+/gptjax)\b", path.read_text()):
                assert mention == named, path


def test_every_notebook_is_in_the_table_with_its_badge():
    table = (ROOT / "notebooks" / "README.md").read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"| [{path.stem}]({path.name}) | " in table
        assert f"/blob/main/notebooks/{path.name}) |" in table
