"""The report: what it says, what a browser shows of it, and that its files hold all of it."""

import csv
import dataclasses
import functools
import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import answers
import pytest

from gptjax.compare.report import dark
from gptjax.compare.report.files import read_results, write_report
from gptjax.compare.results import Answer
from gptjax.config import InputError

ANSWERS: dict[str, Callable[[], Answer]] = {
    "usual": answers.usual,
    "one seed": answers.one_seed,
    "alone": answers.alone,
    "two sizes": answers.two_sizes,
    "four sizes": answers.four_sizes,
    "withheld": answers.withheld,
    "no baseline": answers.no_baseline,
    "many": answers.many,
}
ODD = "gpt2:a|b<script>window.broken = 1</script>`c`"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to draw with")


@functools.cache
def answer(name: str) -> Answer:
    return ANSWERS[name]()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of an answer's report; read only."""

    @functools.cache
    def write(name: str) -> Path:
        directory = tmp_path_factory.mktemp("report")
        write_report(answer(name), directory)
        return directory

    return write


def words(directory: Path, section: str = "") -> str:
    """What the page says, or one of its sections."""
    page = (directory / "report.html").read_text(encoding="utf-8")
    if section:
        page = page.partition(f'<section id="{section}">')[2].partition("</section>")[0]
        assert page, section
    body = re.sub(r"<(style|svg|title).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"</?\w[^>]*>", "", body)))


def answering(directory: Path) -> str:
    """Its first section."""
    return words(directory, "verdict")


FITTED = pytest.param("four sizes", marks=pytest.mark.slow)
"""Fits 200 resamples of each variant's law."""


every_answer = pytest.mark.parametrize(
    "name", [FITTED if name == "four sizes" else name for name in ANSWERS]
)


@pytest.mark.parametrize("name", ["usual", pytest.param("four sizes", marks=pytest.mark.large)])
def test_a_report_is_the_same_each_time(name, written, tmp_path):
    write_report(answer(name), tmp_path)
    ours, theirs = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path, written(name))
    )
    assert ours == theirs


@every_answer
def test_every_file_is_written(name, written):
    directory = written(name)
    assert {path.name for path in directory.iterdir()} >= {
        "report.html", "report.md", "results.csv", "results.jsonl",
    }  # fmt: skip
    figures = re.findall(r"\]\((figures/[^)]+)\)", (directory / "report.md").read_text())
    assert figures
    assert set(figures) == {f"figures/{path.name}" for path in (directory / "figures").iterdir()}
    assert "nan" not in words(directory).lower().split()


