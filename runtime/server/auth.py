"""API keys."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path

from megalith.format.errors import FileError, RequestError, printable

MIN_KEY_CHARACTERS = 8


class Keys:
    """Compares digests of one length, all of them each time, so that time tells nothing about a key."""

    def __init__(self, keys: list[str]) -> None:
        for key in keys:
            if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError(f"an API key must be {MIN_KEY_CHARACTERS} or more printable ASCII characters without spaces")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def identity(self, authorization: bytes) -> str | None:
        """A name for the key in the header, None where it is none of them.

        Takes `Bearer KEY`, and `Basic` with the key as the password, which is what a browser can be asked for.
        """
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                given = b""
        elif scheme.lower() != b"bearer":
            given = b""
        digest = hashlib.sha256(given.strip()).digest()
        found = None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(known, digest):
                found = f"key-{number}"
        return found


def read_keys(flags: tuple[str, ...], file: Path | None, environment: str | None) -> list[str]:
    """Keys of the command line, of a file with one a line, and of the environment, separated by commas."""
    keys = list(flags)
    if file is not None:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{printable(file)}: {printable(error)}") from None
        lines = [line.strip() for line in text.splitlines()]
        keys += [line for line in lines if line and not line.startswith("#")]
    keys += [key.strip() for key in (environment or "").split(",") if key.strip()]
    return keys
