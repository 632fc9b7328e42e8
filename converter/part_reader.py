"""Reading one part of a blob out of the checkpoint, some rows at a time: strides undone, converted, digested."""

from __future__ import annotations

import numpy as np
import xxhash

from megalith.format import mxfp4
from megalith.format.dtypes import BIT_TYPES, Bits, ConversionLoss, convert_bits, count_nonfinite
from megalith.format.errors import CheckpointError, RequestError, printable
from megalith.format.model import PartSpec
from megalith.format.mxfp4 import QuantisedRows
from megalith.format.records import TensorRecord

from .mapping import PartSource
from .plan import Options
from .safetensors_header import SourceTensor
from .source import Checkpoint


class RowRegion:
    """The rows last read of each tensor: parts that share them, such as gate and up, read them once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._held: dict[str, tuple[int, Bits]] = {}

    def rows(self, tensor: SourceTensor, start: int, row_stride: int, num_rows: int, dtype: type[np.generic]) -> Bits:
        """[num_rows, row_stride] elements from element `start`; valid until the tensor's next rows are read."""
        first, buffer = self._held.get(tensor.name, (-1, np.empty((0, row_stride), dtype)))
        if (first, len(buffer)) != (start, num_rows):
            if len(buffer) < num_rows:
                buffer = np.empty((num_rows, row_stride), dtype)
            buffer = buffer[:num_rows]
            self._checkpoint.read_elements(tensor, start, buffer)
            self._held[tensor.name] = start, buffer
        return buffer


class PartReader:
    """Reads one part's rows in order, converts them to the dtype `target`, and keeps digest and losses."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: PartSource,
        part: PartSpec,
        target: str,
        options: Options,
        region: RowRegion | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._region = region or RowRegion(checkpoint)
        self._source = source
        self._part = part
        self._target = target
        self._options = options
        self._digest = xxhash.xxh3_128()
        self._scales_digest = xxhash.xxh3_128()
        self._buffers: dict[str, Bits] = {}
        self._bit_type = BIT_TYPES.get(source.tensor.dtype, np.uint8)
        self._loss = ConversionLoss()

    def rows(self, start: int, stop: int) -> Bits:
        """Bit patterns [stop - start, columns] in a 16- or 32-bit target dtype; valid until the next call."""
        rows, nonfinite = self._read_values(start, stop)
        if self._source.dtype == self._target:
            self._loss += ConversionLoss(nonfinite=nonfinite)
            return rows
        try:
            bits, loss = convert_bits(rows, self._source.dtype, self._target)
        except CheckpointError as error:
            raise CheckpointError(f"{self._place()}: {error}") from None
        if loss.rounded and self._options.dtype == "auto":
            raise RequestError(
                f"{self._place()}: {self._source.dtype} values are not exact in {self._target}: "
                "choose --dtype bf16 or --dtype fp16 to round them"
            )
        self._loss += loss
        return bits

    def quantised_rows(self, start: int, stop: int) -> QuantisedRows:
        """MXFP4 codes and scales of rows, as the checkpoint has them or quantised here."""
        if self._source.dtype == "MXFP4":
            return self._read_codes(start, stop)
        rows, _ = self._read_values(start, stop)
        found = mxfp4.quantise_rows(rows, self._source.dtype, self._options.scale == "search")
        self._loss += mxfp4.quantisation_loss(rows, self._source.dtype, found)
        return found

    def record(self) -> TensorRecord:
        """Digest and losses of all rows read."""
        if self._source.dtype == "MXFP4":
            self._digest.update(self._scales_digest.digest())
        return TensorRecord(self._digest.digest(), self._loss)

    def _read_values(self, start: int, stop: int) -> tuple[Bits, int]:
        """Rows as the checkpoint has them, and how many of their values are NaN or infinite."""
        source = self._source
        rows = self._read(source.tensor, source.start, source.row_stride, self._part.columns, start, stop)
        self._digest.update(rows.data.cast("B"))
        nonfinite = count_nonfinite(rows, source.dtype)
        if nonfinite and (self._target == "MXFP4" or not self._options.allow_nonfinite):
            hint = "MXFP4 cannot hold them" if self._target == "MXFP4" else "--allow-nonfinite keeps them"
            raise CheckpointError(
                f"{self._place()}: {nonfinite} values in {self._rows(start, stop)} are NaN or infinite; {hint}"
            )
        return rows, nonfinite

    def _read_codes(self, start: int, stop: int) -> QuantisedRows:
        source, num_bytes = self._source, self._part.columns // 2
        assert source.scales is not None
        place = source.start // mxfp4.BLOCK_BYTES, source.row_stride // mxfp4.BLOCK_BYTES, num_bytes // mxfp4.BLOCK_BYTES
        scales = self._read(source.scales, *place, start, stop)
        codes = self._read(source.tensor, source.start, source.row_stride, num_bytes, start, stop)
        self._digest.update(codes.data.cast("B"))
        self._scales_digest.update(scales.data.cast("B"))
        count = int(np.count_nonzero(scales == mxfp4.SCALE_NAN))
        if count and not self._options.allow_nonfinite:
            raise CheckpointError(
                f"{printable(source.scales.path)}: tensor '{printable(source.scales.name)}': {count} scales of "
                f"{self._source.name} in {self._rows(start, stop)} are 0xFF, NaN; --allow-nonfinite keeps them"
            )
        self._loss += ConversionLoss(nonfinite=count * mxfp4.BLOCK_ELEMENTS)
        return QuantisedRows(codes.reshape(stop - start, -1, mxfp4.BLOCK_BYTES), scales)

    def _read(self, tensor: SourceTensor, first: int, row_stride: int, columns: int, start: int, stop: int) -> Bits:
        """Contiguous elements [stop - start, columns] of a strided matrix that begins at element `first`."""
        if self._source.column_stride != 1:
            return self._read_transposed(tensor, first, start, stop)
        offset = first % row_stride  # where this part begins in rows that it shares
        whole = self._region.rows(tensor, first - offset + start * row_stride, row_stride, stop - start, self._bit_type)
        if columns == row_stride:
            return whole
        buffer = self._buffers.get(tensor.name)  # kept: fresh memory for every slice costs more than the copy
        if buffer is None or len(buffer) < stop - start:
            buffer = self._buffers[tensor.name] = np.empty((stop - start, columns), self._bit_type)
        rows = buffer[: stop - start]
        np.copyto(rows, whole[:, offset : offset + columns])
        return rows

    def _read_transposed(self, tensor: SourceTensor, first: int, start: int, stop: int) -> Bits:
        """Rows that lie across each other in the checkpoint, cut out of the whole matrix, which is read once."""
        columns, row_stride, column_stride = self._part.columns, self._source.row_stride, self._source.column_stride
        offset = first % column_stride  # where this part begins in a matrix that it shares
        whole = self._region.rows(tensor, first - offset, column_stride, columns, self._bit_type)
        across = whole[:, offset + start * row_stride : offset + (stop - 1) * row_stride + 1 : row_stride]
        return np.ascontiguousarray(across.T)

    def _rows(self, start: int, stop: int) -> str:
        return f"rows {start} to {stop - 1}"

    def _place(self) -> str:
        tensor = self._source.tensor
        return f"{printable(tensor.path)}: tensor '{printable(self._source.name if self._source.is_whole else tensor.name)}'"
