"""The tables of specs/format.md say what the code says."""

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from spec_tables import SPEC, code, table

from megalith.format import (
    constants,
    dtypes,
    entries,
    errors,
    experts,
    files,
    header,
    index,
    model,
    mxfp4,
    records,
    rope,
    rows,
    tiles,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted((REPOSITORY / "format").glob("*.py"))
TYPES = {"u8": "u1", "u16": "H", "u32": "I", "u64": "Q"}


def coded(heading: str) -> dict[int, str]:
    first = next(iter(table(heading)[0]))
    return {int(row[first]): code(row["Name"]) for row in table(heading)}


def test_version():
    assert SPEC.startswith(f"# Megalith packed format, version {constants.VERSION_MAJOR}.{constants.VERSION_MINOR}\n")


def test_header_fields():
    place = 0
    for row in table("Header"):
        assert int(row["Offset"]) == place, row
        place += int(row["Bytes"])
    assert place == constants.HEADER_BYTES
    named = {code(row["Field"]): row for row in table("Header")}
    fixed = [row for row in table("Header") if int(row["Offset"]) < constants.SECTION_TABLE_OFFSET]
    layout = "<" + "".join("8s" if row["Type"] == "bytes" else TYPES[row["Type"]] for row in fixed)
    assert header._FIXED.format == layout
    assert named["magic"]["Meaning"].startswith(f"`{constants.MAGIC.hex(' ').upper()}`")
    assert int(named["metadata"]["Offset"]) == constants.METADATA_OFFSET
    assert int(named["metadata"]["Bytes"]) == constants.METADATA_CAPACITY_BYTES
    assert int(named["checksum"]["Offset"]) == constants.HEADER_CHECKSUM_OFFSET
    assert int(named["sections"]["Bytes"]) == constants.SECTION_ENTRY_BYTES * len(constants.SECTION_KINDS)
    assert named["header_bytes"]["Meaning"].startswith(str(constants.HEADER_BYTES))


def test_section_entry():
    assert header._ENTRY.format == "<" + "".join(TYPES[row["Type"]] for row in table("Section entry"))


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("Section kinds", constants.SECTION_KINDS),
        ("Feature bits", constants.FEATURES),
        ("Element types", constants.DTYPES),
        ("Layouts", constants.LAYOUTS),
        ("Row orders", constants.ROW_ORDERS),
    ],
)
def test_codes(heading: str, known: dict[int, str]):
    assert coded(heading) == known


def test_element_sizes():
    stated = {code(row["Name"]): row["Bytes"] for row in table("Element types")}
    assert stated.pop("MXFP4") == f"{mxfp4.BLOCK_BYTES + 1}/{mxfp4.BLOCK_ELEMENTS}"
    assert {name: int(size) for name, size in stated.items()} == dtypes.ITEM_BYTES


def test_stored_columns():
    for row in table("Layouts"):
        unit = entries.STORED_COLUMNS[code(row["Name"])]
        assert row["Stored columns"] == (f"ceil{unit}(columns)" if unit > 1 else "1")


def test_limits():
    modules = (constants, model, rope, experts, entries)
    stated = {code(row["Name"]): int(row["Value"]) for row in table("Limits")}
    in_code = {name: value for module in modules for name, value in vars(module).items() if name.startswith("MAX_")}
    assert stated == in_code


def test_index_keys():
    assert {code(row["Key"]) for row in table("Index keys")} == index._INDEX_KEYS


def test_model_config_keys():
    assert [code(row["Key"]) for row in table("Model config")] == [field.name for field in fields(model.ModelConfig)]


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("Blob table", entries.BLOB_COLUMNS),
        ("Tensor table", entries.TENSOR_COLUMNS),
        ("Source table", entries.SOURCE_COLUMNS),
    ],
)
def test_columns(heading: str, known: dict[str, str]):
    stated = {code(row["Column"]): np.dtype(row["Type"].replace("u8", "uint8").replace("u64", "<u8").replace("u32", "<u4"))
              for row in table(heading)}  # fmt: skip
    assert stated == {name: np.dtype(kind) for name, kind in known.items()}


