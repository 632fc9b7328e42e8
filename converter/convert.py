"""Converting a checkpoint into a packed file: plan, pack blobs in parallel, write checksums, give the file its name."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format import rope
from megalith.format.checksums import ChunkHasher, Extent, num_chunks
from megalith.format.dtypes import BIT_TYPES, ConversionLoss
from megalith.format.errors import CheckpointError, FormatError, UnsupportedError, printable
from megalith.format.header import Header, Section
from megalith.format.index import encode_index, features_of
from megalith.format.reader import PackedFile
from megalith.format.records import TensorRecord, encode_records
from megalith.format.writer import PartialFile, check_output

from .against import compare_with_checkpoint
from .mapping import TIED_HEAD
from .pack import PackedBlob, pack_blob
from .plan import Options, Plan, make_plan, plan_summary
from .safetensors_header import SourceTensor
from .source import Checkpoint

MANIFEST_VERSION = 1
_COMPARE_BYTES = 4 << 20

Progress = Callable[[int], None]


def default_jobs() -> int:
    """Threads to pack with: one more than the processors this process may use, at most 16, as one is often waiting."""
    return min(16, len(os.sched_getaffinity(0)) + 1)


@dataclass(frozen=True)
class Result:
    """What a conversion did."""

    plan: Plan
    losses: dict[str, ConversionLoss]
    resumed_bytes: int
    already_complete: bool = False

    @property
    def total_loss(self) -> ConversionLoss:
        """Of tensors that were converted to another 16-bit dtype, or kept."""
        return sum((loss for loss in self.losses.values() if not loss.signal_power), ConversionLoss())

    @property
    def quantisation_loss(self) -> ConversionLoss:
        """Of tensors that were quantised to MXFP4."""
        return sum((loss for loss in self.losses.values() if loss.signal_power), ConversionLoss())


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options | None = None,
    *,
    jobs: int | None = None,
    resume: bool = False,
    force: bool = False,
    on_plan: Callable[[Plan], Progress] | None = None,
) -> Result:
    """Pack the checkpoint folder `source` into the file `target`.

    `on_plan` is called once with the plan and returns a callable that is told of every number of bytes written.
    Raises MegalithError; nothing appears under `target` unless it is complete.
    """
    path = Path(target)
    with Checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint, options or Options())
        if resume and not force and _is_complete(path, plan, checkpoint, jobs or default_jobs()):
            return Result(plan, {}, plan.file_bytes, already_complete=True)
        check_output(path, force)
        progress = on_plan(plan) if on_plan else lambda _: None
        _check_tied_head(checkpoint, plan)
        output = PartialFile(path, plan.fingerprint(checkpoint.identity), plan.file_bytes, resume)
        with output, _short_switches():
            check_output(path, force)  # again: another process may have finished it before we held the lock
            return _write(checkpoint, plan, output, jobs or default_jobs(), progress)


@contextmanager
def _short_switches() -> Iterator[None]:
    """Let threads that come back from a read or a write wait 0.2 ms for the interpreter instead of 5."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _is_complete(path: Path, plan: Plan, checkpoint: Checkpoint, jobs: int) -> bool:
    """Whether `path` is a finished conversion with the same plan of weights that are still those of the checkpoint."""
    if not os.path.isfile(path):
        return False
    try:
        with PackedFile(path) as packed:
            if bytes(encode_index(packed.index)) != plan.index_bytes:
                return False
            _check_tied_head(checkpoint, plan)
            return not compare_with_checkpoint(packed, checkpoint.folder, jobs)
    except (FormatError, UnsupportedError):
        return False  # something else under that name


def _check_tied_head(checkpoint: Checkpoint, plan: Plan) -> None:
    """A stored head beside tied embeddings must equal them: transformers 4 drops another one, 5 uses it."""
    if TIED_HEAD not in plan.mapping.ignored:
        return
    head, embedding = checkpoint.tensors[TIED_HEAD], plan.mapping.parts["embed_tokens.weight"].tensor
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype) or not _same_rows(checkpoint, head, embedding):
        raise CheckpointError(
            f"{printable(head.path)}: tensor '{TIED_HEAD}' differs from '{embedding.name}', "
            "but config.json says tie_word_embeddings: which one is meant is not known"
        )


