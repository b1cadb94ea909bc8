"""SentencePiece (Kudo & Richardson 2018): pieces of raw text, by BPE or by a unigram model.

The unigram model (Kudo 2018) starts from many pieces and drops those whose removal lowers the
text's likelihood least; BPE (Sennrich et al. 2016) starts from characters and merges the most
frequent pair.
"""

import io
import re
from collections.abc import Iterable

import numpy as np

from gptjax.config import InputError
from gptjax.data.tokenizers.protocol import REPLACEMENT, Tokenizer
from gptjax.data.tokenizers.words import WordEdges, edges_of_text

MODEL_TYPES = {"sentencepiece": "bpe", "unigram": "unigram"}
"""Kinds of `data.tokenizer` → SentencePiece's model types."""

FEWEST_PIECES = 5 + 256
"""<unk>, <s>, </s>, <pad>, <mask> and the 256 bytes, which every vocabulary has."""

# SentencePiece ends its input at NUL and writes a space as ▁ (U+2581): these two are passed to it
# as bytes.
_RESERVED = re.compile("([\0▁])")

# Leading, full-width and doubled characters, some of which other models than ours normalise.
_PROBE = " ａ  b"


_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def bytes_of_piece(piece: str) -> bytes:
    """The UTF-8 bytes of `piece`, in which <0x..> is a single byte and ▁ a space."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode("utf-8")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; those trained here are lossless, by byte fallback.

    Others do what they were trained to do: most normalise the text and put a space before it.
    """

    def __init__(self, model: bytes, kind: str = "sentencepiece"):
        """Take the content of a model file.

        Raises:
          ValueError: invalid content.
        """
        from sentencepiece import SentencePieceProcessor

        self._model = model
        try:
            self._processor = SentencePieceProcessor(model_proto=model or b"\0")
            self.vocab_size = self._processor.vocab_size()
            self._pieces = [self._processor.id_to_piece(id) for id in range(self.vocab_size)]
            normalized = self._processor.normalize(_PROBE)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError("is not a SentencePiece model") from error
        self.name = f"{kind}:{self.vocab_size}"
        ids = {
            "begin": self._processor.bos_id(),
            "end": self._processor.eos_id(),
            "pad": self._processor.pad_id(),
            "mask": self._processor.piece_to_id("<mask>"),
            "unknown": self._processor.unk_id(),
        }
        if not self._processor.is_control(ids["mask"]):
            ids["mask"] = -1
        self.special = {name: token for name, token in ids.items() if token >= 0}
        # SentencePiece decodes a piece outside its vocabulary to itself.
        self._pieces[ids["unknown"]] = REPLACEMENT
        unchanged = normalized == _PROBE.replace(" ", "▁")
        self._lossless = unchanged and "<0x00>" in self._pieces

    @classmethod
    def train(
        cls, text: str, vocab_size: int, kind: str = "sentencepiece"
    ) -> "SentencePieceTokenizer":
        """Train `vocab_size` pieces on `text`; `kind` is sentencepiece (BPE) or unigram.

        Raises:
          InputError: a size too large for the text, or too small for its characters.
        """
        from sentencepiece import SentencePieceTrainer

        lines = _RESERVED.sub("", text).splitlines(keepends=True)
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type=MODEL_TYPES[kind],
                # Sizes outside these bounds fail too, but slowly or without a reason.
                vocab_size=min(max(vocab_size, FEWEST_PIECES), FEWEST_PIECES + 2 * len(text)),
                character_coverage=1.0,
                pad_id=3,
                control_symbols=["<mask>"],
                # These five make it lossless.
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 30,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            bound = re.search(r"(vs|<=) (\d+)", str(error))
            if bound is None:
                raise InputError(
                    "data.tokenizer: the text has nothing that SentencePiece can learn."
                ) from error
            accepted = f"at {'least' if bound[1] == 'vs' else 'most'} {bound[2]}"
            raise InputError(
                f"data.tokenizer is '{kind}:{vocab_size}': for this text the size must be "
                f"{accepted}."
            ) from error
        return cls(model.getvalue(), kind)

    def encode(self, text: str) -> np.ndarray:
        """Piece ids [T], int32."""
        if not self._lossless:
            return np.array(self._processor.encode(text), np.int32)
        tokens: list[int] = []
        for part in _RESERVED.split(text):
            if _RESERVED.fullmatch(part):
                bytes_of_part = (f"<0x{byte:02X}>" for byte in part.encode("utf-8"))
                tokens += [self._processor.piece_to_id(piece) for piece in bytes_of_part]
            else:
                tokens += self._processor.encode(part)
        return np.array(tokens, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of piece ids [T]."""
        known, pieces = self.vocab_size, self._pieces
        return self._processor.decode_pieces(
            [pieces[token] if token < known else REPLACEMENT for token in tokens]
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes of the piece."""
        return bytes_of_piece(self._pieces[token])

    def word_edges(self) -> WordEdges:
        """Which pieces join into words."""
        return edges_of_text(map(bytes_of_piece, self._pieces))

    def save(self) -> bytes:
        """The SentencePiece model file."""
        return self._model
