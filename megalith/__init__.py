"""Megalith packs a Hugging Face checkpoint into one file in kernel order, and runs that file.

>>> packed = megalith.open("model.lith")      # no GPU, no tensor read yet
>>> engine = megalith.load("model.lith")      # backend "auto", "numpy" or "cupy"

Everything else is imported on first use, so that `import megalith` stays fast.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from megalith.format.reader import PackedFile
    from megalith.runtime.engine import Engine
    from megalith.runtime.trace import Trace

__all__ = ["__version__", "load", "open"]

_checkout = os.path.dirname(os.path.dirname(__file__))
if os.path.isfile(os.path.join(_checkout, "format", "constants.py")):
    # Python started in the root of a checkout finds this folder first: its subpackages lie beside it (pyproject.toml)
    __path__.append(_checkout)


def open(path: str | os.PathLike[str]) -> PackedFile:
    """Open a packed file: its header and index are checked, no tensor is read.

    Raises megalith.format.errors.MegalithError: FormatError for a file that breaks the specification, CorruptionError
    for one whose checksums do not match, UnsupportedError for another version, FileError for the operating system's.
    """
    from megalith.format.reader import PackedFile

    return PackedFile(path)


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    *,
    max_seq_len: int | None = None,
    use_graphs: bool = True,
    trace: Trace | None = None,
) -> Engine:
    """An engine that runs a packed file. `max_seq_len` bounds the KV cache; the default is the file's own.

    Without `use_graphs` the CuPy backend launches every kernel of a decode step by itself; NumPy has no graphs.
    `trace` takes spans of loading and of all that the engine does.

    Raises RequestError for an unknown backend, and what `open` raises.
    """
    from megalith.runtime.engine import Engine

    return Engine(path, backend=backend, max_seq_len=max_seq_len, use_graphs=use_graphs, trace=trace)
