"""Every kernel compiles for every supported architecture, without a GPU, and keeps its variables in registers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalith.runtime.compile import KERNELS, Build, Compiled, compile_all, source_texts
from megalith.runtime.kernel_builds import ARCHITECTURES, builds

BUILDS = [build for arch in ARCHITECTURES for build in builds(arch)]

# kernel and architecture -> bytes of stack frame or spills that are known and accepted, with the reason
ACCEPTED_LOCAL_BYTES = {
    ("linear", "sm_90a"): 32,  # capped at 72 registers, so that an attention fits beside two products (BOUND_THREADS)
}

_PROPERTIES = re.compile(
    r"Function properties for (\S+)\n\s*ptxas\s*\.?\s*(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads"
)


@pytest.fixture(scope="module")
def compiled_all(request: pytest.FixtureRequest) -> Iterator[dict[Build, Compiled]]:
    """All builds, from pytest's own cache folder where their sources have not changed."""
    assert request.config.cache is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGALITH_CACHE", str(request.config.cache.mkdir("cubins")))
        yield compile_all(BUILDS)


@pytest.mark.xdist_group("kernel_builds")
@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_compiles_without_spills(compiled_all: dict[Build, Compiled], build: Build) -> None:
    result = compiled_all[build]
    assert result.cubin.startswith(b"\x7fELF")
    found = _PROPERTIES.findall(result.log)
    assert found, result.log
    for entry, *sizes in found:
        accepted = ACCEPTED_LOCAL_BYTES.get((build.source, build.arch), 0)
        assert max(map(int, sizes)) <= accepted, f"{entry}: stack, spill stores, spill loads {sizes}"
    for complaint in ("Potential Performance Loss", "setmaxnreg ignored", "warning"):
        assert complaint not in result.log, result.log


def test_every_kernel_has_builds() -> None:
    files = {path.stem for path in KERNELS.glob("*.cu")}
    for arch in ARCHITECTURES:
        assert {build.source for build in builds(arch)} <= files
    assert {build.source for build in BUILDS} == files


def test_every_define_is_used() -> None:
    """A misspelt -D option would compile the default instead."""
    for build in BUILDS:
        text = "".join(source_texts(build.source).values())
        unknown = [name for name, _ in build.defines if not re.search(rf"\b{name}\b", text)]
        assert not unknown, build


def test_kernels_include_only_what_is_shipped() -> None:
    """Headers in angle brackets would need a CUDA toolkit where the kernels are compiled."""
    for path in Path(KERNELS).iterdir():
        assert path.suffix in {".cu", ".cuh"}
        assert not re.findall(r"^\s*#\s*include\s*<.*", path.read_text(), re.MULTILINE), path
