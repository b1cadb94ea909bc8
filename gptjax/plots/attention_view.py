"""Attention weights as one self-contained HTML page, for a browser or a notebook cell.

| view | what it shows |
|---|---|
| head view | tokens in two columns, with lines from each query to its keys |
| model view | every head of every layer, small |
| heat map | one head, tokens on both axes |
| neuron view | the products of a query with its keys, channel by channel |

The page's source is in attention_page/. Its data is embedded: quantised to 16 bits, deflated, for
causal attention only the lower triangle; the browser unpacks a layer when it is shown.
"""

import base64
import dataclasses
import functools
import html
import io
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import noto_cjk_sans_otc
import numpy as np
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTCollection

from gptjax.config import InputError
from gptjax.plots.colours import diverging, sequential
from gptjax.system.outputs import write_whole

PAGE = Path(__file__).parent / "attention_page"
SCRIPTS = (
    "payload.js",
    "colours.js",
    "text.js",
    "heads_view.js",
    "map_views.js",
    "neurons_view.js",
    "page.js",
)
"""Concatenated in this order."""

FEW = 1 << 22
"""Up to this many numbers of a kind are stored at the finer of the two precisions below."""
WEIGHT_LEVELS = (65535, 16383)
"""Quantisation steps from 0 to 1 for few weights, and for many."""
VECTOR_LEVELS = (32767, 127)
"""Quantisation steps from 0 to a query's or key's largest number, for few numbers and for many."""
FONT = "Noto Sans CJK SC"
FIRST_CJK = "\u2e80"
"""First of the characters for which a browser may have no font."""
FRAME_HEIGHT = 680
"""Height of the frame in a notebook, pixels."""


class AttentionPart(NamedTuple):
    """One kind of a model's attention in one text."""

    name: str
    """Its kind: "decoder", "encoder" or "cross"; "attention" if there is one kind."""
    rows: Sequence[str]
    """[T], the queries' tokens as labels (`plots.token_label`)."""
    columns: Sequence[str]
    """[S], the keys' tokens."""
    weights: np.ndarray
    """[L, N, T, S], each from 0 to 1."""
    query: np.ndarray | None = None
    """[L, T, N, H]; None leaves out the neuron view."""
    key: np.ndarray | None = None
    """[L, S, K, H], where K divides N."""
    layers: Sequence[int] | None = None
    """[L], the layers' numbers in the model; None counts from 0."""
    heads: Sequence[int] | None = None
    """[N], likewise."""
    windows: Sequence[int] | None = None
    """[L], windows of local attention: keys at this distance and more are masked; 0 masks none.
    None if no layer is local. A causal mask is inferred from the weights."""
    next_tokens: Sequence[Sequence[tuple[str, float]]] | None = None
    """[T], the most likely next tokens after each query, with their probabilities (`likeliest`)."""


@dataclasses.dataclass(frozen=True)
class AttentionView:
    """The attention page of one text; a notebook displays it as a cell's result.

    Raises:
      InputError: arrays of inconsistent shapes, or weights outside 0 to 1.
    """

    parts: Sequence[AttentionPart]
    title: str = "Attention"
    """The text."""
    model: str = ""
    """The model's name, shown at the bottom."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("An attention view needs at least one part.")
        for part in self.parts:
            _check(part)

    @functools.cached_property
    def html(self) -> str:
        """The whole page."""
        packed = [_pack(part, index) for index, part in enumerate(self.parts)]
        header = {"parts": [header for header, _ in packed], "ramps": _ramps()}
        return Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
            title=html.escape(self.title),
            model=html.escape(self.model),
            style=self._font() + (PAGE / "page.css").read_text(encoding="utf-8"),
            header=_script_json(header),
            blocks="".join(block for _, blocks in packed for block in blocks),
            script="".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        )

    def _font(self) -> str:
        """Returns an embedded font of the CJK characters used, as not every system has one."""
        texts = [self.title]
        for part in self.parts:
            texts += [*part.rows, *part.columns]
        characters = {c for text in texts for c in text if c >= FIRST_CJK}
        with TTCollection(noto_cjk_sans_otc.FONT_PATH, lazy=True) as fonts:
            font = next(each for each in fonts if each["name"].getDebugName(1) == FONT)
            characters &= set(map(chr, font.getBestCmap()))
            if not characters:
                return ""
            subsetter = Subsetter(Options(layout_features=[], name_IDs=[], desubroutinize=True))
            subsetter.populate(text="".join(characters))
            subsetter.subset(font)
            font.flavor, packed = "woff", io.BytesIO()
            font.save(packed)
        data = base64.b64encode(packed.getvalue()).decode()
        return f'@font-face {{ font-family: Tokens; src: url("data:font/woff;base64,{data}"); }}\n'

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the page, atomically.

        Raises:
          InputError: the file exists, unless `overwrite`; or anything else that
          `gptjax.system.outputs.check_output` refuses.
        """
        write_whole(path, self.html, overwrite=overwrite)

    def _repr_html_(self) -> str:
        """Returns a sandboxed iframe of the page, isolated from the notebook."""
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" title="{html.escape(self.title)}" '
            f'width="100%" height="{FRAME_HEIGHT}" sandbox="allow-scripts" '
            'style="border: 1px solid #8884; border-radius: 6px"></iframe>'
        )