def _same_rows(checkpoint: Checkpoint, head: SourceTensor, embedding: SourceTensor) -> bool:
    num_rows, columns = embedding.shape
    count = min(num_rows, max(1, _COMPARE_BYTES * num_rows // embedding.nbytes))
    buffers = [np.empty((count, columns), BIT_TYPES[embedding.dtype]) for _ in range(2)]
    for start in range(0, num_rows, count):
        rows = [buffer[: num_rows - start] for buffer in buffers]
        for tensor, target in zip((head, embedding), rows, strict=True):
            checkpoint.read_elements(tensor, start * columns, target)
        if not np.array_equal(rows[0], rows[1]):
            return False
    return True


class _Output:
    """The parts of the file that are known only once weights were read."""

    def __init__(self, plan: Plan) -> None:
        self.checksums: NDArray[np.uint64] = np.zeros(num_chunks(plan.extents), "<u8")
        self.records: dict[str, TensorRecord] = {}

    def store(self, extent: Extent, checksums: NDArray[np.uint64]) -> None:
        self.checksums[extent.first_chunk : extent.first_chunk + extent.num_chunks] = checksums


def _write(checkpoint: Checkpoint, plan: Plan, output: PartialFile, jobs: int, progress: Progress) -> Result:
    content, by_kind = _Output(plan), {section.kind: section for section in plan.sections}
    output.write(by_kind["index"].offset, plan.index_bytes)
    resumed = _pack_all(checkpoint, plan, output, content, jobs, progress)
    extents = {extent.name: extent for extent in plan.extents[-3:]}
    _write_pieces(output, extents["files"], [plan.files_bytes], content)
    records = [content.records[name] for name in plan.index.tensors.names]
    _write_pieces(output, extents["records"], [encode_records(records)], content)
    checksums = content.checksums.tobytes()
    output.write(by_kind["checksums"].offset, checksums)
    checkpoint.check_unchanged()
    output.finish(_header(plan, checksums).encode())
    losses = {name: record.loss for name, record in content.records.items()}
    return Result(plan, losses, resumed)


def _write_pieces(output: PartialFile, extent: Extent, pieces: Any, content: _Output) -> None:
    hasher, offset = ChunkHasher(), extent.offset
    for piece in pieces:
        hasher.update(piece)
        output.write(offset, piece)
        offset += len(piece)
    content.store(extent, hasher.digests())


def _header(plan: Plan, checksums: bytes) -> Header:
    import xxhash

    digests = {"index": plan.index_bytes, "checksums": checksums}
    sections = tuple(
        Section(s.kind, s.offset, s.nbytes, xxhash.xxh3_64_intdigest(digests[s.kind]) if s.kind in digests else 0)
        for s in plan.sections
    )
    return Header(sections, features_of(plan.index))


def _pack_all(checkpoint: Checkpoint, plan: Plan, output: PartialFile, content: _Output, jobs: int, progress: Progress) -> int:
    """Pack every blob and the RoPE table, the largest first; returns the bytes that a resumed run found done."""
    stop, resumed = Event(), 0

    def write_rope(extent: Extent) -> None:
        config = plan.description.config
        pieces = rope.section_pieces(plan.description.rope, config.head_dim, plan.description.rope_positions)
        _write_pieces(output, extent, pieces, content)

    def pack(number: int) -> None:
        extent = plan.extents[number]

        def write(offset: int, data: memoryview | bytes) -> None:
            if stop.is_set():
                raise InterruptedError
            output.write(extent.offset + offset, data)
            progress(len(data))

        spec, entry = plan.specs[number], plan.index.blob(number)
        done = pack_blob(checkpoint, spec, entry, plan.mapping.parts, plan.options, write)
        _keep(plan, content, number, done)
        output.record(extent, done.checksums.tobytes(), [_record_to_json(record) for record in done.records])

    waiting = []
    for number in range(len(plan.specs)):
        finished = output.finished(plan.extents[number])
        if finished is None:
            waiting.append(number)
            continue
        checksums = np.frombuffer(bytes.fromhex(finished["checksums"]), np.uint64)
        _keep(plan, content, number, PackedBlob(checksums, [_record_from_json(r) for r in finished["details"]]))
        resumed += plan.extents[number].nbytes
        progress(plan.extents[number].nbytes)
    waiting.sort(key=lambda number: -plan.extents[number].nbytes)
    with ThreadPoolExecutor(jobs, thread_name_prefix="pack") as pool, ExitStack() as cleanup:
        cleanup.callback(pool.shutdown, wait=False, cancel_futures=True)
        cleanup.callback(stop.set)
        futures: list[Future[None]] = [pool.submit(write_rope, plan.extents[-3])]
        futures += [pool.submit(pack, number) for number in waiting]
        wait(futures, return_when=FIRST_EXCEPTION)
        # started in order, so that of those which ran the first to fail is the same in every run
        started = [future for future in futures if not future.cancel()]
        for future in started:
            future.result()
    return resumed


def _keep(plan: Plan, content: _Output, number: int, blob: PackedBlob) -> None:
    content.store(plan.extents[number], blob.checksums)
    for part, record in zip(plan.specs[number].parts, blob.records, strict=True):
        content.records[plan.mapping.parts[part.role].name] = record


def _record_to_json(record: TensorRecord) -> list[Any]:
    return [record.source_digest.hex(), *astuple(record.loss)]


def _record_from_json(raw: list[Any]) -> TensorRecord:
    return TensorRecord(bytes.fromhex(raw[0]), ConversionLoss(*raw[1:]))


def manifest(result: Result, target: str | os.PathLike[str]) -> dict[str, Any]:
    """What was written, JSON-ready, with the sha256 of the file."""
    lossy = {name: loss for name, loss in result.losses.items() if loss.rounded or loss.nonfinite}
    return {
        "manifest_version": MANIFEST_VERSION,
        "file": os.fspath(target),
        "sha256": sha256_of(Path(target)),
        **plan_summary(result.plan),
        "resumed_bytes": result.resumed_bytes,
        "already_complete": result.already_complete,
        "lossy_tensors": {
            name: {
                "rounded": loss.rounded,
                "flushed": loss.flushed,
                "nonfinite": loss.nonfinite,
                "max_abs_error": loss.max_abs_error,
                **({"sqnr_db": loss.sqnr_db} if loss.sqnr_db is not None else {}),
            }
            for name, loss in lossy.items()
        },
    }


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
