"""The command that shows what a model's heads look at."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from gptjax.config import InputError
from gptjax.system.outputs import check_output

if TYPE_CHECKING:  # JAX starts only once the arguments are found to be right.
    import numpy as np

    from gptjax.plots.attention_view import AttentionPart

PARTS = {
    "decoder": ("decoder",),
    "encoder": ("encoder",),
    "encoder_decoder": ("decoder", "cross", "encoder"),
}
"""The kinds of attention of each family."""


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
    from gptjax.plots.attention_view import AttentionView

    check_output(html, overwrite=overwrite)
    for name, given in (("text", text), ("target", target or "")):
        try:
            given.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{name} is {given!r}: it must be UTF-8.") from error
    loaded, tokenizer, name = _load(model, step)
    read = _read(model, loaded.config, tokenizer, text, target)
    known = PARTS[loaded.config.family]
    if part is not None and part not in known:
        raise InputError(
            f"part is {part!r}: {model} is of the family {loaded.config.family}, whose attention "
            f"is {' and '.join(known)} alone."
        )
    shown = _observe(loaded, read, known if part is None else (part,), layers, heads)
    sentence = text if target is None else f"{text} → {target}"
    AttentionView(shown, sentence, name).save(html, overwrite=overwrite)
    print(f"{html} is the attention of {name}.")


def _load(name: str, step: int | None) -> tuple[Any, Any, str]:
    """The model, its tokenizer, and what it is called."""
    from gptjax.data.tokenizers import read_huggingface
    from gptjax.huggingface import from_huggingface
    from gptjax.huggingface.files import TOKENIZER, find
    from gptjax.runs.directory import CHECKPOINTS, load_run

    if (Path(name) / CHECKPOINTS).is_dir():
        run = load_run(name, step)
        return run.model, run.tokenizer, f"{name}, step {run.step}"
    if step is not None:
        raise InputError(f"step is {step}: {name} is no run, and has no checkpoints.")
    directory = find(name)
    if not (directory / TOKENIZER).exists():
        raise InputError(f"{name} has no {TOKENIZER}, which says what its tokens are.")
    return from_huggingface(directory), read_huggingface(directory), name


class _Side(NamedTuple):
    """One kind of attention: where the model shows it, and between what."""

    prefix: str
    """Of its places in `gptjax.layers.hooks`."""
    rows: list[str]
    """[T], the tokens that look."""
    columns: list[str]
    """[S], those that are looked at."""


class _Reading(NamedTuple):
    """A text as the model is given it."""

    tokens: "np.ndarray"
    """[T]."""
    source: "np.ndarray | None"
    """[S], of an encoder-decoder, whose tokens are then the target's."""
    sides: dict[str, _Side]
    """By the names of `PARTS`."""
    label: Callable[[int], str]
    """What a token is called."""


def _read(name: str, config: Any, tokenizer: Any, text: str, target: str | None) -> _Reading:
    """The text as the model was given texts when it was trained.

    Raises:
      InputError: no text, a model that looks at none, or a target too few or too many.
    """
    import numpy as np

    from gptjax.data.objectives.vocabulary import vocabulary
    from gptjax.data.report import labels

    family = config.family
    if family not in PARTS:
        raise InputError(f"{name} is of the family {family}, which has no attention.")
    if not text:
        raise InputError("text is empty: it needs at least one token.")
    pairs = family == "encoder_decoder"
    if pairs != (target is not None):
        fits = "needs a --target too" if pairs else "takes no --target"
        raise InputError(f"{name} is of the family {family}, which {fits}.")
    words = vocabulary(tokenizer, () if family == "decoder" else ("begin", "end"))
    if words.size > max(config.vocab_size, tokenizer.vocab_size):
        raise InputError(f"{name} was made without a token that begins or ends a text.")
    if family == "decoder":
        tokens, source = tokenizer.encode_prompt(text), None
    else:
        (source,) = tokenizer.encode_documents([text])
        source = np.append(source, words.needed("end"))
        (written,) = tokenizer.encode_documents([target]) if pairs else (source,)
        tokens = np.insert(written, 0, words.needed("begin"))
    said = labels(tokens, tokenizer, words)

    def label(token: int) -> str:
        return labels([token], tokenizer, words)[0] if token < words.size else f"[{token}]"

    if not pairs:
        return _Reading(tokens, None, {family: _Side("", said, said)}, label)
    heard = labels(source, tokenizer, words)
    sides = {
        "decoder": _Side("", said, said),
        "cross": _Side("cross_", said, heard),
        "encoder": _Side("encoder_", heard, heard),
    }
    return _Reading(tokens, source, sides, label)


def _observe(
    model: Any, read: _Reading, parts: Sequence[str], layers: Sequence[int], heads: Sequence[int]
) -> list["AttentionPart"]:
    """The weights, queries and keys of the chosen layers and heads, of each part.

    A decoder's have the likeliest next tokens beside them.
    """
    import numpy as np

    from gptjax import probe
    from gptjax.plots.attention_view import AttentionPart, likeliest

    names = ("attention", "query", "key")
    its_layers = {part: _layers(model.config, part, layers) for part in parts}
    _check_numbers("heads", heads, model.config.heads)
    source = None if read.source is None else read.source[None]
    hook_points = [read.sides[part].prefix + name for part in parts for name in names]
    logits, _, captured = probe.observe(model, read.tokens[None], hook_points, source=source)
    expected = likeliest(np.asarray(logits)[0], read.label)
    its_heads = list(heads or range(model.config.heads))
    shown = []
    for part, numbers in its_layers.items():
        prefix, rows, columns = read.sides[part]
        weights, query, key = (
            np.asarray(captured[prefix + name])[numbers, 0].astype(np.float32) for name in names
        )
        if heads:  # Of grouped heads, some may not have been chosen: each takes its key along.
            key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)[:, :, its_heads]
        weights, query = weights[:, its_heads], query[:, :, its_heads]
        kind = part if len(read.sides) > 1 else "attention"
        windows = [_window(model.config, part, number) for number in numbers]
        shown.append(
            AttentionPart(
                kind,
                rows,
                columns,
                weights,
                query,
                key,
                numbers,
                its_heads,
                windows,
                None if part == "encoder" else expected,
            )
        )
    return shown


def _window(config: Any, part: str, layer: int) -> int:
    """The distance from which on the mask of a layer hides keys; 0 if from none."""
    pattern = config.attention_pattern
    return config.window if part != "cross" and pattern[layer % len(pattern)] == "local" else 0


def _layers(config: Any, part: str, chosen: Sequence[int]) -> list[int]:
    """The numbers of the layers that are shown.

    Raises:
      InputError: one that the part does not have, or whose columns are no tokens.
    """
    depth = config.depth
    if part == "encoder" and config.encoder_depth:
        depth = config.encoder_depth
    _check_numbers("layers", chosen, depth)
    layers, pattern = list(chosen or range(depth)), config.attention_pattern
    plain = [n for n in range(depth) if pattern[n % len(pattern)] != "compressed"]
    if not set(layers) <= set(plain):
        raise InputError(
            "layers must be without compressed attention, which looks at groups of tokens: "
            f"--layers {' '.join(map(str, plain))}."
        )
    return layers


def _check_numbers(name: str, numbers: Sequence[int], count: int) -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise InputError(f"{name} has {number}: the model's are 0 to {count - 1}.")
