"""Kernels compiled by NVRTC: `kernels/<name>.cu` with its defines, for one architecture, from the cache where it is there.

NVRTC compiles one program at a time in a process (its threads wait for each other), so many builds go to worker processes.
Compiling needs no GPU.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from megalith.format.errors import EXIT_UNSUPPORTED, MegalithError, UnsupportedError

from . import cubin_cache

KERNELS = Path(__file__).resolve().parent / "kernels"  # resolved: an editable install links to single files
_OPTIONS = ("-std=c++17", "--ptxas-options=-v")  # the only ones beside architecture and defines; part of the cache key
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


class CompileError(MegalithError):
    """A kernel does not compile, or there is no compiler; carries NVRTC's log."""

    exit_code = EXIT_UNSUPPORTED


@dataclass(frozen=True)
class Build:
    """One kernel file with its defines for one architecture, such as "sm_90a"."""

    source: str
    defines: tuple[tuple[str, int | str], ...]
    arch: str

    @classmethod
    def of(cls, source: str, arch: str, **defines: int | str) -> Build:
        """The same build whatever the order of the defines."""
        return cls(source, tuple(sorted(defines.items())), arch)

    def __str__(self) -> str:
        defines = "".join(f" -D{name}={value}" for name, value in self.defines)
        return f"{self.source}.cu{defines} for {self.arch}"


@dataclass(frozen=True)
class Compiled:
    """A cubin, and what ptxas said about registers, spills and shared memory."""

    cubin: bytes
    log: str

    def to_bytes(self) -> bytes:
        """u32 length of the log, log, cubin."""
        log = self.log.encode()
        return len(log).to_bytes(4, "little") + log + self.cubin

    @classmethod
    def from_bytes(cls, data: bytes) -> Compiled:
        stop = 4 + int.from_bytes(data[:4], "little")
        return cls(data[stop:], data[4:stop].decode())


def cubin(build: Build) -> bytes:
    """The cubin of one build. Raises CompileError with NVRTC's log."""
    return compiled(build).cubin


def compiled(build: Build) -> Compiled:
    """Cubin and resource report, from the cache or compiled now."""
    key = cache_key(build)
    found = cubin_cache.read(key)
    if found is not None:
        return Compiled.from_bytes(found)
    result = _compile(build)
    if cache_key(build) == key:  # else a source changed meanwhile, and this may be the build of either
        cubin_cache.write(key, result.to_bytes())
    return result


def compile_all(builds: Iterable[Build], processes: int | None = None) -> dict[Build, Compiled]:
    """Every build; those that are not cached by up to `processes` workers, by default one per core.

    Raises CompileError for the first that fails, in the order given.
    """
    wanted = list(dict.fromkeys(builds))
    cached = {build: cubin_cache.read(cache_key(build)) for build in wanted}
    missing = [build for build, found in cached.items() if found is None]
    count = min(processes or len(os.sched_getaffinity(0)), len(missing))
    if count <= 1:
        return {build: compiled(build) for build in wanted}
    with ThreadPoolExecutor(count, thread_name_prefix="nvrtc") as pool:
        shares = [missing[i::count] for i in range(count)]
        fresh = {build: result for share in pool.map(_run_worker, shares) for build, result in share.items()}
    results: dict[Build, Compiled] = {}
    for build, found in cached.items():
        result = fresh[build] if found is None else Compiled.from_bytes(found)
        if isinstance(result, str):
            raise CompileError(result)
        results[build] = result
    return results


def _run_worker(builds: Sequence[Build]) -> dict[Build, Compiled | str]:
    """What a process of its own makes of the builds: a result, or the words of its error."""
    from . import compile_worker

    command = [sys.executable, "-m", compile_worker.__name__]
    done = subprocess.run(command, input=compile_worker.encode_builds(builds), capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise CompileError(f"{builds[0]} and {len(builds) - 1} more: the compiler's process failed: {lines}")
    return dict(zip(builds, compile_worker.decode_results(done.stdout), strict=True))


def _compile(build: Build) -> Compiled:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise UnsupportedError(
            f"kernels need cuda-core and NVRTC: pip install 'megalith[cuda13]' or [cuda12] ({error})"
        ) from None
    options = ProgramOptions(
        name=f"{build.source}.cu",
        arch=build.arch,
        std="c++17",
        ptxas_options=["-v"],
        include_path=[str(KERNELS)],
        define_macro=[(name, str(value)) for name, value in build.defines] or None,
    )
    log = io.StringIO()
    try:
        binary = Program(_read(f"{build.source}.cu"), "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # cuda.core's own class of NVRTC errors is private
        raise CompileError(f"{build}: {str(error).rstrip(chr(0)).strip()}") from error
    assert isinstance(binary, bytes)
    return Compiled(binary, log.getvalue().rstrip("\0 \n"))


def cache_key(build: Build) -> str:
    """Names the build by all that its cubin depends on: texts, options, defines, compiler."""
    texts = source_texts(build.source)
    parts = [nvrtc_version(), build.arch, *_OPTIONS, *(f"{name}={value}" for name, value in build.defines)]
    return cubin_cache.key_of([*parts, *(part for name in sorted(texts) for part in (name, texts[name]))])


def source_texts(source: str) -> dict[str, str]:
    """Text by file name of a kernel and of every header that it includes, directly or not."""
    texts: dict[str, str] = {}
    waiting = [f"{source}.cu"]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = _read(name)
            waiting += _INCLUDE.findall(texts[name])
    return texts


def _read(name: str) -> str:
    try:
        return (KERNELS / name).read_text()
    except OSError as error:
        raise CompileError(f"{KERNELS / name}: {error.strerror or error}") from None


@cache
def nvrtc_version() -> str:
    """Of the package that brings NVRTC, to the patch level; of the library, less exact, where it comes otherwise."""
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            pass
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise UnsupportedError(f"kernels need NVRTC: pip install 'megalith[cuda13]' or [cuda12] ({error})") from None
    return f"nvrtc {major}.{minor}"
