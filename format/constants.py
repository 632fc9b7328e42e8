"""Numbers of the packed format, each stated in specs/format.md and compared with it by a test."""

from __future__ import annotations

MAGIC = b"\x89LITH\r\n\x1a"
VERSION_MAJOR = 0
VERSION_MINOR = 2

HEADER_BYTES = 4096
HEADER_CHECKSUM_OFFSET = 4088
SECTION_TABLE_OFFSET = 40
SECTION_ENTRY_BYTES = 32
METADATA_OFFSET = 1024
METADATA_CAPACITY_BYTES = HEADER_CHECKSUM_OFFSET - METADATA_OFFSET

SECTION_ALIGNMENT = 4096
BLOB_ALIGNMENT = 4096
CHUNK_BYTES = 131_072
RECORD_BYTES = 64

SECTION_KINDS = {1: "index", 2: "image", 3: "rope", 4: "files", 5: "records", 6: "checksums"}
FEATURES = {0: "tiles", 1: "experts", 2: "mxfp4"}
DTYPES = {1: "BF16", 2: "F16", 3: "F32", 4: "MXFP4", 5: "U8"}
LAYOUTS = {1: "vector", 2: "tile16x512", 3: "mxfp4"}
ROW_ORDERS = {0: "sequential", 1: "pair8", 2: "rope"}

TILE_ROWS = 16
TILE_COLUMNS = 512
STEP_COLUMNS = 32  # one k-step: 4 lanes x 8 columns, two m16n8k16
STEPS_PER_PAGE = 16

MAX_INDEX_STORED_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_INDEX_OBJECTS = 65_536
MAX_INDEX_DEPTH = 8
MAX_METADATA_OBJECTS = 256
MAX_TENSORS = 262_144
MAX_NAME_BYTES = 256
MAX_DIMENSION = 2**31 - 1
MAX_FILE_BYTES = 2**53
MAX_AUXILIARY_FILE_BYTES = 64 << 20
