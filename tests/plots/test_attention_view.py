"""The page of attention: what Python packs into it, and what a browser shows of it."""

import base64
import html
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EXPERIMENTS
from fontTools.ttLib import TTFont

from gptjax.config import InputError
from gptjax.plots import token_label
from gptjax.plots.attention_view import PAGE, SCRIPTS, AttentionPart, AttentionView, likeliest
from gptjax.plots.colours import diverging

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to draw with")

WORDS = ["The", "·cat", "·sat", "·down"]
CHINESE = list("机器人不得伤害")
ODD = [
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "&amp;&quot;",
    "שלום",
    "x" * 3000,
    token_label("\u202e \n\t"),
    "👍",
    "\ufffd",
]


def part(
    rows: list[str] = WORDS,
    columns: list[str] | None = None,
    *,
    layers: int = 2,
    heads: int = 3,
    key_heads: int | None = None,
    width: int = 8,
    name: str = "attention",
) -> AttentionPart:
    """Attention that follows from random queries and keys; causal where nothing else is read."""
    rng = np.random.default_rng(len(rows))
    read = rows if columns is None else columns
    query = rng.normal(size=(layers, len(rows), heads, width)).astype(np.float32)
    key = rng.normal(size=(layers, len(read), key_heads or heads, width)).astype(np.float32)
    scores = np.einsum("ltnh,lsnh->lnts", query, key.repeat(heads // key.shape[2], axis=2))
    if columns is None:
        scores = np.where(np.tri(len(rows), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return AttentionPart(name, rows, read, weights, query, key)


def unpacked(page: str, identity: str) -> bytes:
    packed = re.search(rf'<script id="{identity}" type="text/plain">([^<]*)</script>', page)
    assert packed, identity
    return zlib.decompress(base64.b64decode(packed[1]))


def numbers(planes: bytes) -> np.ndarray:
    high, low = np.frombuffer(planes, np.uint8).reshape(2, -1).astype(int)
    return 256 * high + low


def header(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="header" type="application/json">(.*?)</script>', page)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("many", [False, True])
def test_weights_are_packed_to_the_precision_that_the_page_tells(causal, many, monkeypatch):
    if many:
        monkeypatch.setattr("gptjax.plots.attention_view.FEW", 10)
    given = part() if causal else part(columns=CHINESE)
    page = AttentionView([given]).html
    told = header(page)["parts"][0]
    assert told["causal"] is causal
    assert told["levels"] == (16383 if many else 65535)
    for layer, weights in enumerate(given.weights):
        kept = numbers(unpacked(page, f"weights-0-{layer}")) / told["levels"]
        shown = weights[:, *np.tril_indices(4)] if causal else weights
        np.testing.assert_allclose(kept, shown.ravel(), rtol=0, atol=0.5001 / told["levels"])


@pytest.mark.parametrize("many", [False, True])
def test_queries_and_keys_are_packed_to_the_precision_that_the_page_tells(many, monkeypatch):
    if many:
        monkeypatch.setattr("gptjax.plots.attention_view.FEW", 10)
    given = part(columns=CHINESE, heads=4, key_heads=2)
    assert given.key is not None
    given.key[0, 0, 0] = 0  # Of a vector of zeros there is no largest number.
    page = AttentionView([given]).html
    told = header(page)["parts"][0]
    levels = told["vectorLevels"]
    assert levels == (127 if many else 32767)
    assert (told["width"], told["keyHeads"]) == (8, 2)
    for name, vectors in (("query", given.query), ("key", given.key)):
        assert vectors is not None
        for layer, truth in enumerate(vectors):
            content = unpacked(page, f"{name}-0-{layer}")
            count = 4 * truth[..., 0].size
            scales = np.frombuffer(content[:count], "<f4").reshape(*truth.shape[:2], 1)
            np.testing.assert_array_equal(scales, np.abs(truth).max(-1, keepdims=True))
            kept = (numbers(content[count:]).reshape(truth.shape) - levels) * scales / levels
            assert np.all(np.abs(kept - truth) <= 0.5001 * scales / levels)


def test_the_page_is_whole_and_names_no_other():
    page = AttentionView([part(), part(ODD, name="odd")], title="<b>&\"a'").html
    assert not re.search(r"https?:|//[a-z]+\.", page)
    assert "<title>&lt;b&gt;&amp;&quot;a&#x27;</title>" in page
    assert "default-src 'none'" in page
    assert page.count("<script") == page.count("</script>") == 2 + 2 * (1 + 1 + 1) * 2
    assert "$" not in re.sub(r"<script type=\"module\">.*</script>", "", page, flags=re.DOTALL)
    assert header(page)["parts"][1]["rows"] == ODD
    assert {path.name for path in PAGE.iterdir()} == {*SCRIPTS, "page.html", "page.css"}


def test_without_queries_and_keys_there_is_no_neuron_view():
    page = AttentionView([part()._replace(query=None, key=None)]).html
    assert header(page)["parts"][0]["width"] == 0
    assert 'id="query-0-0"' not in page


def test_layers_and_heads_keep_their_numbers_in_the_model():
    told = header(AttentionView([part()._replace(layers=[3, 7], heads=(0, 5, 2))]).html)["parts"][0]
    assert (told["layers"], told["heads"]) == ([3, 7], [0, 5, 2])


BAD_PARTS = {
    "no part": (None, "An attention view needs at least one part."),
    "tokens": (part()._replace(rows=["a"]), r"attention are \[2, 3, 4, 4\].*here \[L, N, 1, 4\]\."),
    "no layer": (part()._replace(weights=np.zeros((0, 3, 4, 4))), r"are \[0, 3, 4, 4\]"),
    "NaN": (part()._replace(weights=np.full((2, 3, 4, 4), np.nan)), "not all from 0 to 1"),
    "above 1": (part()._replace(weights=np.full((2, 3, 4, 4), 1.1)), "not all from 0 to 1"),
    "below 0": (part()._replace(weights=np.full((2, 3, 4, 4), -0.1)), "not all from 0 to 1"),
    "layers": (part()._replace(layers=[1]), "names 1 layers of 2"),
    "heads": (part()._replace(heads=[1]), "names 1 heads of 3"),
    "windows": (part()._replace(windows=[1]), "names 1 windows of 2"),
    "next tokens": (part()._replace(next_tokens=[[]]), "names 1 next tokens of 4"),
    "query alone": (part()._replace(key=None), "has a query or a key: the neuron view needs both"),
    "key heads": (part()._replace(key=np.zeros((2, 4, 2, 8))), r"\[2, 4, 2, 8\]"),
    "width": (part()._replace(key=np.zeros((2, 4, 3, 7))), r"\[2, 4, 3, 7\]"),
    "axes": (part()._replace(query=np.zeros((2, 4, 3))), r"\[2, 4, 3\]"),
    "infinite": (part()._replace(key=np.full((2, 4, 3, 8), np.inf)), "are not all finite"),
}


@pytest.mark.parametrize(("bad", "sentence"), BAD_PARTS.values(), ids=BAD_PARTS.keys())
def test_arrays_that_do_not_fit_are_one_sentence(bad, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        AttentionView([] if bad is None else [bad])
    assert str(caught.value).endswith(".")


def test_saving_overwrites_only_when_told(tmp_path):
    view, path = AttentionView([part()]), tmp_path / "a.html"
    view.save(path)
    assert path.read_text(encoding="utf-8") == view.html
    path.write_text("mine")
    with pytest.raises(InputError, match=r"a\.html already exists: choose another"):
        view.save(path)
    assert path.read_text() == "mine"
    view.save(str(path), overwrite=True)
    assert path.read_text(encoding="utf-8") == view.html
    for bad, sentence in (
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "a.html", "there is no directory"),
        (path / "a.html", "there is no directory"),
    ):
        with pytest.raises(InputError, match=sentence):
            view.save(bad, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_page_that_is_not_whole_is_not_left(stopped, tmp_path, monkeypatch):
    write = Path.write_text

    def stop(path: Path, text: str, **how: Any) -> None:
        write(path, text[:100], **how)
        raise stopped

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises((KeyboardInterrupt, InputError)) as caught:
        AttentionView([part()]).save(tmp_path / "a.html")
    assert not list(tmp_path.iterdir())
    if caught.type is InputError:
        assert str(caught.value).endswith("a.html: No space left on device.")


@needs_chromium
@pytest.mark.large
def test_a_page_of_512_tokens_and_144_heads_is_small_and_timed():
    command = [sys.executable, EXPERIMENTS / "benchmarks" / "attention_page.py", "--events", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    size = re.search(r"([\d.]+) MB", ended.stdout)
    assert size
    assert float(size[1]) < 40
    assert re.search(r"drawn after [\d.]+ s", ended.stdout)
    assert ended.stdout.count(" view") + ended.stdout.count("| heat map") >= 6


@pytest.mark.parametrize("flag", ["tokens", "events"])
def test_a_page_without_anything_to_time_is_refused(flag, monkeypatch):
    pytest.importorskip("playwright.sync_api")
    monkeypatch.syspath_prepend(EXPERIMENTS / "benchmarks")
    script = importlib.import_module("attention_page")
    with pytest.raises(InputError, match=f"--{flag} is 0: it must be at least 1"):
        script.main(**{flag: 0})


# What follows is asked of the page in a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, tmp_path) -> Iterator[Any]:
    """Opens a view; at the end, the browser has complained of nothing and asked for nothing."""
    said, asked, pages = [], [], []

    def open_view(view: AttentionView | str, words: str = "", **context: Any) -> Any:
        page = browser.new_page(**{"viewport": {"width": 1000, "height": 700}, **context})
        pages.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(view if isinstance(view, str) else view.html, encoding="utf-8")
        page.goto(f"file://{path}#{words}")
        frame = page.frames[-1]
        frame.wait_for_selector("#stage[data-unpacked]")
        return frame

    yield open_view
    for page in pages:
        page.close()
    assert said == []
    outside = {url.partition("#")[0] for url in asked if not url.startswith("data:")}
    assert outside <= {
        *(f"file://{tmp_path}/{number + 1}.html" for number in range(len(pages))),
        "about:srcdoc",
    }


def settle(frame: Any) -> None:
    frame.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")


def picture(frame: Any) -> np.ndarray:
    """The canvas [height, width, 3], once it stays as it is."""
    frame.wait_for_selector("#stage[data-drawn]")
    before, now = np.empty(0), _canvas(frame)
    while not np.array_equal(before, now):
        before, now = now, _canvas(frame)
    return now


def _canvas(frame: Any) -> np.ndarray:
    settle(frame)
    width, height, data = frame.evaluate("""() => {
      const { width, height } = document.getElementById("canvas");
      const copy = new OffscreenCanvas(width, height);
      const context = copy.getContext("2d", { willReadFrequently: true });
      context.drawImage(document.getElementById("canvas"), 0, 0);
      const { data } = context.getImageData(0, 0, width, height);
      let text = "";
      for (let at = 0; at < data.length; at += 8192)
        text += String.fromCharCode(...data.subarray(at, at + 8192));
      return [width, height, btoa(text)];
    }""")
    pixels = np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)
    return pixels[..., :3].astype(int)


def colours(pixels: np.ndarray) -> int:
    return len(np.unique(pixels @ [1, 1 << 8, 1 << 16]))


def tips(frame: Any, step: int = 9) -> dict[str, tuple[float, float]]:
    """What the tooltip says where, anywhere on the canvas; then the mouse leaves."""
    return frame.evaluate(
        """(step) => {
      const canvas = document.getElementById("canvas"), tip = document.getElementById("tip");
      const box = canvas.getBoundingClientRect(), found = {};
      const move = (kind, clientX, clientY) =>
        canvas.dispatchEvent(new MouseEvent(kind, { clientX, clientY, bubbles: true }));
      for (let y = box.top + 4; y < box.bottom; y += step)
        for (let x = box.left + 4; x < box.right; x += step) {
          move("mousemove", x, y);
          const lines = [...tip.children].map((line) => line.textContent);
          if (!tip.hidden) found[lines.join("\\n")] ??= [x, y];
        }
      move("mouseleave", 0, 0);
      return found;
    }""",
        step,
    )


def state(frame: Any) -> dict[str, str]:
    return dict(word.split("=") for word in frame.evaluate("location.hash.slice(1)").split("&"))


def chip(frame: Any, group: str, text: str) -> Any:
    return frame.locator(f"#{group} button", has_text=re.compile(f"^{text}$"))


@pytest.mark.slow
@needs_chromium
def test_every_view_draws_and_none_is_another(opened):
    frame = opened(AttentionView([part()]))
    assert len(re.findall(r"\w+", frame.inner_text("#meaning"))) == 7
    assert "0.000008" in frame.inner_text("#precision")
    seen = {}
    for name in ("Head view", "Model view", "Heat map", "Neuron view"):
        frame.get_by_role("tab", name=name).click()
        seen[name] = picture(frame)
        assert colours(seen[name]) > 30
        assert frame.get_attribute("#canvas", "aria-label").startswith(name)
        assert frame.get_by_role("tab", name=name).get_attribute("aria-selected") == "true"
    pictures = [pixels.tobytes() for pixels in seen.values()]
    assert len(set(pictures)) == 4


@needs_chromium
def test_the_map_shows_each_weight_by_its_colour_and_its_number(opened):
    given = part()
    frame = opened(AttentionView([given]), "view=map&layer=1&head=2")
    found, pixels = tips(frame), picture(frame)
    top = frame.evaluate("document.getElementById('canvas').getBoundingClientRect().top")
    lightness = {}
    for t, s in np.ndindex(4, 4):
        weight = given.weights[1, 2, t, s]
        pair = f"{WORDS[t]} ({t}) attends to {WORDS[s]} ({s})\n"
        (tip,) = [tip for tip in found if tip.startswith(pair)]
        if s > t:
            assert tip == pair + "masked: a later token"
            continue  # It has no weight, and no colour of one.
        told = float(tip.removeprefix(pair + "weight "))
        assert told == pytest.approx(weight, abs=0.00005 + 0.000008)
        x, y = found[tip]
        lightness[weight] = pixels[int(y - top) + 4, int(x) + 4].sum()
    in_order = [lightness[weight] for weight in sorted(lightness)]
    assert in_order == sorted(in_order, reverse=True)
    assert in_order[0] > 740 > 250 > in_order[-1]


@pytest.mark.slow
@needs_chromium
def test_a_token_of_the_head_view_shows_its_own_lines_and_a_click_keeps_them(opened):
    given = part()
    frame = opened(AttentionView([given]), "shown=0,2")
    plain, found = picture(frame), tips(frame)
    (place,) = [at for tip, at in found.items() if tip.startswith("·sat (2) attends most to\n")]
    frame.page.mouse.move(*place)
    assert not np.array_equal(picture(frame), plain)
    most = max((given.weights[0, head, 2, s], s, head) for head in (0, 2) for s in range(3))
    told = f"{most[0]:.4f} {WORDS[most[1]]} ({most[1]}), head {most[2]}"
    assert frame.locator("#tip div").nth(1).inner_text() == told
    frame.page.mouse.click(*place)
    frame.page.mouse.move(2, 2)
    kept = picture(frame)
    assert not np.array_equal(kept, plain)
    assert state(frame)["token"] == "2"
    exact = {f"head {head}: {given.weights[0, head, 2, 1]:.4f}" for head in (0, 2)}
    (pair,) = [tip for tip in tips(frame) if tip.startswith("·sat (2) attends to ·cat (1)\n")]
    assert set(pair.split("\n")[1:]) == exact
    frame.page.keyboard.press("Escape")
    assert "token" not in state(frame)
    assert np.array_equal(picture(frame), plain)


@pytest.mark.slow
@needs_chromium
def test_clicks_choose_heads_and_layers_and_the_address_keeps_them(opened):
    view = AttentionView([part()._replace(layers=[4, 9], heads=[0, 5, 7])])
    frame = opened(view)
    pictures = [picture(frame)]
    for group, text, shown in (
        ("heads", "5", "0,1"),
        ("heads", "7", "0,1,2"),
        ("heads", "0", "1,2"),
        ("layers", "9", "1,2"),
    ):
        chip(frame, group, text).click()
        assert state(frame)["shown"].replace("%2C", ",") == shown
        pictures.append(picture(frame))
    assert len({pixels.tobytes() for pixels in pictures}) == 5
    assert state(frame)["layer"] == "1"
    again = opened(view, frame.evaluate("location.hash.slice(1)"))
    assert np.array_equal(picture(again), pictures[-1])
    chip(again, "heads", "all").click()
    assert state(again)["shown"].replace("%2C", ",") == "0,1,2"
    chip(again, "heads", "one").click()
    assert len(again.locator("#heads [aria-pressed=true]").all()) == 1


@needs_chromium
def test_nonsense_in_the_address_is_passed_over(opened):
    words = "view=zebra&layer=9&head=-1&shown=0,99,x&token=1e9&scale=%3Cb%3E&part=7"
    frame = opened(AttentionView([part()]), words)
    assert state(frame) == {
        "view": "heads", "part": "0", "layer": "0", "head": "0", "shown": "0", "scale": "one",
        "zoom": "false",
    }  # fmt: skip


@needs_chromium
def test_the_keyboard_reaches_all(opened):
    frame = opened(AttentionView([part()]))
    keyboard = frame.page.keyboard
    for keys, expected in (
        (["ArrowRight", "ArrowRight", "ArrowRight"], {"head": "2", "shown": "2"}),
        (["ArrowLeft"], {"head": "1"}),
        (["ArrowDown"], {"layer": "1"}),
        (["ArrowUp"], {"layer": "0"}),
        (["Shift+ArrowDown", "Shift+ArrowDown"], {"token": "1"}),
        (["Shift+ArrowUp"], {"token": "0"}),
        (["2"], {"view": "model"}),
        (["4"], {"view": "neurons"}),
    ):
        for key in keys:
            keyboard.press(key)
        assert expected.items() <= state(frame).items()
    keyboard.press("1")
    keyboard.press("Shift+ArrowDown")
    assert frame.locator("#tip div").first.inner_text() == "·cat (1) attends most to"
    keyboard.press("Shift+ArrowUp")
    keyboard.press("4")
    frame.locator("#token").focus()
    keyboard.press("ArrowRight")  # Of the slider, not of the page.
    assert state(frame)["token"] == "1"
    assert state(frame)["head"] == "1"


@pytest.mark.slow
@needs_chromium
def test_a_picture_of_the_model_view_opens_its_head(opened):
    words = "view=map&layer=1&head=2"
    frame = opened(AttentionView([part()]), "view=model")
    found = tips(frame, 20)
    assert {tip.split("\n")[0] for tip in found} == {
        f"layer {layer}, head {head}" for layer in range(2) for head in range(3)
    }
    place = found["layer 1, head 2\nclick to open"]
    frame.page.mouse.move(*place)
    picture(frame)  # With its frame, twice as wide as that of the map.
    frame.page.mouse.click(*place)
    assert {"view": "map", "layer": "1", "head": "2"}.items() <= state(frame).items()
    frame.page.mouse.move(2, 2)
    shown = picture(frame)
    assert np.array_equal(shown, picture(opened(AttentionView([part()]), words)))


@pytest.mark.slow
@needs_chromium
def test_the_neuron_view_adds_up_to_the_score(opened):
    given = part(columns=CHINESE, heads=4, key_heads=2, name="cross")
    assert given.query is not None
    assert given.key is not None
    frame = opened(AttentionView([part(), given]), "view=neurons&part=1&layer=1&head=3&token=2")
    query, key = given.query[1, 2, 3], given.key[1, 5, 1]
    found = tips(frame, 7)
    told = [f"·sat (2) attends to {CHINESE[5]} (5)"]
    sums = [f"sum of all 8 products: {query @ key:.3f}", f"weight {given.weights[1, 3, 2, 5]:.4f}"]
    for channel in range(8):
        q, k = query[channel], key[channel]
        product = f"channel {channel}: q {q:.3f} × k {k:.3f} = {q * k:.3f}"
        assert "\n".join([*told, product, *sums]) in found
    before = picture(frame)
    frame.locator("#token").fill("0")
    assert frame.inner_text("#token-text") == "The (0)"
    assert not np.array_equal(picture(frame), before)
    chip(frame, "parts", "attention").click()
    assert state(frame)["part"] == "0"
    assert colours(picture(frame)) > 30


@needs_chromium
def test_the_scale_may_be_each_rows_own(opened):
    flat = part()._replace(weights=np.full((1, 1, 4, 4), 0.25), query=None, key=None)
    frame = opened(AttentionView([flat]), "view=map")
    assert frame.get_by_role("tab").count() == 3
    faint = picture(frame)
    chip(frame, "most", "row's largest").click()
    assert picture(frame).sum() < faint.sum()


@needs_chromium
def test_tokens_are_text_whatever_they_say(opened):
    frame = opened(AttentionView([part(ODD), part(CHINESE, name="b")], title=ODD[0]), "view=map")
    found = "\n".join(tips(frame, 14))
    for number, token in enumerate(ODD):
        assert f"{token[:80]} ({number}) attends to" in found
    for view in ("heads", "neurons", "model"):
        frame.evaluate(f"location.hash = 'view={view}&token=4'")
        assert colours(picture(frame)) > 30
    assert frame.inner_text("h1") == ODD[0]
    assert frame.evaluate("window.broken") is None
    assert frame.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_carries_the_glyphs_of_its_chinese_tokens_alone():
    assert "@font-face" not in AttentionView([part(ODD[:6])]).html
    page = AttentionView([part(), part(CHINESE, name="b")], title="律").html
    found = re.search(r"data:font/woff;base64,([^\"]*)", page)
    assert found
    font = TTFont(io.BytesIO(base64.b64decode(found[1])))
    assert {chr(code) for code in font.getBestCmap() or ()} == {*CHINESE, "律"}
    assert len(found[1]) < 20_000


@needs_chromium
def test_chinese_tokens_are_no_boxes(opened):
    frame = opened(AttentionView([part(CHINESE)]))
    assert frame.evaluate("[...document.fonts].map((face) => face.status)") == ["loaded"]
    drawn = frame.evaluate(
        """(characters) => characters.map((character) => {
      const context = new OffscreenCanvas(40, 40).getContext("2d");
      context.font = `30px ${getComputedStyle(document.body).fontFamily}`;
      context.fillText(character, 4, 30);
      return context.getImageData(0, 0, 40, 40).data.join();
    })""",
        CHINESE,
    )
    assert len(set(drawn)) == len(set(CHINESE))  # One box is as the other.


@needs_chromium
def test_the_page_is_dark_where_the_reader_is_and_fits_a_narrow_frame(opened):
    narrow = {"width": 700, "height": 480}
    frame = opened(AttentionView([part(CHINESE)]), color_scheme="dark", viewport=narrow)
    assert picture(frame)[0, 0].max() < 60
    assert frame.evaluate("document.documentElement.scrollWidth") == 700
    frame.get_by_role("button", name="Light or dark").click()
    assert picture(frame)[0, 0].min() > 240


@needs_chromium
def test_a_notebook_shows_the_page_in_a_frame(opened):
    shown = AttentionView([part(ODD)], title='a "title"')._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert html.unescape(shown[16 : shown.index('" title=')]).startswith("<!doctype html>")
    frame = opened(f"<!doctype html><body>{shown}</body>")
    assert frame.url == "about:srcdoc"
    plain = picture(frame)
    assert colours(plain) > 30
    chip(frame, "layers", "1").click()
    assert not np.array_equal(picture(frame), plain)


FOLLOWING = [[("·fish", 0.75), ("·dog", 0.125)]] * 4


@pytest.mark.slow
@needs_chromium
def test_what_comes_next_is_shown_with_its_probability_in_every_view(opened):
    frame = opened(AttentionView([part()._replace(next_tokens=FOLLOWING)]), "view=heads")
    expected = "next: ·fish 75.0%, ·dog 12.5%"
    (tip,) = [tip for tip in tips(frame) if tip.startswith("·sat (2) attends most to")]
    assert tip.split("\n")[-1] == expected
    for view, begin in (("map", "·sat (2) attends to"), ("neurons", "·down (3) attends to")):
        frame.evaluate(f"location.hash = 'view={view}'")
        picture(frame)
        found = [tip for tip in tips(frame) if tip.startswith(begin)]
        assert found
        assert {tip.split("\n")[-1] for tip in found} == {expected}
    assert not any("next" in tip for tip in tips(opened(AttentionView([part()]), "view=map")))


def test_the_likeliest_tokens_come_first_with_their_probabilities():
    logits = np.log([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]]) + 1000
    found = likeliest(logits, lambda token: "abc"[token], count=2)
    assert [[label for label, _ in place] for place in found] == [["b", "c"], ["a", "b"]]
    shares = [[share for _, share in place] for place in found]
    np.testing.assert_allclose(shares, [[0.6, 0.3], [0.5, 0.25]])


def test_next_tokens_of_512_places_take_little_of_a_page():
    words = [f"word{number}" for number in range(512)]
    small = part(words, layers=1, heads=1)._replace(query=None, key=None)
    following = likeliest(np.random.default_rng(0).normal(size=(512, 512)), lambda t: words[t])
    larger = small._replace(next_tokens=following)
    grown = len(AttentionView([larger]).html) - len(AttentionView([small]).html)
    assert 0 < grown < 60_000


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_a_mask_hides_looks_like_no_weight(theme, opened):
    given = part()
    weights = np.broadcast_to(np.eye(4), (2, 3, 4, 4)).copy()
    weights[:, :, 3, 3], weights[:, :, 3, 2] = 0, 1
    windows = (3, 0)  # In the first layer, the first token is hidden from the last.
    view = AttentionView([given._replace(weights=weights, windows=windows, query=None, key=None)])
    frame = opened(view, "view=map", color_scheme=theme)
    found, pixels = tips(frame), picture(frame)
    top = frame.evaluate("document.getElementById('canvas').getBoundingClientRect().top")

    def cell(t: int, s: int) -> np.ndarray:
        pair = f"{WORDS[t]} ({t}) attends to {WORDS[s]} ({s})\n"
        (tip,) = [tip for tip in found if tip.startswith(pair)]
        x, y = found[tip]
        square = pixels[int(y - top) + 4 : int(y - top) + 22, int(x) + 4 : int(x) + 22]
        return square.reshape(-1, 3)

    assert len(np.unique(cell(2, 0), axis=0)) == 1  # A weight of 0 is one colour alone.
    for t, s in ((0, 1), (0, 3), (3, 0)):
        assert len(np.unique(cell(t, s), axis=0)) > 1
    assert any(tip.endswith("\nmasked: outside the window") for tip in found)
    assert frame.locator("#hidden").is_visible()
    chip(frame, "layers", "1").click()
    found, pixels = tips(frame), picture(frame)
    assert len(np.unique(cell(3, 0), axis=0)) == 1


@pytest.mark.slow
@needs_chromium
def test_the_header_speaks_of_the_colours_that_are_drawn(opened):
    frame = opened(AttentionView([part()]), "view=neurons")
    assert frame.inner_text("#meaning") == "Blue is above 0, orange below; bars: weights."
    assert frame.inner_text("#least") == "−largest"
    ends = frame.evaluate("""() => {
      const ramp = document.getElementById("ramp");
      const image = new OffscreenCanvas(96, 10).getContext("2d", { willReadFrequently: true });
      image.drawImage(ramp, 0, 0);
      return [0, ramp.width - 1].map((x) => [...image.getImageData(x, 4, 1, 1).data].slice(0, 3));
    }""")
    np.testing.assert_allclose(ends, np.rint(255 * diverging()[[0, -1]]), atol=1)
    drawn = {tuple(pixel) for pixel in picture(frame).reshape(-1, 3).tolist()}
    assert {tuple(end) for end in ends} <= drawn  # The largest query and key of their kind.
    frame.evaluate("location.hash = 'view=map'")
    picture(frame)
    assert frame.inner_text("#least") == "0"
    assert frame.inner_text("#meaning") == "Rows: queries; columns: keys; stronger: more."


def drawn_by(frame: Any, method: str) -> list[list[Any]]:
    """What a method of the canvas is called with while all is drawn anew, after the colour."""
    return frame.evaluate(
        """(method) => new Promise((done) => {
      const prototype = CanvasRenderingContext2D.prototype, plain = prototype[method], calls = [];
      prototype[method] = function (...given) {
        calls.push([this.fillStyle, ...given]);
        return plain.apply(this, given);
      };
      document.getElementById("stage").dispatchEvent(new Event("scroll"));
      requestAnimationFrame(() => setTimeout(() => {
        prototype[method] = plain;
        done(calls);
      }));
    })""",
        method,
    )


@needs_chromium
def test_bars_of_the_head_view_can_be_read(opened):
    given = part(heads=8)
    frame = opened(AttentionView([given]), "shown=0,1,2,3,4,5,6,7&token=3")
    picture(frame)
    palette = [
        "#0b5fa5",
        "#d97a00",
        "#0a8f6c",
        "#b04fa0",
        "#8a7400",
        "#4aa3df",
        "#c23b22",
        "#5b6478",
    ]
    bars = [call for call in drawn_by(frame, "fillRect") if call[0] in palette]
    assert len(bars) == 8 * 4
    assert {bar[3] for bar in bars} == {13}
    largest = given.weights[0, :, 3].max()
    heights = {(palette.index(bar[0]), bar[4]) for bar in bars}
    for head, s in np.ndindex(8, 4):
        expected = max(2, 18 * given.weights[0, head, 3, s] / largest)
        near = [height for of, height in heights if of == head]
        assert min(abs(height - expected) for height in near) < 0.01
    assert max(height for _, height in heights) == 18
    assert f"The longest bar is {largest:.4f}" in frame.inner_text("#caption")


@needs_chromium
def test_all_labels_of_an_axis_have_one_direction(opened):
    frame = opened(AttentionView([part(["a", "·a·very·long·one", "b", "c"])]), "view=map")
    picture(frame)
    angles = [angle for _, angle in drawn_by(frame, "rotate")]
    assert angles == [0] * 4 + [-np.pi / 2] * 4
    short = opened(AttentionView([part(CHINESE)]), "view=map")
    picture(short)
    assert {angle for _, angle in drawn_by(short, "rotate")} == {0}


@needs_chromium
@pytest.mark.parametrize("view", ["heads", "model", "map", "neurons"])
def test_a_telephone_shows_the_attention_and_all_of_its_columns(view, opened):
    narrow = {"width": 390, "height": 844}
    given = part([*WORDS, "·representation", "·of"] * 2, heads=12, layers=4, width=64)
    following = FOLLOWING[:1] * 12
    shown = AttentionView([given._replace(next_tokens=following)], title="A sentence of words " * 4)
    frame = opened(shown, f"view={view}&token=5", viewport=narrow)
    picture(frame)
    sizes = frame.evaluate("""() => ["header", "footer"].map((name) =>
      document.querySelector(name).offsetHeight)""")
    assert sum(sizes) < 844 / 3
    assert sizes[0] < 844 / 4
    assert frame.evaluate("[stage.scrollWidth, document.documentElement.scrollWidth]") == [390, 390]


def test_the_title_is_the_text_and_the_model_stands_below():
    page = AttentionView([part()], title="A cat <sat>", model="runs/<a>").html
    assert "<title>A cat &lt;sat&gt;</title>" in page
    assert '<bdi id="model">runs/&lt;a&gt;</bdi>' in page
