"""Texts that tokenizers have trouble with, and tiny vocabularies in the form of published ones."""

import json
from pathlib import Path

from gptjax.data.tokenizers import train_tokenizer

TRAINED_ON = (
    "The quick brown fox jumps over the lazy dog.\n"
    "\tif indented:\n        return 'four  spaces'\r\n"
    "Zürich, naïve, 中文和汉字, 👍.\n"
) * 20

NASTY = {
    "empty": "",
    "NUL": "\0",
    "NUL within": "before\0after\0",
    "line ends": "\r\n\n\r\r\n",
    "tabs": "\ta\t\tb\t",
    "runs of spaces": "  two   three    four ",
    "only spaces": " " * 7,
    "leading space": " leading",
    "trailing space": "trailing ",
    "no-break space": "a\u00a0b\u3000c\u200b",
    "other line ends": "\x0b\x0c\x1c\x85\u2028\u2029",
    "emoji with joiners": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈",
    "Chinese": "床前明月光，疑是地上霜。",
    "combining marks": "e\u0301 \u0301 a\u0308\u0323",
    "SentencePiece's space": "▁a▁▁b▁",
    "replacement character": "\ufffd a\ufffd\ufffd中",
    "a piece's name": "<0x41>",
    "mark of the end": "</s>",
    "other marks": "<s><unk><pad>",
    "sign of the unknown": " ⁇ ",
    "byte order mark": "\ufefftext",
    "highest character": "\U0010ffff",
    "never seen in training": "Ωμέγα ქართული 🦆 %^&*",
}


def write_gpt2(directory: Path) -> None:
    """`encoder.json` and `vocab.bpe`, as GPT-2's: 256 bytes, 80 pairs, and the end of a text."""
    model = json.loads(train_tokenizer("bpe:340", TRAINED_ON).save())["model"]
    special = {"<s>", "</s>", "<pad>", "<mask>"}
    names = [name for name in sorted(model["vocab"], key=model["vocab"].get) if name not in special]
    _write_bpe(
        directory / "encoder.json",
        directory / "vocab.bpe",
        [*names, "<|endoftext|>"],
        [" ".join(pair) for pair in model["merges"]],
    )


def write_gpt1(directory: Path) -> None:
    """`encoder_bpe_40000.json` and `vocab_40000.bpe`, as GPT-1's: ASCII and a few pairs."""
    characters = [chr(point) for point in range(33, 127) if not chr(point).isupper()]
    pairs = ["t h", "th e</w>", "th e", "d o", "do g</w>", "l a", "i n", "in g</w>"]
    names = ["<unk>", *characters, *(f"{character}</w>" for character in characters)]
    names += [pair.replace(" ", "") for pair in pairs]
    files = directory / "encoder_bpe_40000.json", directory / "vocab_40000.bpe"
    _write_bpe(*files, names, pairs)


def _write_bpe(encoder: Path, merges: Path, names: list[str], pairs: list[str]) -> None:
    encoder.write_text(json.dumps({name: number for number, name in enumerate(names)}))
    merges.write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def write_wordpiece(directory: Path) -> None:
    """`vocab.txt`, as uncased BERT's: ASCII and a few longer pieces."""
    characters = [chr(point) for point in range(33, 127) if not chr(point).isupper()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = [f"##{character}" for character in characters if character.isalnum()]
    lines = [*special, *characters, *inner, "the", "dog", "##ing", "##og", "lazy"]
    (directory / "vocab.txt").write_text("".join(f"{line}\n" for line in lines))
