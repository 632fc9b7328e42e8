"""Text to ids and back, with the tokenizer.json that the packed file carries."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as HfTokenizer
from tokenizers.decoders import DecodeStream

from megalith.format.errors import CheckpointError, FormatError, RequestError, printable
from megalith.format.reader import PackedFile

MAX_TEXT_CHARACTERS = 1 << 24
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def _byte_characters() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte: itself where it is printable, else one from 256 on."""
    printable_bytes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable_bytes]
    return {chr(byte): byte for byte in printable_bytes} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


class Tokenizer:
    """The `tokenizers` library over one file's tokenizer.json; `special_tokens` are those that chat templates name."""

    def __init__(self, packed: PackedFile) -> None:
        """RequestError where the file holds none."""
        if "tokenizer.json" not in packed.file_names():
            raise no_tokenizer(packed.path)
        self._place = f"{printable(packed.path)}: tokenizer.json"
        self.json = packed.file("tokenizer.json").decode("utf-8", "replace")
        try:
            self._tokenizer = HfTokenizer.from_str(self.json)
        except BaseException as error:  # the library panics on some inputs, which is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise FormatError(f"{self._place}: {printable(error)}") from None
        self._settings = _settings(packed)
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._is_byte_level = "ByteLevel" in str(json.loads(self.json).get("decoder"))
        self._bytes: dict[int, bytes] = {}
        self.special_tokens = _special_tokens(self._settings)
        self.chat_template = _chat_template(packed, self._settings)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; the tokenizer's own post-processing adds a BOS token where the model wants one."""
        if len(text) > MAX_TEXT_CHARACTERS:
            raise RequestError(f"text of {len(text)} characters, at most {MAX_TEXT_CHARACTERS} are taken")
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except UnicodeEncodeError as error:
            raise RequestError(f"text is not Unicode: lone surrogate at character {error.start}") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, b"" for an id without a token; a special token's are its name."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._decoded(token)
        return found

    def is_special(self, text: str) -> bool:
        """Whether a text is a special token, which decoding leaves out."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return any(token.content == text and token.special for token in added)

    def _decoded(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if token in self._added:
            return str(piece).encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF.get(character, 63) for character in piece)
        if _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode("utf-8", "replace")

    def stream(self, prompt_ids: Sequence[int]) -> TextStream:
        """Text as ids come, after a prompt."""
        return TextStream(self._tokenizer, prompt_ids)


def no_tokenizer(path: object) -> RequestError:
    """What to say of a packed file without one."""
    return RequestError(f"{printable(path)}: holds no tokenizer.json: give token ids instead of text")


class TextStream:
    """Incremental decoding: `step` returns the text that an id completes, "" while a character is still in parts."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt_ids[-8:]), skip_special_tokens=True)

    def step(self, token: int) -> str:
        """The new text."""
        return self._stream.step(self._tokenizer, token) or ""


def _settings(packed: PackedFile) -> dict[str, Any]:
    if "tokenizer_config.json" not in packed.file_names():
        return {}
    return _json_object(packed, "tokenizer_config.json")


def _json_object(packed: PackedFile, name: str) -> dict[str, Any]:
    try:
        value = json.loads(packed.file(name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{printable(packed.path)}: {name}: not JSON: {printable(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{printable(packed.path)}: {name}: not a JSON object")
    return value


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; configs hold them as text or as an object with `content`."""
    tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _chat_template(packed: PackedFile, settings: dict[str, Any]) -> str | None:
    """The default chat template, from the place that transformers would prefer."""
    names = packed.file_names()
    if "chat_template.jinja" in names:
        return packed.file("chat_template.jinja").decode("utf-8", "replace")
    template = settings.get("chat_template")
    if template is None and "chat_template.json" in names:
        template = _json_object(packed, "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
