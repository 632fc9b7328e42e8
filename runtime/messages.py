"""What the server's process and the engine's process say to each other: msgpack with a length before it, over a socket.

Nothing is pickled, and every message is decoded into a declared type.
"""

from __future__ import annotations

from array import array

import msgspec

from .sampler import SamplingParameters
from .scheduler import Load

LENGTH_BYTES = 4
MAX_MESSAGE_BYTES = 1 << 28

Top = tuple[tuple[int, float], ...]


class EngineSettings(msgspec.Struct, frozen=True):
    """What an engine process is started with."""

    path: str
    backend: str  # "numpy", "cupy" or "echo"
    max_seq_len: int
    max_sequences: int
    num_pages: int
    max_batch_tokens: int
    prefill_chunk: int
    pass_timeout: float  # seconds, after which the server ends an engine that says nothing
    step_seconds: float = 0.0  # of the echo engine
    use_graphs: bool = True  # of the CuPy engine
    batch_invariant: bool = False  # of the CuPy engine


class Settings(msgspec.Struct, frozen=True, tag=True):
    """The first message to an engine."""

    settings: EngineSettings


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Generate one sequence; `prompt_ids` are little-endian int32."""

    id: int
    client: str
    prompt_ids: bytes
    parameters: SamplingParameters
    max_tokens: int
    stop_ids: list[int]
    deadline: float  # of time.monotonic(), one clock for all processes of a machine
    score_prompt: bool
    grammar: str | None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """The client is gone."""

    id: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine takes requests."""

    load_seconds: float


class Unusable(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start, for a reason that is no bug."""

    message: str
    exit_code: int


class Emission(msgspec.Struct, frozen=True, array_like=True):
    """What is more than a token: `token` -1 for none, `finish` a Finish' value or None."""

    id: int
    token: int
    logprob: float | None
    top: Top
    scores: tuple[tuple[float, Top], ...]
    finish: str | None
    message: str
    cached_tokens: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What one step gave: plain tokens as (id, token), then all else; and the load after it."""

    tokens: list[tuple[int, int]]
    emissions: list[Emission]
    load: Load


ToEngine = Settings | Submit | Cancel
FromEngine = Ready | Unusable | Progress

encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytearray:
    """The bytes of a message, its length first."""
    buffer = bytearray(LENGTH_BYTES)
    encoder.encode_into(message, buffer, LENGTH_BYTES)
    buffer[:LENGTH_BYTES] = (len(buffer) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
    return buffer


class Unframer:
    """Messages out of a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now."""
        self._buffer += data
        messages, start = [], 0
        while len(self._buffer) - start >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + LENGTH_BYTES], "little")
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"message of {length} bytes, at most {MAX_MESSAGE_BYTES} are taken")
            stop = start + LENGTH_BYTES + length
            if stop > len(self._buffer):
                break
            messages.append(bytes(self._buffer[start + LENGTH_BYTES : stop]))
            start = stop
        del self._buffer[:start]
        return messages


def pack_ids(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    return array("i", data).tolist()
