"""The attention view of a trained model on a text, as an HTML page or in a notebook cell."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from gptjax import probe
from gptjax.config import InputError, TransformerConfig
from gptjax.data.objectives.vocabulary import vocabulary
from gptjax.data.report import labels
from gptjax.data.tokenizers import Tokenizer, read_huggingface
from gptjax.huggingface import from_huggingface
from gptjax.huggingface.files import TOKENIZER, find
from gptjax.models.build import LanguageModel
from gptjax.plots.attention_view import AttentionPart, AttentionView, likeliest
from gptjax.runs.directory import CHECKPOINTS
from gptjax.runs.loading import Run, load_run
from gptjax.system.buckets import has

PARTS = {
    "decoder": ("decoder",),
    "encoder": ("encoder",),
    "encoder_decoder": ("decoder", "cross", "encoder"),
}
"""The attention parts of each family."""


def attention_view(
    model: Run | str | Path,
    text: str,
    *,
    target: str | None = None,
    part: Literal["decoder", "encoder", "cross"] | None = None,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
    step: int | None = None,
) -> AttentionView:
    """What each head attends to in a text; a notebook displays it, `save(path)` writes a page.

    Args:
      model: a loaded or trained run (`load_run`, `train`), or the directory of a run or of a
        Hugging Face model with its tokenizer.json.
      text: the input; of an encoder-decoder, the source.
      target: the target of an encoder-decoder.
      part: one of an encoder-decoder's attention parts; None is all.
      layers: numbers of layers, from 0; () is all.
      heads: numbers of heads, from 0; () is all.
      step: checkpoint of a run's directory; None is the best.

    Raises:
      InputError: no such model, part, layer or head, an LSTM, or a text that it cannot encode.
    """
    for name, given in (("text", text), ("target", target or "")):
        try:
            given.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{name} is {given!r}: it must be UTF-8.") from error
    loaded, tokenizer, title = _load(model, step)
    name = "the model" if isinstance(model, Run) else str(model)
    read = _read(name, loaded.config, tokenizer, text, target)
    known = PARTS[loaded.config.family]
    if part is not None and part not in known:
        raise InputError(
            f"part is {part!r}: {name} is of the family {loaded.config.family}, whose attention "
            f"is {' and '.join(known)} alone."
        )
    shown = _observe(loaded, read, known if part is None else (part,), layers, heads)
    return AttentionView(shown, text if target is None else f"{text} → {target}", title)


def _load(model: Run | str | Path, step: int | None) -> tuple[LanguageModel, Tokenizer, str]:
    """The model, its tokenizer, and its title."""
    if isinstance(model, Run):
        return model.model, model.tokenizer, f"the model at step {model.step}"
    if has(model, CHECKPOINTS):
        run = load_run(model, step)
        return run.model, run.tokenizer, f"{model}, step {run.step}"
    if step is not None:
        raise InputError(f"step is {step}: {model} is no run, and has no checkpoints.")
    directory = find(str(model))
    if not (directory / TOKENIZER).exists():
        raise InputError(f"{model} has no {TOKENIZER}, which is needed to encode text.")
    return from_huggingface(directory), read_huggingface(directory), str(model)


class _Side(NamedTuple):
    """One part of attention: its hook points, and the labels of its tokens."""

    prefix: str
    """Prefix of its hook points in `gptjax.layers.hooks`."""
    rows: list[str]
    """[T], labels of the queries."""
    columns: list[str]
    """[S], labels of the keys."""


class _Reading(NamedTuple):
    """An encoded text, with the labels of its tokens."""

    tokens: Int[np.ndarray, " T"]
    """Of an encoder-decoder, the target's."""
    source: Int[np.ndarray, " S"] | None
    """Of an encoder-decoder."""
    sides: dict[str, _Side]
    """By the names of `PARTS`."""
    label: Callable[[int], str]
    """The label of a token id."""


def _read(
    name: str, config: TransformerConfig, tokenizer: Tokenizer, text: str, target: str | None
) -> _Reading:
    """The text encoded as in training, with the special tokens of its family.

    Raises:
      InputError: no text, a model without attention, or a missing or unexpected target.
    """
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
        raise InputError(f"{name} was built without a token that begins or ends a text.")
    if family == "decoder":
        tokens, source = tokenizer.encode_prompt(text), None
    else:
        (source,) = tokenizer.encode_documents([text])
        source = np.append(source, words.needed("end"))
        (written,) = (source,) if target is None else tokenizer.encode_documents([target])
        tokens = np.insert(written, 0, words.needed("begin"))
    target_labels = labels(tokens, tokenizer, words)

    def label(token: int) -> str:
        return labels([token], tokenizer, words)[0] if token < words.size else f"[{token}]"

    if not pairs:
        sides = {family: _Side("", target_labels, target_labels)}
        return _Reading(tokens, None, sides, label)
    source_labels = labels(source, tokenizer, words)
    sides = {
        "decoder": _Side("", target_labels, target_labels),
        "cross": _Side("cross_", target_labels, source_labels),
        "encoder": _Side("encoder_", source_labels, source_labels),
    }
    return _Reading(tokens, source, sides, label)


def _observe(
    model: LanguageModel,
    read: _Reading,
    parts: Sequence[str],
    layers: Sequence[int],
    heads: Sequence[int],
) -> list[AttentionPart]:
    """The weights, queries and keys of the chosen layers and heads, for each part.

    A decoder's come with the likeliest next tokens.
    """
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
        if heads:  # Grouped keys are repeated, since some heads of a group may not be chosen.
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


def _window(config: TransformerConfig, part: str, layer: int) -> int:
    """The window of a layer's local attention, tokens; 0 if its attention is not local."""
    pattern = config.attention_pattern
    return config.window if part != "cross" and pattern[layer % len(pattern)] == "local" else 0


def _layers(config: TransformerConfig, part: str, chosen: Sequence[int]) -> list[int]:
    """The numbers of the layers to show.

    Raises:
      InputError: one that the part does not have, or whose keys are not single tokens.
    """
    depth = config.depth
    if part == "encoder" and config.encoder_depth:
        depth = config.encoder_depth
    _check_numbers("layers", chosen, depth)
    layers, pattern = list(chosen or range(depth)), config.attention_pattern
    plain = [n for n in range(depth) if pattern[n % len(pattern)] != "compressed"]
    if not set(layers) <= set(plain):
        raise InputError(
            "layers must be without compressed attention, whose keys are groups of tokens: "
            f"--layers {' '.join(map(str, plain))}."
        )
    return layers


def _check_numbers(name: str, numbers: Sequence[int], count: int) -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise InputError(f"{name} has {number}: the model's are 0 to {count - 1}.")
