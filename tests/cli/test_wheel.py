"""The built wheel, alone in an empty environment outside the checkout, runs every command."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from golden_models import GOLDEN_MODELS

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = GOLDEN_MODELS / "llama_sharded"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():
        if name.split("/")[0] in {"megalith", "format", "converter", "runtime", "pyproject.toml", "README.md", "LICENSE"}:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, source], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folders = {
        "megalith": "megalith",
        "format": "megalith/format",
        "converter": "megalith/converter",
        "runtime": "megalith/runtime",
    }
    for folder, inside in folders.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cu", ".cuh", ".typed", ".html"}:
                assert f"{inside}/{path.relative_to(ROOT / folder)}" in names
    assert all(name.startswith("megalith") for name in names)


def test_every_command_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, cwd=tmp_path, capture_output=True)

    def megalith(*arguments: str) -> str:
        command = [tmp_path / "env" / "bin" / "megalith", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "convert" in megalith("--help")
    megalith("convert", str(CHECKPOINT), "model.lith")
    assert "match their checksums" in megalith("verify", "model.lith", "--against", str(CHECKPOINT))
    assert "LlamaForCausalLM" in megalith("inspect", "model.lith")
    megalith("inspect", "model.lith", "--heatmap", "model.html")
    assert megalith("diff", "model.lith", "model.lith")
    assert "tensors" in megalith("unpack", "model.lith", "back")
    script = "import megalith; print(megalith.load('model.lith').logits([1, 2]).shape[0])"
    done = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"
    refused = subprocess.run([python, "-m", "megalith", "generate", "model.lith", "--prompt", "x"], cwd=tmp_path, check=False)
    assert refused.returncode == 2  # this checkpoint has no tokenizer; tests/test_end_to_end.py generates from one that has
