"""The cache of tokens when other processes share it, are killed, or find the disk full."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptjax.data.sources import open_source
from gptjax.data.storage.cache import META, OFFSETS, PROGRESS, TOKENS, open_store
from gptjax.data.tokenizers import ByteTokenizer

# What a process of its own does: it tells when it has encoded ten documents, and then takes time.
PROCESS = """
import resource, signal, sys, time
from pathlib import Path
from gptjax.config import InputError
from gptjax.data.storage import cache
from gptjax.data.sources import open_source
from gptjax.data.tokenizers import ByteTokenizer

class Slow(ByteTokenizer):
    encoded = 0
    def encode(self, text):
        self.encoded += 1
        if self.encoded == 10:
            print("ten", flush=True)
        if self.encoded >= 10:
            time.sleep({pause})
        return super().encode(text)

cache.CHECKPOINT_TOKENS = cache.BATCH_CHARACTERS = 1
if {limit}:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
tokenizer = Slow()
try:
    store = cache.open_store(open_source(sys.argv[1]), tokenizer, Path(sys.argv[2]))
    print(tokenizer.encoded, store.tokens[:].tobytes().hex())
except InputError as error:
    sys.exit(str(error))
"""


def start(source: str, directory: Path, pause: float, limit: int = 0) -> subprocess.Popen:
    program = PROCESS.format(pause=pause, limit=limit)
    return subprocess.Popen(
        [sys.executable, "-c", program, source, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"line number {number} é\n" for number in range(60)))
    return f"{path}#documents=line"


def expected(source: str) -> bytes:
    documents = open_source(source)
    return "".join(documents[number] for number in range(len(documents))).encode()


def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(tmp_path, source):
    process = start(source, tmp_path, pause=0.2)
    assert first_line(process) == "ten\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = tmp_path.glob("*.partial")
    assert (partial / PROGRESS).exists()
    encoded: list[str] = []

    class Counting(ByteTokenizer):
        def encode(self, text: str) -> np.ndarray:
            encoded.append(text)
            return super().encode(text)

    store = open_store(open_source(source), Counting(), tmp_path)
    assert 40 < len(encoded) <= 51
    assert store.tokens[:].tobytes() == expected(source)


def test_of_two_processes_one_encodes_and_both_have_the_tokens(tmp_path, source):
    processes = [start(source, tmp_path, pause=0.02) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in processes]
    said = [out.split()[-2:] for out, _ in ended]
    assert sorted(int(number) for number, _ in said) == [0, 60]
    assert {bytes.fromhex(tokens) for _, tokens in said} == {expected(source)}
    waited = [error for _, error in ended if error]
    assert all(error.startswith("Another process builds ") for error in waited)


def test_a_full_disk_is_one_sentence_and_nothing_half_written_is_used(tmp_path, source):
    full = start(source, tmp_path, pause=0, limit=600)
    _, error = full.communicate(timeout=60)
    assert full.returncode == 1
    (partial,) = tmp_path.glob("*.partial")
    place = partial.with_suffix("")
    assert error == (
        f"data.cache: cannot write {place}: File too large; nothing half-written is used.\n"
    )
    assert not place.exists()
    store = open_store(open_source(source), ByteTokenizer(), tmp_path)
    assert store.tokens[:].tobytes() == expected(source)
    assert sorted(path.name for path in store.directory.iterdir()) == [META, OFFSETS, TOKENS]
