"""The golden models: tiny checkpoints with logits from transformers (tools/make_golden.py, tools/make_golden_moe.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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
