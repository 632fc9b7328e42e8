"""Make the golden files of the format in specs/golden/: valid/<name>.lith and invalid/<RULE>-<what>.lith.

    python tools/make_format_golden.py [--out specs/golden] [--check]

Deterministic: another run gives the same bytes (with the zstd that pyproject.toml pins). Golden files of a released
version never change; a new version adds files. `--check` writes nothing and fails if a file differs. Files of `KEPT` were
made by an older version of this tool and are left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from golden_tensors import GPT_OSS_BF16, GPT_OSS_MXFP4, RESAVED, Fused, pack_blob, place_tensors, source_content
from packed_parts import (
    FEATURES_OFFSET,
    Parts,
    assemble,
    compress,
    field,
    flipped,
    section_entry,
    start_of,
    with_cells,
    with_checksums,
    with_index,
)

from megalith.format import canonical
from megalith.format.constants import FEATURES, HEADER_BYTES, SECTION_KINDS
from megalith.format.entries import NO_SOURCE, build_blob_table, build_source_table, build_tensor_table
from megalith.format.experts import expert_index
from megalith.format.files import pack_files
from megalith.format.index import Index, decompress, encode_index, features_of
from megalith.format.model import ModelConfig, blob_specs
from megalith.format.records import encode_records
from megalith.format.rope import RopeParameters, section_pieces

GOLDEN = Path(__file__).resolve().parent.parent / "specs" / "golden"
KEPT = ("invalid/H3-version-0.1.lith",)  # a whole valid file of a version before this one
MINIMAL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=19, hidden_size=24, intermediate_size=20, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True,
    max_position_embeddings=8, max_seq_len=8, layer_windows=[0], sparse_layers=[False],
)  # fmt: skip
DENSE = replace(
    MINIMAL, num_attention_heads=2, head_dim=32, hidden_size=40, intermediate_size=12, qkv_bias=True, o_bias=True,
    mlp_bias=True, qk_norm="head", bos_token_id=1, eos_token_ids=[2, 18],
)  # fmt: skip
HALF = replace(MINIMAL, head_dim=10, num_attention_heads=2, tie_word_embeddings=False, layer_windows=[4])
MXFP4 = replace(MINIMAL, hidden_size=160, intermediate_size=20)
MOE = replace(
    MINIMAL, architecture="OlmoeForCausalLM", num_hidden_layers=3, layer_windows=[0, 2, 0], sparse_layers=[True, False, True],
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=9, router_bias=True, expert_bias=True, qk_norm="full",
    attention_sinks=True, num_attention_heads=2, clip_qkv=6.5, norm_topk_prob=True,
)  # fmt: skip
FUSED = replace(
    MINIMAL, architecture="MixtralForCausalLM", sparse_layers=[True], num_experts=2, num_experts_per_tok=1,
    moe_intermediate_size=20,
)  # fmt: skip
GPT_OSS = replace(
    FUSED, architecture="GptOssForCausalLM", hidden_size=64, moe_intermediate_size=32, router="top_k_then_softmax",
    router_bias=True, expert_bias=True, attention_sinks=True, swiglu_limit=7.0,
)  # fmt: skip
DEFAULT_ROPE = RopeParameters("default", 1e4)
LLAMA3 = RopeParameters(
    "llama3", 5e5, {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8.0}
)
YARN = RopeParameters(
    "yarn", 1.5e5,
    {"attention_factor": 1.25, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 4.0,
     "original_max_position_embeddings": 4096.0, "truncate": False},
)  # fmt: skip
DYNAMIC = RopeParameters("dynamic", 1e4, {"factor": 2.0, "original_max_position_embeddings": 4.0})
FILES = {"config.json": b'{"model_type": "llama"}\n', "tokenizer.json": b'{"version": "1.0"}\n'}
METADATA = {"author": "golden", "licence": "Apache-2.0", "rating": 4.5, "reviewed": True, "revision": 7}


def build(
    config: ModelConfig,
    rope: RopeParameters = DEFAULT_ROPE,
    dtypes: tuple[str, str] = ("BF16", "BF16"),
    files: dict[str, bytes] | None = None,
    metadata: dict[str, Any] | None = None,
    quantised: str = "",
    fused: tuple[Fused, ...] = (),
) -> Parts:
    """The parts of a valid file; `dtypes` are those of vectors and of tiles.

    Matrices that may be MXFP4 are if their names contain `quantised`. `fused` are the checkpoint's tensors of layer 0
    that hold all experts.
    """
    specs, image, records = blob_specs(config), b"", []
    stored = [dtypes[spec.is_matrix] for spec in specs]
    if quantised:
        stored = ["MXFP4" if spec.may_be_mxfp4 and quantised in spec.name else d for spec, d in zip(specs, stored, strict=True)]
    entries, sources = place_tensors(specs, stored, config.num_experts, fused)
    content = source_content(specs, stored, entries)
    for spec, dtype in zip(specs, stored, strict=True):
        parts = [content.pop(0) for _ in spec.parts]
        image += pack_blob(spec, [part.stored for part in parts], dtype)
        records += [part.record for part in parts]
    file_entries, frames = pack_files(files or {})
    positions = min(8, rope.original_max_position_embeddings) if rope.type == "dynamic" else config.max_seq_len
    blobs = build_blob_table(specs, stored)
    index = Index(
        config, rope, positions, blobs, build_tensor_table(entries), build_source_table(sources), file_entries,
        {"library_version": "0.1.0", "options": {"dtype": "auto"}}, expert_index(config, blobs),
    )  # fmt: skip
    used = features_of(index)
    return with_checksums(
        Parts(
            index=raw_index(encode_index(index)),
            image=image,
            rope=b"".join(section_pieces(rope, config.head_dim, positions)),
            files=frames,
            records=encode_records(records),
            features=sum(1 << bit for bit, name in FEATURES.items() if name in used),
            metadata=canonical.encode(metadata) if metadata else b"",
        )
    )


def raw_index(stored: bytes) -> Any:
    """The MessagePack value of an index section."""
    return canonical.decode(decompress(stored, 1 << 20, "index", "I1"), "index", "I2", 1 << 16, 8)


def valid_parts() -> dict[str, Parts]:
    """The valid golden files by name."""
    return {
        "minimal": build(MINIMAL),
        "dense": build(DENSE, LLAMA3, files=FILES),
        "half": build(HALF, YARN, ("F32", "F16")),
        "metadata": build(MINIMAL, DYNAMIC, metadata=METADATA),
        "mxfp4": build(MXFP4, quantised="proj"),
        "moe": build(MOE),
        "fused": build(FUSED, fused=RESAVED),
        "fused-transposed": build(GPT_OSS, fused=GPT_OSS_BF16),
        "fused-mxfp4": build(GPT_OSS, quantised="experts", fused=GPT_OSS_MXFP4),
    }


def header_cases(parts: Parts) -> Iterator[tuple[str, bytes]]:
    file = assemble(parts)
    block = file[:HEADER_BYTES]  # of another format or version nothing else is known
    yield "H1-other-format", b"GGUF\x03\x00\x00\x00".ljust(64, b"\0")
    yield "H1-empty", b""
    yield "H2-short", file[: HEADER_BYTES - 1]
    yield "H3-newer-minor", field(block, 10, "<H", 3)
    yield "H3-newer-major", field(block, 8, "<H", 1)
    yield "H3-older", field(block, 10, "<H", 0)
    yield "H4-header-bytes", field(file, 12, "<I", 8192)
    yield "H5-header-bit", flipped(file, 300)
    yield "H6-unknown-feature", field(file, FEATURES_OFFSET, "<Q", 1 | 1 << 40)
    yield "H7-truncated", file[:-4096]
    yield "H8-reserved", field(file, section_entry("image") + 4, "<I", 1)
    yield "H9-array", assemble(replace(parts, metadata=canonical.encode(["not", "a", "map"])))
    yield "H10-features", assemble(replace(parts, features=3))


def section_cases(parts: Parts) -> Iterator[tuple[str, bytes]]:
    file = assemble(parts)
    kinds = list(SECTION_KINDS)
    yield "S1-kind", field(file, section_entry("rope"), "<I", kinds[-1])
    yield "S2-overlap", field(file, section_entry("rope") + 8, "<Q", start_of(file, "rope") - 4096)
    yield "S3-index-bytes", field(file, section_entry("index") + 16, "<Q", (16 << 20) + 1)
    yield "S4-index-bit", flipped(file, start_of(file, "index") + 100)
    yield "S5-padding", flipped(file, start_of(file, "image") - 1)


def index_cases(parts: Parts) -> Iterator[tuple[str, bytes]]:
    encoded = canonical.encode(parts.index)
    undeclared = zstandard.ZstdCompressor(level=9, write_content_size=False).compress(encoded)
    twice = b"\x89" + encoded[1:] + canonical.encode("blobs") + canonical.encode(None)
    config = parts.index["config"]
    yield "I1-undeclared-size", assemble(replace(parts, stored_index=undeclared))
    yield "I2-duplicate-key", assemble(replace(parts, stored_index=compress(twice)))
    yield "I3-missing-key", assemble(replace(parts, index={k: v for k, v in parts.index.items() if k != "experts"}))
    yield "I4-heads", with_index(parts, "config", to={**config, "num_attention_heads": 3, "num_key_value_heads": 2})
    yield "I4-experts", with_index(parts, "config", "sparse_layers", to=[True])


def table_cases(parts: Parts) -> Iterator[tuple[str, bytes]]:
    blobs, tensors = parts.index["blobs"], parts.index["tensors"]
    escape, twice = tensors["names"].replace("model.norm", "model.\x1b[2J"), tensors["names"].replace("k_proj", "q_proj")
    first_two = "\n".join(reversed(blobs["names"].split("\n")[:2]))
    swapped = "\n".join([first_two, *blobs["names"].split("\n")[2:]])
    yield "B1-column-length", with_index(parts, "blobs", "layout", to=blobs["layout"][:-1])
    yield "B2-dtype", with_cells(parts, "blobs", 0, dtype=9)
    yield "B2-mxfp4-in-tiles", with_cells(parts, "blobs", 2, dtype=4)
    yield "B3-nbytes", with_cells(parts, "blobs", 2, nbytes=2**63)
    yield "B4-overlap", with_cells(parts, "blobs", 1, offset=0)
    yield "B5-order", with_index(parts, "blobs", "names", to=swapped)
    embedding = with_cells(parts, "blobs", 0, dtype=4, layout=3, columns=128, nbytes=2 * 1088)  # as many pages of 4096
    yield "B5-mxfp4-embedding", field(embedding, FEATURES_OFFSET, "<Q", 5)
    yield "T1-escape", with_index(parts, "tensors", "names", to=escape)
    yield "T1-duplicate", with_index(parts, "tensors", "names", to=twice)
    yield "T2-blob", with_cells(parts, "tensors", 3, blob=8)
    yield "T3-source-dtype", with_cells(parts, "tensors", 0, source_dtype=0)
    yield "T3-mxfp4-unpacked", with_cells(parts, "tensors", 2, source_dtype=4)
    yield "T4-row-order", with_cells(parts, "tensors", 2, row_order=7)
    yield "T5-row-base", with_cells(parts, "tensors", 3, row_base=32)
    yield "O3-place-in-no-source", with_cells(parts, "tensors", 2, row_stride=24)


def rope_cases(parts: Parts) -> Iterator[tuple[str, bytes]]:
    yield "R1-parameters", with_index(parts, "rope", "parameters", to={"factor": 2.0})
    yield "R2-positions", with_index(parts, "rope", "positions", to=7)
    yield "R3-section", assemble(replace(parts, rope=parts.rope + bytes(8)))


def content_cases(parts: Parts) -> Iterator[tuple[str, bytes]]:
    file, with_files = assemble(parts), build(MINIMAL, files=FILES)
    entry = with_files.index["files"][0]
    broken = bytes([with_files.files[0] ^ 1]) + with_files.files[1:]
    other = hashlib.sha256(b"another file").digest()
    yield "F1-name", with_index(with_files, "files", 0, "name", to="../../etc/passwd")
    yield "F2-gap", with_index(with_files, "files", 1, "offset", to=entry["stored_nbytes"] + 1)
    yield "F3-not-zstd", assemble(with_checksums(replace(with_files, files=broken)))
    yield "F4-sha256", with_index(with_files, "files", 0, "sha256", to=other)
    yield "D1-missing", assemble(replace(parts, records=parts.records[:-64]))
    records = parts.records[:-24] + struct.pack("<3d", 0.0, 1.0, math.inf)
    yield "D2-noise-infinite", assemble(with_checksums(replace(parts, records=records)))
    yield "C1-missing", assemble(replace(parts, checksums=parts.checksums[:-8]))
    yield "C2-image-bit", flipped(file, start_of(file, "image") + 4096)


def expert_cases(parts: Parts) -> Iterator[tuple[str, bytes]]:
    table = np.frombuffer(parts.index["experts"]["table"], "<u8").reshape(-1, 2)  # 2 experts of 2 matrices

    def with_range(number: int, offset: int, nbytes: int) -> bytes:
        changed = table.copy()
        changed[number] = offset, nbytes
        return with_index(parts, "experts", "table", to=changed.tobytes())

    offset, nbytes = (int(x) for x in table[3])
    yield "X1-layer", with_index(parts, "experts", "layers", to=struct.pack("<I", 1))
    yield "X1-missing", with_index(parts, "experts", to=None)
    yield "X2-overflow", with_range(3, 2**64 - 256, 512)
    yield "X2-unaligned", with_range(2, int(table[2, 0]) + 256, 256)
    yield "X3-overlap", with_range(3, offset - 2048, nbytes)
    yield "X4-swapped", with_index(parts, "experts", "table", to=table[[2, 3, 0, 1]].tobytes())


def source_cases(parts: Parts) -> Iterator[tuple[str, bytes]]:
    """Of the concatenated form: up of expert 0 is tensor 9 and elements 480 to 959 of source 0."""
    sources, names = parts.index["sources"], parts.index["sources"]["names"]
    yield "O1-column-length", with_index(parts, "sources", "dim0", to=sources["dim0"] + bytes(8))
    yield "O2-dtype", with_cells(parts, "sources", 0, dtype=4)
    yield "O2-name-of-a-tensor", with_index(parts, "sources", "names", to=names.replace("gate_up_proj", "0.gate_proj.weight"))
    yield "O3-source", with_cells(parts, "tensors", 9, source=2)
    yield "O4-dtype", with_cells(parts, "sources", 0, dtype=2)
    yield "O4-outside", with_cells(parts, "tensors", 9, start=1920 - 479)
    yield "O4-overflow", with_cells(parts, "tensors", 9, start=2**64 - 480)
    yield "O4-stored", with_cells(parts, "blobs", 8, dtype=2)
    yield "O5-overlap", with_cells(parts, "tensors", 9, start=24)
    yield "O5-itself", with_cells(parts, "tensors", 9, row_stride=1)
    yield "O5-missing", with_cells(parts, "sources", 0, dim0=3)


def mxfp4_cases(parts: Parts) -> Iterator[tuple[str, bytes]]:
    """Of codes and scales as gpt-oss has them: gate and up of expert 0 are blob 8, up is tensor 11, in sources 0 and 1."""
    yield "B3-mxfp4-columns", with_cells(parts, "blobs", 8, columns=96)
    yield "B3-mxfp4-nbytes", with_cells(parts, "blobs", 8, nbytes=64 * 128 // 2)
    yield "O3-no-scales", with_cells(parts, "tensors", 11, scales=NO_SOURCE)
    yield "O4-scales", with_cells(parts, "sources", 1, dim0=1)
    yield "O4-half-a-block", with_cells(parts, "tensors", 11, start=8)


def golden_files() -> dict[str, bytes]:
    """Every golden file that this version makes, by its path below specs/golden."""
    valid = valid_parts()
    files = {f"valid/{name}.lith": assemble(parts) for name, parts in valid.items()}
    minimal: list[Callable[[Parts], Iterator[tuple[str, bytes]]]]
    minimal = [header_cases, section_cases, index_cases, table_cases, rope_cases, content_cases]
    invalid = [case for make in minimal for case in make(valid["minimal"])]
    invalid += [*expert_cases(valid["fused"]), *source_cases(valid["fused"]), *mxfp4_cases(valid["fused-mxfp4"])]
    return files | {f"invalid/{name}.lith": data for name, data in invalid}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the golden files of the format.")
    parser.add_argument("--out", type=Path, default=GOLDEN)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file differs")
    options = parser.parse_args()
    differing = 0
    for name, data in golden_files().items():
        path = options.out / name
        if path.is_file() and path.read_bytes() == data:
            continue
        differing += 1
        print(f"{name}: {'differs' if options.check else 'written'}")
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
