"""What the README tells a user to do is what CI does, and what it names is there."""

import re

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


def test_every_file_of_the_tree_is_there():
    tree = README.split("```text\n")[1].split("```")[0]
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = [*folders[:depth], name]
        assert (ROOT / "".join(folders)).exists(), line


def test_every_module_is_in_the_tree():
    for path in [*(ROOT / "gptjax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]:
        assert path.name.startswith("__") or path.name in README, path.name


def test_pictures_and_links_into_the_project_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)|<img src=\"([^\"]+)\"", README):
        path = target[0] or target[1]
        assert path.startswith("http") or (ROOT / path).exists(), path


def test_every_notebook_is_in_the_table_with_its_badge():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"| [{path.stem}](notebooks/{path.name}) | " in README
        assert f"/blob/main/notebooks/{path.name}) |" in README