def likeliest(
    logits: np.ndarray, label: Callable[[int], str], count: int = 5
) -> list[list[tuple[str, float]]]:
    """Returns the most likely next tokens at each position, with probabilities, in order.

    For 512 positions and 5 tokens each, a page grows by about 40 kB.

    Args:
      logits: [T, V].
      label: token id → label.
      count: tokens per position.
    """
    logits = np.asarray(logits, np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    best = np.argsort(-shares, axis=-1, kind="stable")[:, :count]
    return [
        [(label(int(token)), float(of_position[token])) for token in chosen]
        for of_position, chosen in zip(shares, best, strict=True)
    ]


def _ramps() -> dict[str, dict[str, str]]:
    """Returns the colour ramps by theme: bytes of red, green and blue, as base64."""

    def packed(colours: np.ndarray) -> str:
        return base64.b64encode(np.rint(255 * colours).astype(np.uint8).tobytes()).decode()

    return {
        theme: {
            "sequential": packed(sequential(dark=dark)),
            "diverging": packed(diverging(dark=dark)),
        }
        for theme, dark in (("light", False), ("dark", True))
    }


def _check(part: AttentionPart) -> None:
    shape, tokens = part.weights.shape, (len(part.rows), len(part.columns))
    if len(shape) != 4 or shape[2:] != tokens or not part.weights.size:
        raise InputError(
            f"The weights of {part.name} are {list(shape)}: they must be [L, N, T, S], here "
            f"[L, N, {tokens[0]}, {tokens[1]}]."
        )
    # Tolerate rounding above 1.
    if not (part.weights.min() >= 0 and part.weights.max() <= 1.001):
        raise InputError(f"The weights of {part.name} are not all from 0 to 1.")
    layers, heads = shape[:2]
    for name, given, count in (
        ("layers", part.layers, layers),
        ("heads", part.heads, heads),
        ("windows", part.windows, layers),
        ("next tokens", part.next_tokens, tokens[0]),
    ):
        if given is not None and len(given) != count:
            raise InputError(f"{part.name} names {len(given)} {name} of {count}.")
    if part.query is None or part.key is None:
        if part.query is not part.key:
            raise InputError(f"{part.name} has a query or a key: the neuron view needs both.")
        return
    query, key = part.query.shape, part.key.shape
    fits = query[:3] == (layers, tokens[0], heads) and key[:2] == (layers, tokens[1])
    fits = fits and len(query) == len(key) == 4 and query[3] == key[3] > 0
    if not fits or not key[2] or heads % key[2]:
        raise InputError(
            f"The query and key of {part.name} are {list(query)} and {list(key)}: they must be "
            f"[L, T, N, H] and [L, S, K, H] where the weights are [L, N, T, S], here {list(shape)}."
        )
    if not (np.isfinite(part.query).all() and np.isfinite(part.key).all()):
        raise InputError(f"The query and key of {part.name} are not all finite.")


def _pack(part: AttentionPart, index: int) -> tuple[dict[str, Any], list[str]]:
    """Returns a part's JSON header, and the blocks of its numbers."""
    layers, heads, rows, columns = part.weights.shape
    causal = rows == columns and not np.triu(part.weights, 1).any()
    levels = WEIGHT_LEVELS[part.weights.size > FEW]
    header: dict[str, Any] = {
        "name": part.name,
        "rows": list(part.rows),
        "columns": list(part.columns),
        "layers": [int(n) for n in (range(layers) if part.layers is None else part.layers)],
        "heads": [int(n) for n in (range(heads) if part.heads is None else part.heads)],
        "causal": causal,
        "windows": [int(n) for n in (part.windows or [0] * layers)],
        "next": [
            [(label, round(share, 4)) for label, share in of_position]
            for of_position in part.next_tokens or ()
        ],
        "same": list(part.rows) == list(part.columns),
        "levels": levels,
        "width": 0,
    }
    half = np.tril_indices(rows)
    blocks = [
        _block(
            f"weights-{index}-{number}", _planes(levels * (layer[:, *half] if causal else layer))
        )
        for number, layer in enumerate(part.weights)
    ]
    if part.query is not None and part.key is not None:
        vector_levels = VECTOR_LEVELS[part.query.size + part.key.size > FEW]
        header |= {
            "width": part.query.shape[3],
            "keyHeads": part.key.shape[2],
            "vectorLevels": vector_levels,
        }
        blocks += [
            _block(f"{name}-{index}-{number}", _vectors(layer, vector_levels))
            for name, vectors in (("query", part.query), ("key", part.key))
            for number, layer in enumerate(vectors)
        ]
    return header, blocks


def _vectors(vectors: np.ndarray, levels: int) -> bytes:
    """Quantises [T, N, H]: each vector's largest number [T, N], float32, then numbers over it."""
    largest = np.abs(vectors).max(-1).astype("<f4")
    parts = vectors / np.where(largest, largest, 1)[..., None]
    return largest.tobytes() + _planes(levels + levels * parts)


def _planes(numbers: np.ndarray) -> bytes:
    """Packs numbers from 0 to 65535, rounded: high bytes, then low bytes, which deflates best."""
    codes = np.clip(np.rint(numbers), 0, 65535).astype(np.uint16)
    return (codes >> 8).astype(np.uint8).tobytes() + codes.astype(np.uint8).tobytes()


def _block(identity: str, content: bytes) -> str:
    packed = base64.b64encode(zlib.compress(content)).decode()
    return f'<script id="{identity}" type="text/plain">{packed}</script>\n'


def _script_json(content: Any) -> str:
    """Returns JSON escaped for a script element."""
    text = json.dumps(content, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
