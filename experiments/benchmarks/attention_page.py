"""Size of an attention page, and how fast a browser draws it.

    python experiments/benchmarks/attention_page.py

needs the extra `test` and Debian's `chromium`. The model is GPT-2 small with random weights, whose
diffuse attention is the worst case for compression. A mouse move or a click is timed from its event
until the canvas is painted, the wait for the display's next frame included; medians of 20
(`--events`), and maxima.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from flax import nnx
from playwright.sync_api import Page, sync_playwright

import gptjax
from gptjax import probe
from gptjax.cli import run_command
from gptjax.config import InputError
from gptjax.plots.attention_view import AttentionPart, AttentionView, likeliest

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
SETTINGS = {
    "head view, one head": "view=heads",
    "head view, all heads": "view=heads&shown={heads}",
    "model view": "view=model",
    "heat map": "view=map",
    "heat map, large cells": "view=map&zoom=true",
    "neuron view": "view=neurons",
}
PAINTED = """([selector, kind, x, y]) => new Promise((done) => {
  const canvas = document.getElementById("canvas"), begin = performance.now();
  const event = new MouseEvent(kind, { clientX: x, clientY: y, bubbles: true });
  document.querySelector(selector).dispatchEvent(event);
  requestAnimationFrame(() => {
    const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);  // Waits for all that was drawn.
    copy.getImageData(0, 0, 1, 1);
    done(performance.now() - begin);
  });
})"""


def view_of(preset: str, tokens: int) -> AttentionView:
    """Returns an untrained model's attention page of random tokens."""
    config = gptjax.preset(preset)
    model = gptjax.build(config, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens))
    logits, _, seen = probe.observe(model, ids, ("attention", "query", "key"))
    weights, query, key = (np.asarray(seen[name])[:, 0] for name in ("attention", "query", "key"))
    names = [f"token {number}" for number in ids[0]]
    expected = likeliest(np.asarray(logits)[0], lambda token: f"token {token}")
    part = AttentionPart("attention", names, names, weights, query, key, next_tokens=expected)
    return AttentionView([part], " ".join(names[:12]), preset)


def seconds_to_draw(page: Page, path: Path) -> tuple[float, float]:
    """Returns seconds until the first layer is drawn, and until all layers are unpacked."""
    begin = time.perf_counter()
    page.goto(f"file://{path}", wait_until="commit")
    page.wait_for_selector("#stage[data-drawn]")
    drawn = time.perf_counter() - begin
    page.wait_for_selector("#stage[data-unpacked]")
    return drawn, time.perf_counter() - begin


def milliseconds(page: Page, selector: str, kind: str, events: int) -> str:
    """Returns the median and the maximum over events at positions on the canvas."""
    places = [(300 + 31 * (n % 7), 150 + 23 * (n % 20)) for n in range(events)]
    taken = [
        page.evaluate(PAINTED, [selector.format(n % 5 + 1), kind, *place])
        for n, place in enumerate(places)
    ]
    return f"{statistics.median(taken):.0f} ({max(taken):.0f})"


def main(preset: str = "gpt2", tokens: int = 512, events: int = 20) -> None:
    """Print the figures.

    Args:
      preset: The model's shape.
      tokens: Length of the text.
      events: Moves and clicks that are timed, of each kind.

    Raises:
      InputError: less than one token or event, or an unknown preset.
    """
    for name, value in (("tokens", tokens), ("events", events)):
        if value < 1:
            raise InputError(f"--{name} is {value}: it must be at least 1.")
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        view, path = view_of(preset, tokens), Path(directory) / "page.html"
        begin = time.perf_counter()
        view.save(path)
        written = time.perf_counter() - begin
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        drawn, unpacked = seconds_to_draw(page, path)
        print(f"Chromium {browser.version}, {preset}, {tokens} tokens")
        print(f"{path.stat().st_size / 1e6:.1f} MB, written in {written:.1f} s")
        print(f"drawn after {drawn:.2f} s, all layers unpacked after {unpacked:.2f} s\n")
        print(
            "| view | mouse moved, ms | token clicked, ms | layer clicked, ms |\n|---|---|---|---|"
        )
        heads = ",".join(map(str, range(view.parts[0].weights.shape[1])))
        for name, words in SETTINGS.items():
            shown = words.format(heads=heads)

            def timed(selector: str, kind: str, shown: str = shown) -> str:
                page.goto(f"file://{path}#{shown}")  # Back to the view, if a click has left it.
                page.wait_for_timeout(300)
                return milliseconds(page, selector, kind, events)

            layers = timed("#layers button:nth-child({})", "click")
            moved, clicked = timed("#canvas", "mousemove"), timed("#canvas", "click")
            print(f"| {name} | {moved} | {clicked} | {layers} |", flush=True)
        browser.close()


if __name__ == "__main__":
    run_command(main, __doc__)
