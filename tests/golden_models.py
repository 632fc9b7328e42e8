"""The golden models: tiny checkpoints with logits from transformers (tools/make_golden.py, tools/make_golden_moe.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalith.converter.convert import convert
from megalith.converter.plan import Options

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_MODELS = GOLDEN / "models"
DENSE_CASES = sorted(path.parent.name for path in GOLDEN_MODELS.glob("*/golden.npz"))
MOE_CASES = sorted(path.parent.name for path in (GOLDEN / "moe").glob("*/golden.npz"))
CASES = DENSE_CASES + MOE_CASES


@dataclass(frozen=True)
class GoldenModel:
    """One of them, by the name of its folder."""

    name: str

    @property
    def folder(self) -> Path:
        return (GOLDEN_MODELS if self.name in DENSE_CASES else GOLDEN / "moe") / self.name

    @property
    def config(self) -> dict[str, object]:
        loaded: dict[str, object] = json.loads((self.folder / "config.json").read_text())
        return loaded

    def pack(self, folder: Path, options: Options | None = None) -> Path:
        """Convert into `folder`; returns the packed file."""
        target = folder / f"{self.name}.lith"
        convert(self.folder, target, options, force=True)
        return target

    def id_sets(self) -> list[dict[str, np.ndarray]]:
        """The inputs of golden.npz, each with its positions and transformers' FP32 and 16-bit logits there."""
        arrays = np.load(self.folder / "golden.npz")
        suffixes = [name.removeprefix("ids") for name in arrays.files if name.startswith("ids")]
        keys = ("ids", "positions", "logits_fp32", "logits_bf16")
        return [{key: arrays[key + suffix] for key in keys} for suffix in suffixes]


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    """Of the whole array, by its norm."""
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
