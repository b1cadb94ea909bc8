"""What the README tells a user to do is what CI does, and what it names is there."""

import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_the_first_two_commands_are_those_of_ci():
    install_and_run, install_and_test = commands()[:2]
    assert install_and_run == "pip install -e . && python experiments/quickstart.py"
    assert install_and_test == "pip install -e '.[test]' && pytest"
    assert "readme_command 1" in CI
    assert "readme_command 2" in CI


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


DOCUMENTS = [path for path in ROOT.rglob("README.md") if "." not in path.parts[len(ROOT.parts)][:1]]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_pictures_and_links_into_the_project_are_there(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)|<img src=\"([^\"]+)\"", path.read_text()):
        linked = target[0] or target[1]
        assert linked.startswith(("http", "#")) or (path.parent / linked).exists(), linked


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) < 2000


def test_every_notebook_is_in_the_table_with_its_badge():
    table = (ROOT / "notebooks" / "README.md").read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"| [{path.stem}]({path.name}) | " in table
        assert f"/blob/main/notebooks/{path.name}) |" in table
