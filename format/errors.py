"""Errors of the toolchain: each names the file, the place, the value found and the rule, and carries its exit code."""

from __future__ import annotations

EXIT_DIFFERENT = 1
EXIT_USAGE = 2
EXIT_INVALID = 3
EXIT_UNSUPPORTED = 4
EXIT_IO = 5

_MAX_SHOWN = 120


def printable(text: object) -> str:
    """`text` with everything but printable ASCII escaped, its middle left out beyond 120 characters: safe on a terminal."""
    shown = str(text).encode("unicode_escape").decode("ascii")
    if len(shown) <= _MAX_SHOWN:
        return shown
    kept = (_MAX_SHOWN - 3) // 2
    return f"{shown[:kept]}...{shown[-kept:]}"


def is_name(value: object, max_bytes: int) -> bool:
    """Whether `value` is text of 1 to `max_bytes` printable ASCII characters, space included."""
    return isinstance(value, str) and 0 < len(value) <= max_bytes and value.isascii() and value.isprintable()


class MegalithError(Exception):
    """Base of every error that is not a bug of ours; `exit_code` is the command's exit status."""

    exit_code = EXIT_INVALID

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(f"{message} [{rule}]" if rule else message)
        self.rule = rule


class FormatError(MegalithError):
    """A packed file breaks a numbered rule of the specification."""


class CorruptionError(FormatError):
    """Stored bytes do not match their checksum."""

    exit_code = EXIT_DIFFERENT


class UnsupportedError(MegalithError):
    """A version, feature or architecture that this library does not know."""

    exit_code = EXIT_UNSUPPORTED


class CheckpointError(MegalithError):
    """A checkpoint is incomplete, contradictory or hostile."""


class RequestError(MegalithError):
    """What the caller asked for cannot be asked for: wrong option, existing output, id out of range."""

    exit_code = EXIT_USAGE


class FileError(MegalithError):
    """The operating system refused to read or write."""

    exit_code = EXIT_IO

    @classmethod
    def wrap(cls, path: object, error: OSError) -> FileError:
        return cls(f"{printable(path)}: {error.strerror or error}")


class DeviceError(MegalithError):
    """The GPU or its driver refused or failed."""

    exit_code = EXIT_IO
