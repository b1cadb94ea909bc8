"""Sources of text, behind one small protocol (protocol.py).

| `data.source` | documents |
|---|---|
| embedded | Python's language reference, one document |
| PATH, or a pattern such as DIR/**/*.txt | each file of text, in sorted order |
| PATH#documents=line | every line, empty ones too |
| PATH#documents=block | text between blank lines |
| PATH#column=2 | the second column of every line of tab-separated text |
| PATH.jsonl#field=text | a field of every non-blank line |
| PATH.parquet#field=text | a field of every row |
| tfds:NAME#split=train&field=text&data_dir=DIR | a split of a TensorFlow dataset |
| hf:NAME#name=CONFIG&split=train&field=text | a split of a Hugging Face dataset, or hf:DIRECTORY |
| hf:NAME#rows=100000 | its first rows, streamed (huggingface.py) |
| tokens:PATH.bin#tokenizer=gpt2:PATH | token shards: those of llm.c, nanoGPT, OLMo (shards.py) |

Text and JSON lines may end in .gz or .zst; `#errors=replace` reads bytes that are not UTF-8 as
U+FFFD. Options are joined by `&`; field defaults to text, split to train. Line ends within
documents are kept, a byte order mark is dropped. A pattern reads each file once, however many links
lead to it. A path may be in a bucket (`gs://`, `s3://`): its files are downloaded once per machine.
Memory use is an index of 8 bytes per document, not the text.
"""

import os

from gptjax.config import whole_number
from gptjax.data.sources.embedded import EmbeddedCorpus, embedded_corpus
from gptjax.data.sources.files import UNPACKERS, find_files, packed_as
from gptjax.data.sources.protocol import Documents, Spec, check_no_option, parse_spec, refuse
from gptjax.data.sources.records import JsonLines, Parquet
from gptjax.data.sources.text import Blocks, Column, Lines, Whole
from gptjax.system.buckets import downloaded, find, url_of

__all__ = ["Documents", "embedded_corpus", "open_source", "reopen"]

TFDS = "tfds:"
"""Prefix of a TensorFlow dataset's spec."""
HUGGING_FACE = "hf:"
"""Prefix of the spec of a dataset of Hugging Face's library."""
TOKENS = "tokens:"
"""Prefix of the spec of token shards."""

COMPRESSED = (".bz2", ".xz", ".zip", ".lz4", ".7z", ".tar", ".tgz")
"""Suffixes of compressed formats that are not supported."""


def open_source(spec: str) -> Documents:
    """The documents that `spec` (see the module's table) names.

    Raises:
      InputError: an invalid spec, or a text that is missing, damaged or of another format.
    """
    parsed = parse_spec(spec)
    if spec.startswith(TFDS):
        from gptjax.data.sources.tfds import open_dataset

        return open_dataset(parsed)
    if spec.startswith(HUGGING_FACE):
        from gptjax.data.sources.huggingface import open_huggingface

        return open_huggingface(parsed._replace(address=parsed.address.removeprefix(HUGGING_FACE)))
    if spec.startswith(TOKENS):
        from gptjax.data.sources.shards import open_shards

        parsed = parsed._replace(address=parsed.address.removeprefix(TOKENS))
        return open_shards(parsed, _paths(parsed))
    if parsed.address == "embedded":
        parsed.choose("embedded")
        return EmbeddedCorpus()
    return _open_files(parsed)


def reopen(spec: str, fingerprint: str) -> Documents:
    """Open `spec` again and check that its fingerprint is the same.

    Raises:
      InputError: another fingerprint, or a text that cannot be opened.
    """
    documents = open_source(spec)
    if documents.fingerprint != fingerprint:
        refuse(f"{spec} is not the text that it was")
    return documents


def _paths(spec: Spec) -> list[str]:
    """The files at the spec's address, on this machine.

    Raises:
      InputError: none.
    """
    if not (url := url_of(spec.address)):
        return find_files(spec.address)
    paths = [str(downloaded(each)) for each in find(url)]
    if not paths:
        refuse(f"no file fits {url}")
    return paths


def _open_files(spec: Spec) -> Documents:
    paths = _paths(spec)
    if not os.path.lexists(paths[0]):
        check_no_option(spec)
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        refuse(f"{spec.address} fits files of several kinds: {', '.join(sorted(kinds))}")
    return KINDS[kinds.pop()](spec, paths)


def _open_parquet(spec: Spec, paths: list[str]) -> Documents:
    options = spec.choose("Parquet", field="text")
    return Parquet(spec, paths, str(options["field"]))


def _open_json_lines(spec: Spec, paths: list[str]) -> Documents:
    options = spec.choose("JSON lines", field="text", errors="strict")
    return JsonLines(spec, paths, _errors(spec, options), str(options["field"]))


def _open_text(spec: Spec, paths: list[str]) -> Documents:
    options = spec.choose("text", documents=None, column=None, errors="strict")
    errors, column, documents = _errors(spec, options), options["column"], options["documents"]
    if column is not None:
        number = whole_number(column)
        if not number:
            refuse(f"{spec.text} has the column {column!r}: it must be a number, from 1")
        if documents not in (None, "line"):
            refuse(f"{spec.text} has a column of every line, and cannot have documents={documents}")
        return Column(spec, paths, errors, number)
    kinds = {"file": Whole, "line": Lines, "block": Blocks}
    if documents not in (None, *kinds):
        refuse(f"{spec.text} has documents={documents}: it must be one of {', '.join(kinds)}")
    return kinds[documents or "file"](spec, paths, errors)


KINDS = {"Parquet": _open_parquet, "JSON lines": _open_json_lines, "text": _open_text}
"""Formats of files, and the functions that open them."""
SUFFIXES = {".parquet": "Parquet", ".jsonl": "JSON lines"}
"""Suffixes of formats other than text."""


def _kind(path: str) -> str:
    """The format of a file, by its suffix.

    Raises:
      InputError: an unsupported format.
    """
    packed = packed_as(path)
    name = path.lower().removesuffix(packed)
    for suffix in COMPRESSED:
        if name.endswith(suffix):
            known = " and ".join(UNPACKERS)
            refuse(f"{path} is packed as {suffix}; of packed files, {known} are read")
    kind = next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), "text")
    if kind == "Parquet" and packed:
        refuse(f"{path} is Parquet in {packed}, which allows no random access; unpack it")
    return kind


def _errors(spec: Spec, options: dict[str, str | None]) -> str:
    errors = str(options["errors"])
    if errors not in ("strict", "replace"):
        refuse(f"{spec.text} has errors={errors}: it must be one of strict, replace")
    return errors
