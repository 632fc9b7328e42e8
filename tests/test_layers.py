"""Who may import whom: format stands alone, converter and runtime know it and not each other, nothing needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVE_EXTRA = {"httptools", "llguidance", "msgspec", "prometheus_client", "starlette", "uvicorn", "uvloop"}
GPU = {"cuda", "cupy"}
ALLOWED = {
    "format": {"numpy", "msgpack", "zstandard", "xxhash", "ml_dtypes"},
    "converter": {"numpy", "xxhash", "megalith.format", "megalith.version"},
    "runtime": {
        "numpy",
        "tokenizers",
        "jinja2",
        "tqdm",
        "xxhash",
        "megalith.format",
        "megalith.runtime",
        "megalith.version",
        "megalith.__version__",
    }
    | SERVE_EXTRA
    | GPU,
}


def imported(path: Path) -> Iterator[str]:
    """Absolute names that a module imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" if node.module == "megalith" else node.module for alias in node.names)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            known = top in sys.stdlib_module_names or any(name == a or name.startswith(a + ".") for a in ALLOWED[folder])
            assert known, f"{path.relative_to(ROOT)} imports {name}"


def test_opening_a_file_imports_no_converter_and_no_runtime() -> None:
    script = "import sys, megalith; megalith.open; import megalith.format.reader; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = done.stdout.split()
    assert "megalith.format.reader" in loaded
    assert not [name for name in loaded if name.startswith(("megalith.converter", "megalith.runtime", "torch", "click"))]


@pytest.mark.parametrize(
    "module", ["megalith.cli", "megalith.commands.serve", "megalith.commands.generate", "megalith.runtime.engine"]
)
def test_only_serving_imports_the_serve_extra(module: str) -> None:
    script = f"import sys, {module}; print(*sorted(set({sorted(SERVE_EXTRA)}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
