"""The built wheel, alone in an empty environment outside the checkout, runs every command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from golden_models import GOLDEN, GOLDEN_MODELS
from tokenizers import Tokenizer, models, pre_tokenizers

from megalith.cli import COMMANDS

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = GOLDEN_MODELS / "llama_sharded"
MIXTURE = GOLDEN / "moe" / "mixtral"


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
    output_of(sys.executable, "-m", "build", "--wheel", "--outdir", folder, source, folder=folder)
    return next(folder.glob("*.whl"))


@pytest.mark.xdist_group("wheel")
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
            if path.suffix in {".py", ".cu", ".cuh", ".html", ".typed"}:
                assert f"{inside}/{path.relative_to(ROOT / folder)}" in names
    assert all(name.startswith("megalith") for name in names)


@pytest.mark.xdist_group("wheel")
def test_every_command_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python, used = tmp_path / "env" / "bin" / "python", set()
    output_of(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[serve]", folder=tmp_path)
    source = with_tokenizer(tmp_path / "source")

    def megalith(command: str, *arguments: object) -> str:
        used.add(command)
        return output_of(tmp_path / "env" / "bin" / "megalith", command, *arguments, folder=tmp_path)

    assert all(command in megalith("--help") for command in COMMANDS)
    assert json.loads(megalith("convert", source, "model.lith", "--json"))["tensors"] == 30
    megalith("convert", MIXTURE, "mixture.lith", "--experts", "mxfp4")
    assert "match their checksums" in megalith("verify", "model.lith", "--against", source)
    assert "LlamaForCausalLM" in megalith("inspect", "model.lith")
    page = ["--tensor", "model.embed_tokens.weight", "--tile", "0,0", "--hex"]
    for options in (["--tree"], page, ["--stats"], ["--experts"], ["--memory"], ["--heatmap", "model.html"]):
        assert megalith("inspect", "mixture.lith", *options)
    assert "30 equal" in megalith("diff", "model.lith", "model.lith")
    assert "30 tensors" in megalith("unpack", "model.lith", "back")
    megalith("convert", "back", "again.lith")
    assert (tmp_path / "again.lith").read_bytes()[8192:] == (tmp_path / "model.lith").read_bytes()[8192:]
    for prompt in (["--prompt", "w5 w9"], ["--chat", "w5 w9"]):
        answer = json.loads(megalith("generate", "model.lith", *prompt, "--max-tokens", 3, "--ignore-eos", "--json"))
        assert (answer["prompt_ids"], len(answer["ids"])) == ([5, 9], 3)
    assert "max_seq_len" in megalith("serve", "model.lith", "--backend", "numpy", "--dry-run", "--json")
    bench = [tmp_path / "env" / "bin" / "megalith", "bench", "model.lith"]
    refused = subprocess.run(bench, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, "needs CuPy" in refused.stderr) == (4, True)  # the wheel is installed without a GPU's packages
    assert used | {"bench"} == {"--help", *COMMANDS}
    script = "import megalith; print(megalith.load('model.lith').logits([1, 2]).shape, megalith.__file__)"
    shape, place = output_of(python, "-c", script, folder=tmp_path).rsplit(maxsplit=1)
    assert shape == "(2, 131)"
    assert Path(place).is_relative_to(tmp_path / "env")


def output_of(*command: object, folder: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_tokenizer(folder: Path) -> Path:
    """The golden checkpoint with a tokenizer of words "w0" to "w130" and a chat template that adds nothing to the message."""
    shutil.copytree(CHECKPOINT, folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(131)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    return folder
