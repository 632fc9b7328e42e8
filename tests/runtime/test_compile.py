"""Compiling small kernels by NVRTC without a GPU, and what the cache does with their cubins."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megalith.format.errors import MegalithError
from megalith.runtime import compile as compiling
from megalith.runtime import cubin_cache
from megalith.runtime.compile import Build, Compiled, CompileError, cache_key, compile_all, compiled, cubin

KERNEL = '#include "a.cuh"\nextern "C" __global__ void fill(int* y) { y[threadIdx.x] = VALUE + ADDED; }\n'


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one kernel with a header that includes another; the cache is empty."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "fill.cu").write_text(KERNEL)
    (folder / "a.cuh").write_text('#pragma once\n  #  include "b.cuh"\n')
    (folder / "b.cuh").write_text('#pragma once\n#include "a.cuh"\n#define ADDED 1\n')
    monkeypatch.setattr(compiling, "KERNELS", folder)
    monkeypatch.setenv("MEGALITH_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Build]:
    """What NVRTC was asked for."""
    asked: list[Build] = []
    real = compiling._compile

    def compile_and_note(build: Build) -> Compiled:
        asked.append(build)
        return real(build)

    monkeypatch.setattr(compiling, "_compile", compile_and_note)
    return asked


FILL = Build.of("fill", "sm_90a", VALUE=3)


def entries(kernels: Path) -> list[Path]:
    return sorted((kernels.parent / "cache").iterdir())


def test_a_second_start_compiles_nothing(kernels: Path, compilations: list[Build]) -> None:
    first = compiled(FILL)
    assert first.cubin.startswith(b"\x7fELF")
    assert "Compiling entry function 'fill' for 'sm_90a'" in first.log
    assert compiled(FILL) == first
    assert compilations == [FILL]
    [entry] = entries(kernels)
    assert entry.suffix == ".cubin"
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700


def test_all_that_a_cubin_depends_on_is_in_its_key(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [cache_key(FILL)]
    for build in (
        Build.of("fill", "sm_80", VALUE=3),
        Build.of("fill", "sm_90a", VALUE=4),
        Build.of("fill", "sm_90a", VALUE=3, B=1),
    ):
        keys.append(cache_key(build))
    for name in ("fill.cu", "a.cuh", "b.cuh"):
        path = kernels / name
        path.write_text(path.read_text() + "// changed\n")
        keys.append(cache_key(FILL))
    monkeypatch.setattr(compiling, "nvrtc_version", lambda: "another")
    keys.append(cache_key(FILL))
    assert len(set(keys)) == len(keys)
    assert Build.of("fill", "sm_80", B=1, A=2) == Build.of("fill", "sm_80", A=2, B=1)
    (kernels / "unrelated.cuh").write_text("")
    assert cache_key(FILL) == keys[-1]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_entry_is_built_again(kernels: Path, compilations: list[Build], damage: bytes | None) -> None:
    whole = cubin(FILL)
    [entry] = entries(kernels)
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data if damage is None else damage)
    assert cubin(FILL) == whole
    assert len(compilations) == 2
    assert cubin(FILL) == whole
    assert len(compilations) == 2


def test_a_source_that_changes_while_it_compiles_is_not_cached(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiling._compile

    def compile_and_edit(build: Build) -> Compiled:
        (kernels / "b.cuh").write_text("#pragma once\n#define ADDED 2\n")
        return real(build)

    monkeypatch.setattr(compiling, "_compile", compile_and_edit)
    cubin(FILL)
    assert not (kernels.parent / "cache").exists()


@pytest.mark.parametrize("obstacle", ["a file", "no home"])
def test_without_a_folder_to_write_every_start_compiles(
    kernels: Path, compilations: list[Build], monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    if obstacle == "a file":
        (kernels.parent / "cache").write_text("in the way")
    else:
        monkeypatch.setattr(cubin_cache, "folder", lambda: None)
    assert cubin(FILL) == cubin(FILL)
    assert len(compilations) == 2


def test_a_failed_write_leaves_no_temporary_file(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        assert not cubin_cache.write("key", b"content")
    assert entries(kernels) == []
    assert cubin_cache.write("key", b"content")
    assert cubin_cache.read("key") == b"content"


def test_parallel_writers_and_readers_see_whole_entries(kernels: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(cubin_cache.write, "key", contents[i % 8]) for i in range(200)]
        found = [pool.submit(cubin_cache.read, "key") for _ in range(200)]
        assert all(future.result() for future in done)
        assert all(future.result() in (None, *contents) for future in found)
    assert [path.name for path in entries(kernels)] == ["key.cubin"]


def test_folder_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEGALITH_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cubin_cache.folder() == tmp_path / ".cache" / "megalith"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cubin_cache.folder() == Path("/x/megalith")
    monkeypatch.setenv("MEGALITH_CACHE", "/y")
    assert cubin_cache.folder() == Path("/y")


@pytest.mark.usefixtures("kernels")
def test_errors_carry_the_compilers_log() -> None:
    with pytest.raises(CompileError, match=r"fill.cu for sm_90a: (.|\n)*fill.cu\(2\): error: identifier \"VALUE\""):
        cubin(Build.of("fill", "sm_90a"))
    with pytest.raises(CompileError, match=r"-DVALUE=1 for sm_7: (.|\n)*invalid value for --gpu-architecture"):
        cubin(Build.of("fill", "sm_7", VALUE=1))
    with pytest.raises(CompileError, match=r"absent.cu: No such file"):
        cubin(Build.of("absent", "sm_90a"))
    assert issubclass(CompileError, MegalithError)


def test_workers_bring_cubins_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are processes of their own: they compile the real kernels."""
    monkeypatch.setenv("MEGALITH_CACHE", str(tmp_path / "cache"))
    good = [Build.of("embedding", arch, ELEMENT_BF16=1) for arch in ("sm_80", "sm_90a")]
    results = compile_all(good, 2)
    assert list(results) == good
    assert all(result.cubin.startswith(b"\x7fELF") for result in results.values())
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert compile_all(good * 2, 2) == results
    broken = Build.of("embedding", "sm_90a", ELEMENT_BF16=1, ELEMENT_F16=1)
    with pytest.raises(CompileError, match="define exactly one of"):
        compile_all([*good, broken, Build.of("embedding", "sm_80", ELEMENT_F16=1)], 2)
