"""Kernels in the current context: compiled in parallel where several are missing, loaded once, found again by their build."""

from __future__ import annotations

from collections.abc import Iterable

from .compile import Build, Compiled, compile_all
from .launch import Kernel, Module
from .trace import Trace, host_span

Wanted = tuple[Build, str]  # a build and its entry point


class LoadedKernels:
    """For one thread at a time, whose track in the trace has what is compiled or read, and loaded."""

    def __init__(self, trace: Trace | None = None) -> None:
        self._trace = trace
        self._modules: dict[Build, Module] = {}
        self._kernels: dict[Wanted, Kernel] = {}

    def get(self, build: Build, entry: str) -> Kernel:
        """One of them, loaded now if it was not."""
        if (build, entry) not in self._kernels:
            self.load([(build, entry)])
        return self._kernels[build, entry]

    def load(self, wanted: Iterable[Wanted]) -> None:
        """All of them, code on the device included. Raises CompileError for the first that does not compile."""
        missing = [each for each in wanted if each not in self._kernels]
        if not missing:
            return
        builds = list(dict.fromkeys(build for build, _ in missing if build not in self._modules))
        with host_span(self._trace, "compile or read kernels", builds=len(builds)):
            compiled = compile_all(builds)
        for build, entry in missing:
            with host_span(self._trace, f"load {entry}", build=str(build)):
                self._kernels[build, entry] = self._module(build, compiled).kernel(entry)

    def _module(self, build: Build, compiled: dict[Build, Compiled]) -> Module:
        if build not in self._modules:
            self._modules[build] = Module(build, compiled[build])
        return self._modules[build]