def _config(**changes: object) -> model.ModelConfig:
    values = {"vocab_size": 19, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 3,
              "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2, "sparse_layers": [False, False]}  # fmt: skip
    return model.ModelConfig(
        architecture="A", rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=8, max_seq_len=8,
        **{"layer_windows": [0, 0]} | values | changes,
    )  # fmt: skip


def _expand(config: model.ModelConfig) -> list[tuple[str, tuple[bool, bool], str, int, int, str, int, int]]:
    """The parts of a model as the spec's table gives them."""
    rows = table("Model table")
    per_layer = [row for row in rows if "{i}" in row["Blob"]]
    per_expert = [row for row in per_layer if "{e}" in row["Blob"]]
    assert per_layer[-len(per_expert) :] == per_expert
    first, last = rows[: rows.index(per_layer[0])], rows[rows.index(per_layer[-1]) + 1 :]
    expanded = [(row, None) for row in first]
    for i, is_sparse in enumerate(config.sparse_layers):
        inner = per_layer[: -len(per_expert)]
        inner = inner + [_numbered(row, "{e}", e) for e in range(config.num_experts) for row in per_expert]
        expanded += [(_numbered(row, "{i}", i), is_sparse) for row in inner]
    expanded += [(row, None) for row in last]
    return [_part(row, config) for row, is_sparse in expanded if _exists(row["Exists"], config, is_sparse)]


def _numbered(row: dict[str, str], key: str, number: int) -> dict[str, str]:
    return {name: text.replace(key, str(number)) for name, text in row.items()}


def _exists(text: str, config: model.ModelConfig, is_sparse: bool | None) -> bool:
    return all(_holds(term, config, is_sparse) for term in text.split(", "))


def _holds(text: str, config: model.ModelConfig, is_sparse: bool | None) -> bool:
    if text in ("always", "dense", "sparse"):
        return text == "always" or is_sparse == (text == "sparse")
    name, _, wanted = text.removeprefix("not ").partition(" = ")
    value = getattr(config, code(name))
    return value == wanted if wanted else value != text.startswith("not ")


def _part(row: dict[str, str], config: model.ModelConfig) -> tuple[str, tuple[bool, bool], str, int, int, str, int, int]:
    sizes = {"V": config.vocab_size, "H": config.hidden_size, "I": config.intermediate_size, "Q": config.q_rows,
             "K": config.kv_rows, "D": config.head_dim, "E": config.num_experts, "M": config.moe_intermediate_size,
             "ceil16": lambda x: -(-x // 16) * 16}  # fmt: skip
    count, columns, base = (eval(row[name], {}, sizes) for name in ("Rows", "Columns", "Base"))
    order, _, parameter = row["Row order"].partition(" ")
    if order == "rope" and config.head_dim % 16:
        order, parameter = "sequential", ""
    number = eval(parameter or "0", {}, sizes)
    kind = {"vector": (False, False), "tile16x512": (True, False), "matrix": (True, True)}[code(row["Layout"])]
    return code(row["Blob"]), kind, code(row["Part"]), count, columns, order, number, base


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": "head"},
        {"head_dim": 10, "qkv_bias": True, "num_hidden_layers": 1, "layer_windows": [0], "sparse_layers": [False]},
        {"sparse_layers": [True, False], "num_experts": 3, "moe_intermediate_size": 13, "qk_norm": "full", "mlp_bias": True},
        {
            "sparse_layers": [True, True],
            "num_experts": 1,
            "moe_intermediate_size": 8,
            "router_bias": True,
            "expert_bias": True,
            "attention_sinks": True,
        },
    ],
)
def test_model_table(changes: dict[str, object]):
    config = _config(**changes)
    in_code = [
        (
            spec.name,
            (spec.is_matrix, spec.may_be_mxfp4),
            p.role,
            p.rows,
            p.columns,
            p.row_map.order,
            p.row_map.param,
            p.row_map.base,
        )
        for spec in model.blob_specs(config)
        for p in spec.parts
    ]
    assert in_code == _expand(config)
    assert model.num_blobs(config) == len(model.blob_specs(config)) == len({part[0] for part in in_code})


def test_row_order_example():
    for row in table("Row order example"):
        name, _, parameter = row.pop("Tensor").partition(" ")
        places = rows.RowMap(code(name), 0, int(parameter or 0)).stored_rows(32)
        for logical, stored in row.items():
            assert places[int(logical.removeprefix("r = "))] == int(stored)


def test_position_example():
    for row in table("Position example"):
        assert tiles.element_position(int(row["Row"]), int(row["Column"]), 96) == int(row["Position"])


def test_mxfp4_position_example():
    """Against the formulas, and against the codec: the only byte and scale that are not zero are those of the table."""
    for row in table("MXFP4 position example"):
        r, c = int(row["Row"]), int(row["Column"])
        step = (r // 16 * 2 + c // 128) * 1088
        assert int(row["Codes"]) == step + r % 16 * 64 + c % 128 // 2
        assert int(row["Scale"]) == step + 1024 + r % 16 * 4 + c % 128 // 32
        rows = mxfp4.QuantisedRows(np.zeros((32, 8, 16), np.uint8), np.zeros((32, 8), np.uint8))
        rows.codes[r, c // 32, c % 32 // 2], rows.scales[r, c // 32] = 7 << (4 * (row["Nibble"] == "high")), 127
        packed = np.empty(mxfp4.tiles_shape(32, 256), np.uint8)
        mxfp4.pack_tiles(rows, packed, model.RowMap())
        assert np.flatnonzero(packed).tolist() == [int(row["Codes"]), int(row["Scale"])]
        assert np.flatnonzero(mxfp4.decode_blocks(rows.codes, rows.scales)).tolist() == [r * 256 + c]


def test_mxfp4_values():
    row = table("MXFP4")[0]
    assert [float(row[str(i)]) for i in range(8)] == list(mxfp4.E2M1_VALUES)


def test_numbers_of_tile_layout_3():
    assert f"a step is {mxfp4.STEP_BYTES} bytes" in SPEC
    page = constants.STEPS_PER_PAGE
    assert f"16 rows x {page * mxfp4.STEP_COLUMNS} columns, {page * mxfp4.STEP_BYTES} bytes" in SPEC


def test_rope_types():
    stated = {code(row["Type"]): tuple(re.findall(r"`(\w+)`", row["Parameters"])) for row in table("RoPE types")}
    assert stated == rope.PARAMETERS
    assert tuple(stated) == rope.ROPE_TYPES


def test_rope_check_values():
    for row in table("RoPE check values"):
        parameters: dict[str, float | bool] = {}
        for name, _, value in (item.partition("=") for item in row["Parameters"].split(", ") if item):
            parameters[name] = bool(float(value)) if name == "truncate" else float(value)
        kind = rope.RopeParameters(code(row["Type"]), float(row["Theta"]), parameters)
        found = rope.inverse_frequencies(kind, int(row["D"]))[int(row["i"])]
        assert float(found) == float.fromhex(code(row["w"]))


def test_reduction_constants():
    stated = [float.fromhex(text) for text in re.findall(r"P\d = `(\S+)`", SPEC)]
    assert stated == list(rope._PARTS)


def test_file_names():
    assert tuple(code(row["Name"]) for row in table("Files section")) == files.FILE_NAMES


def test_record_fields():
    kinds = {"bytes": "V", "u64": "<u8", "f64": "<f8"}
    for row in table("Records section"):
        kind, place = records.RECORD_TYPE.fields[code(row["Field"])]
        width = row["Bytes"] if row["Type"] == "bytes" else ""
        assert (kind, place) == (np.dtype(kinds[row["Type"]] + width), int(row["Offset"]))
    assert len(table("Records section")) == len(records.RECORD_TYPE.names)


def test_expert_keys():
    assert {code(row["Key"]) for row in table("Expert index")} == experts._KEYS


def rules_in_code() -> set[str]:
    text = "".join(path.read_text() for path in SOURCES)
    quoted = set(re.findall(r'"([A-Z][0-9]{1,2})"', text))
    return {rule for rule in quoted if rule not in {"F16", "F32", "U8", "V16", "V64"}}


def test_rules_are_those_of_the_code():
    stated = [row["Rule"] for row in table("Rules")]
    assert len(stated) == len(set(stated))
    assert set(stated) == rules_in_code()


def test_rules_are_numbered_without_gaps():
    stated = [row["Rule"] for row in table("Rules")]
    for letter in {rule[0] for rule in stated}:
        numbers = [int(rule[1:]) for rule in stated if rule[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)), letter


def test_cited_rules_exist_and_each_rule_is_cited():
    cited = set(re.findall(r"\b[A-Z]\d+\b", " ".join(re.findall(r"\[([A-Z]\d+(?:, [A-Z]\d+)*)\]", SPEC))))
    assert cited == {row["Rule"] for row in table("Rules")}


def test_exit_codes():
    known = {errors.EXIT_DIFFERENT, errors.EXIT_INVALID, errors.EXIT_UNSUPPORTED}
    assert {int(row["Exit"]) for row in table("Rules")} == known


def test_sections_named_in_docstrings_exist():
    headings = set(re.findall(r"^#+ (.*)$", SPEC, re.MULTILINE))
    for path in [*SOURCES, *Path(REPOSITORY / "converter").glob("*.py")]:
        for group in re.findall(r'specs/format\.md, ((?:"[^"]+"(?:, | and )?)+)', path.read_text()):
            for name in re.findall(r'"([^"]+)"', group):
                assert name in headings, f"{path.name}: {name}"
