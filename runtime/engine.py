"""The engine: a packed file, a backend, a tokenizer; ids or text in, logits or text out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.errors import RequestError, printable
from megalith.format.reader import PackedFile
from megalith.format.rope import F32

from .backend import Backend
from .numpy_backend import NumpyBackend
from .sampler import SamplingParameters
from .tokenizer import Tokenizer, no_tokenizer
from .trace import Trace, host_span, traced


@dataclass(frozen=True)
class Token:
    """One generated token: its id and the text that it completes."""

    id: int
    text: str


class Engine:
    """Runs one packed file. The file may be replaced or truncated once this is constructed."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        max_seq_len: int | None = None,
        cache_bytes: int | None = None,
        use_graphs: bool = True,
        trace: Trace | None = None,
    ) -> None:
        """`cache_bytes` bounds the NumPy backend's float32 copy of the weights; default: half of the free memory.

        `use_graphs` is of the CuPy backend: decode steps as CUDA graphs, or one launch after the other. `trace` takes spans
        of what the engine does.
        """
        if backend not in ("auto", "numpy", "cupy"):
            raise RequestError(f"backend {printable(backend)} is none of auto, numpy, cupy")
        with PackedFile(path) as packed:
            self.config = packed.index.config
            limit = self.config.max_seq_len
            if max_seq_len is not None and not 1 <= max_seq_len <= limit:
                raise RequestError(f"max_seq_len {max_seq_len}: the file is for 1 to {limit} positions")
            with host_span(trace, "load tokenizer"):
                self._tokenizer = Tokenizer(packed) if "tokenizer.json" in packed.file_names() else None
            if _wants_gpu(backend):
                from .cupy_backend import CupyBackend

                self.backend: Backend = CupyBackend(packed, max_seq_len=max_seq_len, use_graphs=use_graphs, trace=trace)
            else:
                self.backend = NumpyBackend(packed, cache_bytes, trace)
            self.max_seq_len = min(max_seq_len or limit, self.backend.max_seq_len)
        self._trace = trace
        self._path = path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer; RequestError when it has none."""
        if self._tokenizer is None:
            raise no_tokenizer(self._path)
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can go in and come out."""
        return self._tokenizer is not None

    def logits(self, ids: Sequence[int]) -> F32:
        """float32 [len(ids), vocab_size]: for each position, the scores of the token after it."""
        tokens = checked_ids(ids, self.config.vocab_size, self.max_seq_len)
        with self._sequence() as cache:
            return self.backend.forward(tokens, cache, len(tokens), False)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Iterator[str]:
        """Pieces of text as they come; ends at an end-of-sequence token, `max_tokens`, or the longest context."""
        parameters = SamplingParameters(temperature, top_k, top_p, min_p, seed)
        tokens = self.generate_tokens(prompt, parameters, max_tokens=max_tokens, ignore_eos=ignore_eos)
        return (token.text for token in tokens if token.text)

    def generate_tokens(
        self,
        prompt: str | Sequence[int],
        parameters: SamplingParameters | None = None,
        *,
        max_tokens: int = 256,
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Generated tokens as they come, an end-of-sequence token included."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if max_tokens < 0:
            raise RequestError(f"max_tokens is {max_tokens}: must be 0 or more")
        tokens = checked_ids(ids, self.config.vocab_size, self.max_seq_len)
        return self._generate(tokens, parameters or SamplingParameters(), max_tokens, ignore_eos)

    def _generate(
        self, tokens: NDArray[np.int64], parameters: SamplingParameters, max_tokens: int, ignore_eos: bool
    ) -> Iterator[Token]:
        text_of = self._tokenizer.stream(tokens.tolist()).step if self._tokenizer else lambda token: ""
        text_of = traced(self._trace, "detokenise", text_of)
        count = min(max_tokens, self.max_seq_len - len(tokens))
        with closing(self.backend.generate(tokens, parameters, count)) as chosen_tokens:
            for chosen in chosen_tokens:
                yield Token(chosen, text_of(chosen))
                if chosen in self.config.eos_token_ids and not ignore_eos:
                    return

    @contextmanager
    def _sequence(self) -> Iterator[Any]:
        cache = self.backend.new_cache()
        try:
            yield cache
        finally:
            self.backend.close_cache(cache)


def _wants_gpu(backend: str) -> bool:
    """ "auto" takes CuPy where CuPy and a device are there."""
    from .cupy_device import has_device

    return backend == "cupy" or (backend == "auto" and has_device())


def checked_ids(ids: Sequence[int], vocab_size: int, max_seq_len: int) -> NDArray[np.int64]:
    """int64 [num_tokens]; RequestError for none, too many, or one outside the vocabulary."""
    tokens = np.asarray(ids)
    if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "iu":
        raise RequestError("token ids must be a non-empty list of integers")
    if tokens.size > max_seq_len:
        raise RequestError(f"{tokens.size} tokens, at most {max_seq_len} fit the context")
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if wrong.any():
        i = int(wrong.argmax())
        raise RequestError(f"token {i} is {tokens[i]}: ids go from 0 to {vocab_size - 1}")
    return tokens.astype(np.int64)
