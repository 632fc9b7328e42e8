"""Folders, links and shard indexes that lie or attack: one line, the right exit code, nothing written, nothing run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoints import (
    HEAD,
    INVALID,
    IO,
    NORM,
    USAGE,
    refused,
    safetensors_bytes,
    tiny_config,
    tiny_tensors,
    write_checkpoint,
    write_sharded,
)

from megalith.converter.convert import convert


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "../secret.safetensors", "sub/../../secret.safetensors", "..", "a/..", "..\\secret.safetensors",
        "C:\\secret.safetensors", "a\\b.safetensors", "", ".", "./", "/", "a\0b", "\ud800", "n" * 5000, "a/" * 3000,
        "folder", "absent.safetensors", "\x1b[31mred", "line\nbreak", "\u202egnp.exe",
    ],
)  # fmt: skip
def test_shard_names(name: str, tmp_path: Path) -> None:
    secret = safetensors_bytes(tiny_tensors(tiny_config()))
    (tmp_path / "secret.safetensors").write_bytes(secret)
    folder = write_sharded(tmp_path / "checkpoint", dict.fromkeys(tiny_tensors(tiny_config()), name), {})
    (folder / "folder").mkdir()
    line = refused(folder, IO if len(name) > 1000 else INVALID, "checkpoint")
    assert len(line) < 600


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("absolute", [True, False])
def test_symlinks_that_leave_the_folder(name: str, absolute: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", files={"tokenizer.json": b"{}", "generation_config.json": b"{}"})
    outside = tmp_path / "outside"
    os.replace(folder / name, outside)
    (folder / name).symlink_to(outside if absolute else Path("..") / "outside")
    refused(folder, INVALID, f"file '{name}': is a symlink that leaves the folder")


def test_a_linked_folder_that_leaves(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    write_checkpoint(tmp_path / "outside")
    folder = write_sharded(tmp_path / "checkpoint", dict.fromkeys(tensors, "sub/model.safetensors"), {})
    (folder / "sub").symlink_to(tmp_path / "outside")
    refused(folder, INVALID, "file 'sub/model.safetensors': is a symlink that leaves the folder")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_dangling_symlinks(name: str, tmp_path: Path) -> None:
    """A file that should be there is not passed over in silence."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("absent")
    refused(folder, INVALID, name, "is missing")
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # onto itself
    refused(folder, INVALID, name, "is missing")


def hub_cache(folder: Path, blobs: Path) -> Path:
    """A snapshot as the hub's cache keeps it: links to ../../blobs/HASH, here to files in `blobs`."""
    snapshot = write_checkpoint(folder / "models--org--name" / "snapshots" / "0123abcd")
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        os.replace(path, blobs / f"{number:040x}")
        path.symlink_to(os.path.relpath(blobs / f"{number:040x}", snapshot))
    return snapshot


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, tmp_path / "models--org--name" / "blobs")
    convert(snapshot, tmp_path / "a.lith")
    (tmp_path / "link").symlink_to(snapshot)
    convert(tmp_path / "link", tmp_path / "b.lith")
    assert (tmp_path / "a.lith").read_bytes() == (tmp_path / "b.lith").read_bytes()


@pytest.mark.parametrize("blobs", ["blobs", "models--org--name/blobs-of-another", "models--org--name/snapshots/blobs"])
def test_links_beside_the_hub_cache_are_not(blobs: str, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, tmp_path / blobs)
    refused(snapshot, INVALID, "is a symlink that leaves the folder")


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    os.replace(folder / "model.safetensors", folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    convert(folder, tmp_path / "model.lith")


@pytest.mark.parametrize(
    ("folder", "code", "words"),
    [
        ("absent", USAGE, "absent: not a folder: a checkpoint is a folder with config.json"),
        ("file", USAGE, "file: not a folder"),
        ("empty", INVALID, "empty: config.json is missing"),
        ("n" * 300, IO, "File name too long"),
    ],
)
def test_sources_that_are_no_checkpoint(folder: str, code: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / folder, code, words)


def with_index(folder: Path, index: bytes) -> Path:
    return write_sharded(folder, index, {"a.safetensors": tiny_tensors(tiny_config())})


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "has no weight_map"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": []}', "has no weight_map"),
        (b'{"weight_map": {"x": null}}', "has no weight_map"),
        (b'{"weight_map": {"x": ["a.safetensors"]}}', "has no weight_map"),
        (b'{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}', "duplicate key 'x'"),
        (b'{"weight_map": {}, "weight_map": {}}', "duplicate key 'weight_map'"),
        (b'{"weight_map": {"x": "a.safetensors"}}', "to nothing, but a.safetensors holds it too"),
        (b'{"weight_map": {}}', "tensor 'model.embed_tokens.weight' is missing"),
        (b"[" * 100_000, "not JSON"),
        (b"[" * 40 + b"]" * 40, "nested deeper than 32"),
        (b'{"weight_map": ' + b'{"a":' * 40 + b"1" + b"}" * 41, "nested deeper than 32"),
        (b'{"total_size": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[" + b"[]," * 2_000_000 + b"[]]", "more than 2621440 JSON values"),
    ],
)  # fmt: skip
def test_broken_index(index: bytes, words: str, tmp_path: Path) -> None:
    refused(with_index(tmp_path / "checkpoint", index), INVALID, "checkpoint", words)


def test_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    shards = {"a.safetensors": {k: t for k, t in tensors.items() if k != HEAD}, "b.safetensors": {HEAD: tensors[HEAD]}}
    right = dict.fromkeys(tensors, "a.safetensors") | {HEAD: "b.safetensors"}
    convert(write_sharded(tmp_path / "right", right, shards), tmp_path / "model.lith")
    swapped = write_sharded(tmp_path / "swapped", right | {HEAD: "a.safetensors", NORM: "b.safetensors"}, shards)
    refused(swapped, INVALID, "index.json: maps 'model.norm.weight' to b.safetensors, but a.safetensors holds it too")
    more = write_sharded(tmp_path / "more", right | {"x\x1b": "b.safetensors"}, shards)
    refused(more, INVALID, "index.json: 'x\\x1b' is not in b.safetensors, where the index puts it")
    twice = {**shards, "b.safetensors": {HEAD: tensors[HEAD], NORM: tensors[NORM]}}
    refused(write_sharded(tmp_path / "twice", right, twice), INVALID, "b.safetensors holds it too")
    aliased = write_sharded(tmp_path / "aliased", right | {HEAD: "./b.safetensors", "x": "b.safetensors"}, shards)
    refused(aliased, INVALID, "holds it too")
    refused(write_sharded(tmp_path / "config", dict.fromkeys(tensors, "config.json"), {}), INVALID, "not safetensors")
