import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from gptjax.config import InputError
from gptjax.system import bucket_locks, buckets, mirrors
from gptjax.system.bucket_locks import PREFIX, locked_in_bucket
from gptjax.system.buckets import attempt, downloaded, url_of
from gptjax.system.disk import DiskError
from gptjax.system.locks import InUse, this_owner
from gptjax.system.mirrors import (
    INDEX,
    Mirror,
    Rules,
    copied,
    downloaded_directory,
    mirror_of,
    mirrored,
)
from gptjax.system.outputs import check_output, whole_directory, write_whole


@pytest.fixture
def url(monkeypatch, tmp_path) -> Iterator[str]:
    """A directory in a bucket of fsspec's own store, in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield "memory://bucket/run"
    store.store.clear()


def _mirror(url: str, local: Path, **rules) -> Mirror:
    local.mkdir(exist_ok=True)
    return Mirror(url, local, Rules(**rules))


def _content(url: str) -> dict[str, bytes]:
    store = fsspec.filesystem("memory")
    root = store._strip_protocol(url)
    return {at.removeprefix(f"{root}/"): store.cat_file(at) for at in store.find(root)}


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("gs://bucket/run", "gs://bucket/run"),
        (Path("gs://bucket/run"), "gs://bucket/run"),
        (Path("s3://bucket/run/"), "s3://bucket/run"),
        ("memory://bucket", "memory://bucket"),
        ("file:///disk/run", "file:///disk/run"),
        (Path("file:///disk/run"), "file:///disk/run"),
        ("runs/a", None),
        ("/runs/a:/b", None),
        ("tfds:name", None),
        ("C:/runs", None),
    ],
)
def test_a_url_is_known_even_as_pathlib_writes_it(path, url):
    assert url_of(path) == url


def test_two_dots_are_refused():
    with pytest.raises(InputError, match=r"^s3://bucket/a/\.\./b has '\.\.', "):
        url_of("s3://bucket/a/../b")


@pytest.mark.parametrize(
    ("scheme", "raised", "sentence"),
    [
        ("s3", ImportError("no s3fs"), r"pip install 'gptjax\[s3\]'\.$"),
        ("gs", ImportError("no gcsfs"), r"pip install 'gptjax\[gcs\]'\.$"),
        ("abfs", ImportError("no adlfs"), r"\(no adlfs\)\.$"),
        ("nothing", ValueError("unknown"), r"^nothing:// is no scheme that fsspec knows\.$"),
    ],
)
def test_a_package_that_is_missing_is_named(monkeypatch, scheme, raised, sentence):
    def refuse(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(fsspec, "filesystem", refuse)
    buckets.filesystem.cache_clear()
    with pytest.raises(InputError, match=sentence):
        buckets.filesystem(scheme)


def test_a_directory_comes_back_as_it_went(url, tmp_path):
    one = _mirror(url, tmp_path / "one")
    (one.local / "below").mkdir()
    for name, text in {"a": "1", "below/b": "2"}.items():
        (one.local / name).write_text(text)
    one.push()
    assert _content(url) == {"a": b"1", "below/b": b"2"}

    two = _mirror(url, tmp_path / "two")
    (two.local / "left").write_text("by a killed process")
    two.pull()
    found = {p.relative_to(two.local).as_posix() for p in two.local.rglob("*") if p.is_file()}
    assert found == {"a", "below/b", INDEX}
    assert (two.local / "below" / "b").read_text() == "2"

    (one.local / "a").unlink()
    one.push()
    two.pull()
    assert not (two.local / "a").exists()


def test_only_what_changed_goes_over_the_network(url, tmp_path, monkeypatch):
    one = _mirror(url, tmp_path / "one")
    for name in "ab":
        (one.local / name).write_text(name)
    one.push()
    sent: list[str] = []
    monkeypatch.setattr(Mirror, "_put", lambda self, name: sent.append(name))
    monkeypatch.setattr(Mirror, "_get", lambda self, name: sent.append(name))
    one.push()
    one.pull()
    # Another process on this machine, after the first was killed.
    again = _mirror(url, tmp_path / "one")
    again.pull()
    assert sent == []
    (one.local / "a").write_text("another")
    one.push()
    assert sent == ["a"]


def test_an_object_that_another_machine_wrote_is_downloaded_again(url, tmp_path):
    one, two = _mirror(url, tmp_path / "one"), _mirror(url, tmp_path / "two")
    (one.local / "a").write_text("1")
    one.push()
    two.pull()
    (two.local / "a").write_text("2")
    two.push()
    one.pull()
    assert (one.local / "a").read_text() == "2"


def test_what_says_that_others_are_there_is_uploaded_last_and_deleted_first(url, tmp_path):
    done: list[str] = []
    mirror = _mirror(url, tmp_path / "one", first=(".begun",), last=("config.json",))

    class Recording:
        def __init__(self, store):
            self._store = store

        def __getattr__(self, name):
            acted = getattr(self._store, name)

            def act(*arguments, **named):
                if name in ("put_file", "rm_file"):
                    done.append(str(arguments[-1]).rpartition("/")[2])
                return acted(*arguments, **named)

            return act

    mirror._store = Recording(mirror._store)
    for name in (".begun", "config.json", "tokenizer.json"):
        (mirror.local / name).write_text(name)
    mirror.push()
    assert done == [".begun", "tokenizer.json", "config.json"]
    for name in done:
        (mirror.local / name).unlink()
    done.clear()
    mirror.push()
    assert done == ["config.json", "tokenizer.json", ".begun"]


def test_files_that_the_rules_leave_out_stay_on_both_sides(url, tmp_path):
    mirror = _mirror(url, tmp_path / "one", wanted=lambda name: not name.startswith("own"))
    fsspec.filesystem("memory").pipe_file(f"{url}/own there", b"")
    (mirror.local / "own here").write_text("")
    mirror.pull()
    mirror.push()
    assert set(_content(url)) == {"own there"}
    assert (mirror.local / "own here").exists()


@pytest.mark.parametrize("name", ["../out", "below/../../out"])
def test_a_name_that_leads_out_is_not_downloaded(url, tmp_path, name):
    """A store allows any name, so that who writes the bucket could write elsewhere."""
    store = fsspec.filesystem("memory")
    store.pipe_file(f"{url}/a", b"1")
    store.store[f"/bucket/run/{name}"] = store.store["/bucket/run/a"]
    mirror = _mirror(url, tmp_path / "one")
    mirror.pull()
    assert set(mirror.names) == {"a"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["/out", "a//b", "./a", "a/."])
def test_a_name_that_no_path_has_is_not_known(name):
    assert not mirrors._is_path(name)


@pytest.fixture
def _no_waiting(monkeypatch):
    monkeypatch.setattr(buckets, "WAITS", (0.0, 0.0))


@pytest.mark.usefixtures("_no_waiting")
def test_a_store_that_fails_for_a_while_is_asked_again():
    answers: list[object] = [ConnectionError("reset"), TimeoutError(), "content"]

    def answer() -> object:
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    assert attempt("s3://bucket/a", answer) == "content"


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize(
    ("raised", "error", "sentence", "attempts"),
    [
        (ConnectionError("it was\nreset"), DiskError, r"failed 3 times: it was reset\.$", 3),
        (FileNotFoundError("a"), FileNotFoundError, "a", 1),
        (PermissionError("a"), PermissionError, "a", 1),
        (
            type("NoCredentialsError", (Exception,), {})("none"),
            InputError,
            r"^s3://bucket/a: no credentials were found \(none\)\.$",
            1,
        ),
    ],
)
def test_a_store_that_goes_on_failing_is_one_sentence(raised, error, sentence, attempts):
    asked = []

    def fail() -> None:
        asked.append(1)
        raise raised

    with pytest.raises(error, match=sentence):
        attempt("s3://bucket/a", fail)
    assert len(asked) == attempts


def test_a_bucket_that_may_not_be_written_is_one_sentence(url, tmp_path, monkeypatch):
    mirror = _mirror(url, tmp_path / "one")
    (mirror.local / "a").write_text("1")

    def refuse(*_: object) -> None:
        raise PermissionError("403")

    monkeypatch.setattr(type(mirror._store), "put_file", refuse)
    with pytest.raises(InputError, match=f"^{re.escape(url)}/a: access is denied\\.$"):
        mirror.push()


def test_a_download_cut_short_is_tried_again(url, tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "WAITS", (0.0,))
    fsspec.filesystem("memory").pipe_file(f"{url}/a", b"whole")
    whole, cuts = type(fsspec.filesystem("memory")).get_file, [1]

    def cut(self, at, path):
        whole(self, at, path)
        if cuts.pop() if cuts else 0:
            Path(path).write_bytes(b"wh")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", cut)
    assert downloaded(f"{url}/a").read_bytes() == b"whole"


def test_a_file_is_downloaded_once_for_each_content(url, monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe_file(f"{url}/a.txt", b"1")
    first = downloaded(f"{url}/a.txt")
    assert first.name == "a.txt"
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "download", None)
        assert downloaded(f"{url}/a.txt") == first
    time.sleep(0.01)
    store.pipe_file(f"{url}/a.txt", b"22")
    assert downloaded(f"{url}/a.txt").read_bytes() == b"22"
    with pytest.raises(InputError, match=r"missing: there is no such bucket or file\.$"):
        downloaded(f"{url}/missing")
    with pytest.raises(InputError, match=r"run is a directory: give a file, or a pattern"):
        downloaded(url)


def test_a_directory_is_downloaded_and_kept_up_to_date(url):
    store = fsspec.filesystem("memory")
    store.pipe_file(f"{url}/a/b", b"1")
    local = downloaded_directory(url)
    assert (local / "a" / "b").read_bytes() == b"1"
    store.pipe_file(f"{url}/c", b"2")
    assert (downloaded_directory(url) / "c").read_bytes() == b"2"
    with pytest.raises(InputError, match=r"nothing: there is nothing\.$"):
        downloaded_directory("memory://bucket/nothing")


def test_a_copy_is_temporary_and_a_local_directory_is_no_copy(url, tmp_path):
    fsspec.filesystem("memory").pipe_file(f"{url}/a", b"1")
    with copied(Path(url)) as local:
        assert (local / "a").read_bytes() == b"1"
        found = mirror_of(local / "below" / "x")
        assert found is not None
        assert (found[0].url, found[1]) == (url, "below/x")
    assert not local.exists()
    assert mirror_of(local) is None
    with copied(tmp_path) as same:
        assert same == tmp_path
    with pytest.raises(InputError, match="there is nothing"), copied(Path(f"{url}/missing")):
        pass
    with copied(Path(f"{url}/missing"), empty=True) as local:
        assert [path.name for path in local.iterdir()] == [INDEX]


def test_errors_name_the_url_and_what_failed_stays_here(url):
    def fail() -> None:
        with mirrored(url, Rules()) as mirror:
            (mirror.local / "kept").write_text("1")
            raise InputError(f"{mirror.local}/a is bad.")

    with pytest.raises(InputError, match=f"^{re.escape(url)}/a is bad\\.$"):
        fail()
    with mirrored(url, Rules()) as again:
        assert (again.local / "kept").exists()
    assert not again.local.exists()


def test_outputs_are_written_to_a_bucket_and_never_over_another(url, tmp_path):
    page = Path(f"{url}/page.html")
    write_whole(page, "one")
    assert _content(url) == {"page.html": b"one"}
    with pytest.raises(InputError, match=r"page\.html already exists: "):
        write_whole(page, "two")
    with pytest.raises(InputError, match="already exists"):
        check_output(page)
    write_whole(page, "two", overwrite=True)
    assert _content(url) == {"page.html": b"two"}

    model = Path("memory://bucket/model")

    def fail() -> None:
        with whole_directory(model) as made:
            (made / "a").write_text("1")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _content("memory://bucket/model") == {}
    with whole_directory(model) as made:
        (made / "a").write_text("1")
    assert _content("memory://bucket/model") == {"a": b"1"}
    with pytest.raises(InputError, match="already exists"), whole_directory(model):
        pass


@pytest.fixture
def _soon(monkeypatch):
    for name, seconds in {"BEAT": 0.02, "SILENT": 0.3, "WAIT": 0.02}.items():
        monkeypatch.setattr(bucket_locks, f"{name}_SECONDS", seconds)


def _foreign(mirror: Mirror, number: int = 1, beat: int = 0) -> None:
    """A lock of a process on another machine."""
    owner = this_owner()._replace(boot="another", host="elsewhere", process=7)
    mirror.put_text(f"{PREFIX}{number}", bucket_locks._signed(owner, beat))


def test_a_lock_is_held_by_one(url, tmp_path):
    one, two = _mirror(url, tmp_path / "one"), _mirror(url, tmp_path / "two")
    with locked_in_bucket(one):
        assert two.beginning(PREFIX) == [".lock.1"]
        here = re.escape(socket.gethostname())
        sentence = f"^{re.escape(url)} is in use by process [0-9]+ on {here} since .*: wait until"
        with pytest.raises(InUse, match=sentence), locked_in_bucket(two):
            pass
        assert two.beginning(PREFIX) == [".lock.1"]
    assert two.beginning(PREFIX) == []
    with locked_in_bucket(two):
        pass


@pytest.mark.usefixtures("_soon")
def test_who_waits_gets_a_lock_that_is_released(url, tmp_path, capsys):
    one, two = _mirror(url, tmp_path / "one"), _mirror(url, tmp_path / "two")
    with contextlib.ExitStack() as held:
        held.enter_context(locked_in_bucket(one))
        threading.Timer(0.2, held.close).start()
        with locked_in_bucket(two, waiting="waiting for it"):
            assert one.beginning(PREFIX) == [".lock.1"]
    assert capsys.readouterr().err == "waiting for it\n"


def test_a_lock_whose_owner_ended_here_is_taken_at_once(url, tmp_path):
    mirror = _mirror(url, tmp_path / "one")
    ended = this_owner()._replace(started=1.0)
    mirror.put_text(f"{PREFIX}4", bucket_locks._signed(ended, 0))
    with locked_in_bucket(mirror):
        assert sorted(mirror.beginning(PREFIX)) == [".lock.4", ".lock.5"]
    assert mirror.beginning(PREFIX) == []


@pytest.mark.usefixtures("_soon")
def test_a_silent_lock_of_another_machine_is_taken_and_a_beating_one_is_not(url, tmp_path):
    mirror = _mirror(url, tmp_path / "one")
    _foreign(mirror)
    with locked_in_bucket(mirror):
        assert sorted(mirror.beginning(PREFIX)) == [".lock.1", ".lock.2"]
    _foreign(mirror)
    threading.Timer(0.1, _foreign, [mirror, 1, 1]).start()
    sentence = "is in use by process 7 on elsewhere"
    with pytest.raises(InUse, match=sentence), locked_in_bucket(mirror):
        pass


@pytest.mark.usefixtures("_soon")
def test_who_was_taken_over_uploads_nothing_more(url, tmp_path):
    mirror = _mirror(url, tmp_path / "one")
    with locked_in_bucket(mirror):
        _foreign(mirror, number=2)
        (mirror.local / "a").write_text("1")
        time.sleep(0.3)
        with pytest.raises(InUse, match="was taken over by another process"):
            mirror.push()
    # The other one's lock stays.
    assert ".lock.2" in mirror.beginning(PREFIX)


@pytest.mark.usefixtures("_soon")
def test_of_many_that_want_a_lock_one_at_a_time_has_it(url, tmp_path, monkeypatch):
    inside, most, creating = [], [], threading.Lock()
    memory = type(fsspec.filesystem("memory"))
    write = memory.pipe_file

    def atomic(self, path, value, mode="overwrite", **named):
        with creating:  # As real stores do it.
            write(self, path, value, mode=mode, **named)

    monkeypatch.setattr(memory, "pipe_file", atomic)

    def want(number: int) -> None:
        mirror = _mirror(url, tmp_path / str(number))
        with locked_in_bucket(mirror, waiting="."):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    # One of them finds the lock of a dead process, whose number others may take meanwhile.
    ended = this_owner()._replace(started=1.0)
    _mirror(url, tmp_path / "x").put_text(f"{PREFIX}1", bucket_locks._signed(ended, 0))
    threads = [threading.Thread(target=want, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


def test_a_url_becomes_a_file_name_of_its_own():
    names = [buckets.file_name(url) for url in ("s3://a/b", "s3://a_b", "s3://" + "long/" * 99)]
    assert names[0].startswith("s3_a_b-")
    assert len({*names}) == 3
    assert max(map(len, names)) < 120


def test_without_a_home_there_is_a_sentence(monkeypatch):
    def none() -> Path:
        raise RuntimeError

    monkeypatch.setattr(buckets, "user_caches", none)
    with pytest.raises(InputError, match=r"^XDG_CACHE_HOME must name a directory"):
        buckets.caches("tokens")