@every_answer
def test_results_are_read_back(name, written):
    assert read_results(written(name)) == answer(name).outcomes
    with (written(name) / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(answer(name).outcomes)
    by_key = {(each.variant, each.size): each for each in answer(name).entries}
    for row, run in zip(rows, answer(name).outcomes, strict=True):
        loss = float(row["validation_loss"]) if row["validation_loss"] else None
        assert (row["variant"], int(row["seed"]), loss) == (
            run.variant,
            run.seed,
            run.validation_loss,
        )
        entry = by_key[run.variant, run.size]
        assert int(row["parameters"]) == entry.parameters
        assert float(row["training_flops"]) == entry.training_flops * run.tokens


def test_a_number_that_json_lacks_comes_back(tmp_path):
    whole = answer("usual")
    lost = dataclasses.replace(whole.outcomes[0], curve_losses=(1.0, float("inf")))
    write_report(dataclasses.replace(whole, outcomes=(lost, *whole.outcomes[1:])), tmp_path)
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read_results(tmp_path)[0].curve_losses == (1.0, float("inf"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot read"), ("{\n", "line 1 of"), ('{"variant": "a"}\n', "lacks size, purpose")],
)
def test_results_that_cannot_be_read_are_told(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_results(tmp_path)


def test_the_answer_comes_first_and_says_no_more_than_is_known(written):
    told = answering(written("usual"))
    assert re.search(r"llama-style \(−0\.0\d+, interval −[^)]*\) is better than the", told)
    assert re.search(r"post-norm \(\+0\.0\d+, interval \+[^)]*\) is worse than the", told)
    assert re.search(r"gpt2:position_embedding=alibi \([^)]*\) is not separated from it", told)
    assert "No run of lstm finished." in told
    assert "5 seeds on 200 k tokens per run" in told
    assert "within 1%" in told
    assert "95% confidence" in told


@pytest.mark.parametrize(
    ("name", "title", "glance"),
    [
        (
            "usual",
            "Of 4 variants 1 is better than gpt2, 1 worse, 1 not separated and 1 failed",
            ["▼ better llama-style −0.0", "▲ worse post-norm +0.0", "○ not separated", "✕ failed"],
        ),
        ("one seed", "No verdict on 3 variants against gpt2: too few seeds", ["○ no interval"]),
        ("alone", "gpt2 alone", []),
        ("withheld", "llama-style is not judged against gpt2, as runs failed", ["○ withheld"]),
        ("no baseline", "No run of the baseline gpt2 finished", ["○ no interval llama-style"]),
        (
            "many",
            "Of 11 variants 4 are better than gpt2, 5 worse and 2 not separated",
            ["▼ better"],
        ),
    ],
)
def test_the_verdict_is_the_first_thing_on_the_page(name, title, glance, written):
    page = words(written(name))
    assert page.index(title) < 200  # Behind the same words as the tab's name.
    places = [page.index(said) for said in (title, *glance, "per variant")]
    assert places == sorted(places)
    markdown = (written(name) / "report.md").read_text()
    assert markdown.replace("`", "").startswith(f"# {title}\n")


def test_each_size_has_its_verdict(written):
    assert re.search(
        r"3 variants against gpt2 at 2 sizes params=0\.3M .*better llama-style −.*"
        r"params=1M .*worse llama-style \+",
        words(written("two sizes")),
    )


def test_of_a_variant_its_verdict_comes_first(written):
    (head,) = re.findall(
        r"^\| Variant \| Verdict \|.*$", (written("usual") / "report.md").read_text(), re.M
    )
    assert "Trimmed mean of the differences, interval" in head
    few = (written("two sizes") / "report.md").read_text()
    assert "Trimmed mean of the differences, interval" not in few  # Of three seeds it is the mean.


@pytest.mark.parametrize("name", ["usual", "many"])
def test_figures_follow_the_scheme_and_stand_out(name, written):
    for path in (written(name) / "figures").iterdir():
        svg = path.read_text()
        rules = svg.partition("@media screen and (prefers-color-scheme: dark)")[2]
        for what, colour in set(dark.COLOUR.findall(svg.partition("</style>")[2])):
            (counterpart,) = re.findall(
                rf'\[style\*="{what}: {colour}"\] {{{what}: (#\w+) !important}}', rules
            )
            if colour == "#ffffff":
                assert counterpart == dark.PAGE
            elif colour != "#b0b0b0":  # Lines of the grid.
                assert dark.contrast(counterpart) > 3
    style = (written(name) / "report.html").read_text()
    assert f"--page: {dark.PAGE}" in style
    assert f"--ink: {dark.INK}" in style


def test_negative_results_stand_beside_the_others(written):
    page = words(written("usual"))
    assert "not separated from gpt2; about " in page
    assert "post-norm did best at 0.001, the smallest learning rate tried" in page
    assert "the loss was not finite at step 31." in page
    assert "The memory of a TPU was not asked for: there is no libtpu." in page
    assert "Not separated does not mean equal" in page
    assert "python experiments/compare.py --variants gpt2 llama-style --seeds 5" in page
    assert "0.10.2" in page
    assert "0123456789ab" in page


def test_one_seed_has_no_interval_and_says_so(written):
    told = answering(written("one seed"))
    assert "No verdict against gpt2: with one seed per variant" in told
    assert not re.search(r"\) (is|are) (better|worse) than", told)
    assert "one seed: no interval" in words(written("one seed"))


def test_one_variant_is_not_called_a_comparison(written):
    told = words(written("alone"))
    assert "gpt2 alone" in told
    assert "Only gpt2 was run; it reached" in answering(written("alone"))
    assert not re.search(r"0 variants|[Ww]hich variants|[Ee]ach variant against", told)


def test_a_variant_whose_bad_runs_failed_is_not_called_better(written):
    told = answering(written("withheld"))
    assert not re.search(r"\) (is|are) better than", told)
    assert "not called better than gpt2, since its failed runs may be the bad ones" in told


def test_without_a_baseline_nothing_is_compared(written):
    told = answering(written("no baseline"))
    assert "No run of the baseline gpt2 finished, so nothing can be compared with it." in told


@pytest.mark.slow
def test_sizes_have_laws_and_crossings_where_there_are_enough(written):
    assert "need at least 3" in words(written("two sizes"))
    page = words(written("four sizes"))
    assert "alpha" in page
    assert "The law of llama-style is lower below 2.82 M parameters" in page
    assert "At params=0.3M" in page
    assert "At params=10M" in page


def test_what_a_user_gives_stays_text(tmp_path):
    write_report(answers.named(ODD), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    markdown = (tmp_path / "report.md").read_text()
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    assert len(blocks) > 3
    for block in blocks:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(bars) == 1, block
    assert not re.findall(r"(?<![`\\\w=|])<script", re.sub(r"`[^`\n]*`|```.*?```", "", markdown))


DRAWN = """() => [...document.querySelectorAll("figure")].map(figure => {
  const seen = [...figure.querySelectorAll("svg")].filter(svg => svg.checkVisibility());
  const box = seen[0].getBoundingClientRect(), text = seen[0].querySelector("text");
  const tall = parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a;
  const paper = getComputedStyle(seen[0].querySelector("path")).fill;
  return [seen.length, box.left, box.right, tall, paper];
})"""
"""Of each figure: how many of its drawings are visible; the first one's left and right end, the
height of its letters in pixels, and its background."""
ENDS = """() => [...document.querySelectorAll("#results td.words")].map(
  cell => cell.getBoundingClientRect().right)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("name", [*ANSWERS, "odd"])
def test_a_browser_shows_it_all_and_asks_for_nothing(name, written, browser, tmp_path):
    if name == "odd":
        write_report(answers.named(ODD), tmp_path)
    address = f"file://{tmp_path if name == 'odd' else written(name)}/report.html"
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said, asked = [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(address)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("figure svg").count() > 0 or name == "no baseline"
            for seen, left, right, tall, paper in page.evaluate(DRAWN):
                assert seen == 1
                assert left >= 0
                assert right <= width
                assert tall > 8.5
                assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 21, 28)")
            assert max(page.evaluate(ENDS), default=0) <= width
            assert page.evaluate("window.broken") is None
            assert said == []
            assert asked == [address]
            page.close()
