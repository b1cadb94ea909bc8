"""The `attention` command: what a model's heads attend to."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptjax.system.buckets import url_of
from gptjax.system.outputs import check_output


def attention(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    /,
    text: str,
    html: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    target: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None,
    part: Literal["decoder", "encoder", "cross"] | None = None,
    layers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (),
    heads: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (),
    step: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None,
    overwrite: bool = False,
) -> None:
    """Write a page that shows what each head attends to in a text; it needs no network.

    Args:
      model: Directory of a run or of a Hugging Face model with its tokenizer.json.
      text: What the model reads; of an encoder-decoder, the source.
      html: The page.
      target: What an encoder-decoder writes.
      part: One kind of an encoder-decoder's attention; all by default.
      layers: Numbers of layers, from 0; all by default.
      heads: Numbers of heads, from 0; all by default.
      step: Checkpoint of the run; the best by default.
      overwrite: Replace the page that is there.
    """
    from gptjax.notebook.attention import attention_view

    check_output(html, overwrite=overwrite)
    view = attention_view(
        model, text, target=target, part=part, layers=layers, heads=heads, step=step
    )
    view.save(html, overwrite=overwrite)
    print(f"{url_of(html) or html} is the attention of {view.model}.")
