"""`--no-cuda-graph` reaches the backend from every command that has it, seen from a backend that takes notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving_models import serving_model

import megalith
from megalith.cli import run
from megalith.runtime import cupy_backend, cupy_executor, engine_process, serving_plan
from megalith.runtime.bench import Bench, Plan


class RefusedError(Exception):
    """Ends what asked for the backend."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """`use_graphs` of every CuPy backend that is asked for; none is made."""
    found: list[bool] = []

    def backend(packed: object, *, use_graphs: bool = True, **others: Any) -> None:
        found.append(use_graphs)
        raise RefusedError

    monkeypatch.setattr(cupy_backend, "CupyBackend", backend)
    monkeypatch.setattr("megalith.runtime.bench.CupyBackend", backend)
    monkeypatch.setattr(cupy_executor, "CupyBackend", backend)
    return found


@pytest.mark.parametrize(("words", "expected"), [([], True), (["--no-cuda-graph"], False)])
def test_generate(asked: list[bool], tmp_path: Path, words: list[str], expected: bool) -> None:
    model = serving_model(tmp_path)
    with pytest.raises(RefusedError):
        run(["generate", str(model), "--prompt", "x", "--backend", "cupy", *words])
    assert asked == [expected]
    assert run(["generate", str(model), "--prompt", "x", "--backend", "numpy", "--max-tokens", "1", *words]) == 0


@pytest.mark.parametrize("use_graphs", [True, False])
def test_load_and_bench(asked: list[bool], packed_llama: Path, use_graphs: bool) -> None:
    with pytest.raises(RefusedError):
        megalith.load(packed_llama, backend="cupy", use_graphs=use_graphs)
    with pytest.raises(RefusedError):
        Bench(packed_llama, Plan([(1, 8)], [8], use_graphs))
    assert asked == [use_graphs] * 2


@pytest.mark.parametrize("use_graphs", [True, False])
def test_the_engine_process(asked: list[bool], packed_llama: Path, use_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    room = serving_plan._Memory(0, 1024, 1 << 20)
    monkeypatch.setattr(serving_plan, "_memory", lambda *arguments: room)
    with megalith.open(packed_llama) as packed:
        plan = serving_plan.serving_plan(packed, "cupy", use_graphs=use_graphs)
    with pytest.raises(RefusedError):
        engine_process.build_executor(plan.settings)
    assert asked == [use_graphs]


def test_serve_passes_it_on(packed_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def plan(*arguments: object, use_graphs: bool, **others: object) -> None:
        found.append(use_graphs)
        raise RefusedError

    monkeypatch.setattr(serving_plan, "serving_plan", plan)
    for words in ([], ["--no-cuda-graph"]):
        with pytest.raises(RefusedError):
            run(["serve", str(packed_llama), *words])
    assert found == [True, False]
