"""How long a sequence can be on a GPU, and what is said to whoever wants more."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_models import GoldenModel

import megalith
from megalith.converter.plan import Options
from megalith.format.errors import RequestError
from megalith.runtime.cupy_device import longest_context


def test_dynamic_rope_ends_with_its_table(tmp_path: Path) -> None:
    with megalith.open(GoldenModel("llama_dynamic").pack(tmp_path)) as packed:
        index = packed.index
    original = index.rope.original_max_position_embeddings
    assert index.config.max_seq_len > original
    assert longest_context(index, None) == original
    assert longest_context(index, original - 1) == original - 1
    with pytest.raises(RequestError, match=rf"max_seq_len {original + 1}: .* up to {original} positions .* --backend numpy"):
        longest_context(index, original + 1)


def test_others_reach_what_the_file_is_for(tmp_path: Path) -> None:
    with megalith.open(GoldenModel("llama_linear").pack(tmp_path, Options(max_seq_len=300))) as packed:
        index = packed.index
    assert longest_context(index, None) == longest_context(index, 300) == 300
    with pytest.raises(RequestError, match=r"up to 300 positions of this file$"):
        longest_context(index, 301)
