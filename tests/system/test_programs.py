import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from gptjax.system import programs
from gptjax.system.programs import default_directory, with_own_names

RUN = """
import sys
from gptjax.system.programs import keep_programs
keep_programs()
import jax
jax.jit(lambda x: x * 3)(1.0)
print(jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None)
"""
CPUINFO = "model name\t: A\nflags\t\t: fpu avx2\nbugs\t\t: spectre_v1\n\nmodel name\t: A\n"


def start(**variables: str) -> tuple[str, str]:
    """What a process that keeps every program prints, and its errors."""
    own = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **variables}
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=own, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


def kept(directory: Path) -> dict[str, float]:
    return {path.name: path.stat().st_mtime for path in directory.glob("*-cache")}


def test_programs_are_kept_for_the_next_start_and_half_written_ones_are_not(tmp_path):
    where, errors = start(XDG_CACHE_HOME=str(tmp_path))
    assert errors == ""
    directory = Path(where)
    assert directory.parent == tmp_path / "gptjax"
    first = kept(directory)
    assert first
    (directory / "jit_half-cache").write_bytes(b"half")
    assert start(XDG_CACHE_HOME=str(tmp_path)) == (where, "")
    assert kept(directory) == first


def test_a_directory_that_cannot_be_written_is_a_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    sentence = "Compiled programs are not kept: {} cannot be written (Not a directory).\n"
    where, errors = start(JAX_COMPILATION_CACHE_DIR=f"{file}/named")
    assert (where, errors) == ("None", sentence.format(f"{file}/named"))


def test_jaxs_own_variable_names_the_directory_or_switches_it_off(monkeypatch, tmp_path):
    settings: Any = jax.config
    monkeypatch.setattr(programs, "default_directory", lambda *_: pytest.fail("asked"))
    before = settings.jax_compilation_cache_dir, settings.jax_compilation_cache_max_size
    try:
        for given in (str(tmp_path / "own"), ""):
            monkeypatch.setenv(programs.DIRECTORY, given)
            settings.update("jax_compilation_cache_dir", given or None)
            programs.keep_programs.__wrapped__()
            assert settings.jax_compilation_cache_dir == (given or None)
            assert settings.jax_compilation_cache_max_size == before[1]
    finally:
        settings.update("jax_compilation_cache_dir", before[0])


def test_each_kind_of_cpu_has_its_directory_unless_it_could_not_read_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory("gpu", CPUINFO) == tmp_path / "gptjax" / "jax"
    texts = CPUINFO, CPUINFO.replace("avx2", "avx512f"), CPUINFO.replace(": A", ": B"), ""
    assert len({default_directory("cpu", text) for text in texts}) == 4
    assert default_directory("cpu", CPUINFO.replace("spectre_v1", "spectre_v1 gds")) is None
    assert default_directory("gpu", CPUINFO.replace("spectre_v1", "gds")) is not None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_directory("tpu", "") == tmp_path / "Library" / "Caches" / "gptjax" / "jax"


def test_a_kept_program_has_the_present_names_where_they_are_wanted():
    settings: Any = jax.config
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(settings, least)
    jax.config.update(least, 0.0)
    try:

        def names(scope: str, wanted: bool) -> str:
            with with_own_names(wanted):
                step = jax.jit(jax.named_scope(scope)(lambda x: jax.numpy.sin(x) * 41.0625))
                text = step.lower(jax.numpy.ones(3)).compile().as_text()
            assert text is not None
            return text

        assert "older" in names("older", False)
        assert "older" in names("newer", False)  # The kept program, with its names.
        assert "newer" in names("newer", True)
        assert not settings.jax_compilation_cache_include_metadata_in_key
    finally:
        jax.config.update(least, before)
