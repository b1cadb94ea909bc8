"""Token shards as others' code writes them."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from test_sources import sentence

from gptjax.data.corpus import Part
from gptjax.data.sources import open_source, shards
from gptjax.data.storage.cache import open_store
from gptjax.data.tokenizers import SubwordTokenizer, read_huggingface

TEXT = "the cat sat on the mat and the dog sat on the cat. " * 20
FILE = "tokenizer.json"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("vocabulary")
    (directory / FILE).write_bytes(SubwordTokenizer.train(TEXT, 275).save())
    return directory


def llm_c(ids: np.ndarray, *, magic: int = 20240520, count: int | None = None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    return header.tobytes() + ids.astype("<u2" if magic == 20240520 else "<u4").tobytes()


def npy(ids: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, ids)
    return stream.getvalue()


WRITTEN = {
    "llm.c": (".bin", llm_c, ""),
    "llm.c for Llama 3": (".bin", lambda ids: llm_c(ids, magic=20240801), ""),
    "nanoGPT": (".bin", lambda ids: ids.astype("<u2").tobytes(), ""),
    "OLMo": (".npy", lambda ids: ids.astype("<u4").tobytes(), "&dtype=uint32"),
    "NumPy": (".npy", lambda ids: npy(ids.astype(np.uint16)), ""),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_documents_go_on_in_the_next_file(kind, tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 4 * 7)  # Seven ids at a time.
    suffix, write, options = WRITTEN[kind]
    tokenizer = read_huggingface(vocabulary)
    end = tokenizer.special["end"]
    texts = ["the cat", "sat on the mat and the dog", "é", "the"]
    # The ids are not those that the tokenizer would choose: a byte each.
    alone = [np.concatenate([tokenizer.encode(c) for c in text]) for text in texts]
    # llm.c begins documents with the end token, others end with it; two in a row are no document.
    stream = np.concatenate([[end], *(np.append(ids, end) for ids in alone), [end, *alone[0]]])
    for number, part in enumerate(np.split(stream, [3, 3, 40])):
        (tmp_path / f"{number}{suffix}").write_bytes(write(part))
    source = open_source(f"tokens:{tmp_path}/*{suffix}#tokenizer=huggingface:{vocabulary}{options}")
    assert [source[n] for n in range(len(source))] == [*texts, texts[0]]
    assert source.fingerprint == pickle.loads(pickle.dumps(source)).fingerprint

    store = open_store(source, tokenizer, tmp_path / "cache")
    for number, ids in enumerate([*alone, alone[0]]):
        np.testing.assert_array_equal(store.document(number), ids)
    assert store.bytes == sum(len(text.encode()) for text in [*texts, texts[0]])
    assert store.ends
    part = open_store(Part(source, 1, 3), tokenizer, tmp_path / "cache")
    np.testing.assert_array_equal(part.document(0), alone[1])


def test_another_tokenizer_encodes_the_text(tmp_path, vocabulary):
    tokenizer = read_huggingface(vocabulary)
    ids = np.concatenate([tokenizer.encode(c) for c in "the cat"])
    (tmp_path / "a.bin").write_bytes(llm_c(ids))
    source = open_source(f"tokens:{tmp_path}/a.bin#tokenizer=huggingface:{vocabulary}")
    other = SubwordTokenizer.train(TEXT, 265)
    store = open_store(source, other, tmp_path / "cache")
    np.testing.assert_array_equal(store.document(0), other.encode("the cat"))


def test_what_is_no_shard_is_one_sentence(tmp_path, vocabulary, monkeypatch):
    ids = np.arange(9, dtype=np.int64) + 10
    contents = {
        "cut.bin": (llm_c(ids)[:-4], "header (version 1) says 9 tokens, and 7 follow"),
        "half.bin": (llm_c(ids)[:-1], "says 9 tokens, and 8.5 follow"),
        "negative.bin": (llm_c(ids, count=-1), "says -1 tokens, and 9 follow"),
        "odd.bin": (b"\1\2\3", "3 bytes are no whole number of uint16"),
        "large.bin": (llm_c(ids + 5000), "has the token 5018, beyond the 275 of"),
        "ends.bin": (llm_c(np.full(3, 1)), "has no token but end tokens"),
        "empty.bin": (b"", "has no token but end tokens"),
        "cut.npy": (npy(ids.astype(np.uint16))[:-2], "header says 9 tokens, and it has 144 bytes"),
        "signed.npy": (npy(ids), "holds int64 [9]: it must be one axis of unsigned ids"),
        "table.npy": (npy(np.zeros((2, 2), np.uint16)), "holds uint16 [2, 2]: it must be one axis"),
        "header.npy": (npy(ids)[:20], "has a damaged NumPy header"),
    }
    for name, (content, what) in contents.items():
        (tmp_path / name).write_bytes(content)
        assert what in sentence(f"tokens:{tmp_path}/{name}#tokenizer=huggingface:{vocabulary}")
    monkeypatch.setattr(shards, "LONGEST", 8)
    (tmp_path / "long.bin").write_bytes(llm_c(ids))
    long = sentence(f"tokens:{tmp_path}/long.bin#tokenizer=huggingface:{vocabulary}")
    assert "has a document of 9 tokens, more than the 8 that one may have" in long


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("", "needs the tokenizer that made its tokens"),
        ("#tokenizer=bpe:300", "needs the tokenizer that made its tokens"),
        ("#tokenizer=characters", "needs the tokenizer that made its tokens"),
        ("#tokenizer=bytes&dtype=int8", "has dtype=int8: it must be one of uint16, uint32"),
        ("#tokenizer=bytes&field=a", "has the option field, and tokens takes tokenizer, dtype"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options, what, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"ab")
    assert what in sentence(f"tokens:{tmp_path}/a.bin{options}")
    assert "No such file" in sentence(f"tokens:{tmp_path}/none.bin#tokenizer=bytes")
