"""Readers of published vocabularies: GPT-2's, GPT-1's and BERT's released files, and others.

For tokenizers released with other code, the tokenizer.json is written here; it does not depend on
the version of any library, and so neither does the tokenizer's fingerprint.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from gptjax.config import InputError, parse_json, read_limited
from gptjax.data.tokenizers.pieces import SentencePieceTokenizer
from gptjax.data.tokenizers.special import NAMES, read_declared_tokens
from gptjax.data.tokenizers.subwords import BYTE_LEVEL, SubwordTokenizer, description

SPECIAL_NAMES = {name for names in NAMES.values() for name in names}

# BERT's words: lower case without accents, each Chinese character and punctuation mark separate.
BERT_WORDS = {
    "normalizer": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
}

BERT_FRAME = {"cls": "[CLS]", "sep": "[SEP]"}


def read_gpt2(directory: Path) -> SubwordTokenizer:
    """GPT-2's byte-level BPE from `encoder.json` and `vocab.bpe` (openai/gpt-2, src/encoder.py).

    Raises:
      InputError: a file that is missing or damaged, or two that do not belong together.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary, merges = _read_bpe(directory / "encoder.json", directory / "vocab.bpe")
    lacking = set(ByteLevel.alphabet()) - vocabulary.keys()
    if lacking:
        path = directory / "encoder.json"
        raise InputError(f"data.tokenizer: {path} lacks {len(lacking)} of the 256 bytes.")
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    content = description(model, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL)
    return _described(content, "gpt2", directory)


def read_gpt1(directory: Path) -> SubwordTokenizer:
    """GPT-1's BPE from `encoder_bpe_40000.json` and `vocab_40000.bpe`.

    The words are BERT's, as in Hugging Face's OpenAIGPTTokenizer without spaCy: the original code
    (openai/finetune-transformer-lm, text_utils.py) finds them with ftfy and spaCy.

    Raises:
      InputError: a file that is missing or damaged, or two that do not belong together.
    """
    files = directory / "encoder_bpe_40000.json", directory / "vocab_40000.bpe"
    vocabulary, merges = _read_bpe(*files)
    _check_has(vocabulary, ("<unk>",), files[0])
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "end_of_word_suffix": "</w>",
        "vocab": vocabulary,
        "merges": merges,
    }
    decoder = {"type": "BPEDecoder", "suffix": "</w>"}
    return _described(description(model, **BERT_WORDS, decoder=decoder), "gpt1", directory)


def read_wordpiece(path: Path) -> SubwordTokenizer:
    """BERT's WordPiece, uncased, from its `vocab.txt` or the directory of it.

    (google-research/bert, tokenization.py; a word of more than 100 characters is unknown, as in
    Hugging Face's, where the original takes 200.) `encode` puts [CLS] before the text and [SEP]
    after it, as in all of BERT's inputs.

    Raises:
      InputError: a file that is missing or damaged.
    """
    path = path / "vocab.txt" if path.is_dir() else path
    # A line's number is its token's id, empty lines included; of duplicates the last counts.
    vocabulary = {line: number for number, line in enumerate(_lines(path))}
    _check_has(vocabulary, ("[UNK]", "[CLS]", "[SEP]"), path)
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocabulary,
    }
    frame = {name: (token, vocabulary[token]) for name, token in BERT_FRAME.items()}
    steps = {
        **BERT_WORDS,
        "post_processor": {"type": "BertProcessing", **frame},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    }
    return _described(description(model, **steps), "wordpiece", path)


def read_huggingface(path: Path) -> SubwordTokenizer:
    """The tokenizer of any `tokenizer.json`, given as the file or its directory.

    Which of its tokens begin and end a text is read from the files beside it (special.py).

    Raises:
      InputError: a file that is missing or damaged, here or beside it.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    content = _read(path)
    tokenizer = _described(content, "huggingface", path)
    declared = {
        meaning: token
        for meaning, token in read_declared_tokens(path.parent, tokenizer.vocabulary).items()
        if tokenizer.special.get(meaning) != token
    }
    return _described(content, "huggingface", path, declared) if declared else tokenizer


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model file.

    Raises:
      InputError: a file that is missing or damaged.
    """
    try:
        return SentencePieceTokenizer(_read_bytes(path))
    except ValueError as error:
        raise InputError(f"data.tokenizer: {path} {error}.") from error


def _read_bpe(encoder: Path, merges: Path) -> tuple[dict[str, int], list[list[str]]]:
    """The vocabulary, and the merges in order of priority.

    Raises:
      InputError: a file that is missing or damaged, or two that do not belong together.
    """
    try:
        vocabulary = parse_json(_read(encoder), str(encoder))
    except InputError as error:
        raise InputError(f"data.tokenizer: {error}") from error
    if not isinstance(vocabulary, dict) or {*map(type, vocabulary.values())} != {int}:
        raise InputError(f"data.tokenizer: {encoder} does not give tokens their numbers.")
    lines = [line for line in _lines(merges) if not line.startswith("#version")]
    pairs = [line.split(" ") for line in lines if line]
    for pair in pairs:
        if len(pair) != 2:
            raise InputError(f"data.tokenizer: {merges} has {' '.join(pair)!r} for a pair.")
    # A truncated file lacks the merges of some tokens.
    made = {"".join(pair) for pair in pairs} | SPECIAL_NAMES
    unmade = [token for token in vocabulary if len(token.removesuffix("</w>")) > 1]
    unmade = [token for token in unmade if token not in made]
    if unmade:
        raise InputError(
            f"data.tokenizer: {merges} and {encoder.name} do not belong together: "
            f"{len(unmade)} tokens, such as {unmade[0]!r}, are made by no pair."
        )
    return vocabulary, pairs


def _described(
    content: str, name: str, source: Path, declared: Mapping[str, int] = MappingProxyType({})
) -> SubwordTokenizer:
    """The tokenizer of a tokenizer.json; `source` names it in an error."""
    try:
        return SubwordTokenizer(content.encode("utf-8"), name, declared)
    except ValueError as error:
        raise InputError(f"data.tokenizer: {source} {error}.") from error


def _check_has(vocabulary: dict[str, int], names: tuple[str, ...], path: Path) -> None:
    for name in names:
        if name not in vocabulary:
            raise InputError(f"data.tokenizer: {path} lacks the token {name}.")


def _lines(path: Path) -> list[str]:
    """The lines of a text file with Unix or Windows line ends, without empty ones at its end."""
    return [line.removesuffix("\r") for line in _read(path).rstrip("\r\n").split("\n")]


def _read(path: Path) -> str:
    """The text of a file, without a byte order mark."""
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"data.tokenizer: {path} is not UTF-8.") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return read_limited(path)
    except InputError as error:
        raise InputError(f"data.tokenizer: {error}") from error
