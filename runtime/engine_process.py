"""The engine's own process: `python -m megalith.runtime.engine_process FD`, where FD is a socket to the server.

It ends when the socket does, so it never outlives the server. An exception of the executor ends it too: the server then
fails the requests it had and starts another.
"""

from __future__ import annotations

import gc
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial

from megalith.format.errors import EXIT_USAGE, MegalithError, RequestError, printable
from megalith.format.reader import PackedFile

from .echo_executor import EchoExecutor
from .executor import Executor
from .guidance import Grammars
from .messages import (
    Cancel,
    Emission,
    EngineSettings,
    FromEngine,
    Progress,
    Ready,
    Settings,
    Submit,
    Unframer,
    Unusable,
    frame,
    to_engine_decoder,
    unpack_ids,
)
from .scheduler import Scheduler
from .sequences import Emitted, Finish, Request

_RECEIVE_BYTES = 1 << 18
_SIGN_SECONDS = 0.05  # of work without results, after which the server is told that it goes on


def build_executor(settings: EngineSettings) -> Executor:
    """The backend that the settings name, loaded."""
    if settings.backend == "echo":
        with PackedFile(settings.path) as packed:
            vocab_size = packed.index.config.vocab_size
        return EchoExecutor(
            num_pages=settings.num_pages,
            max_sequences=settings.max_sequences,
            max_seq_len=settings.max_seq_len,
            vocab_size=vocab_size,
            step_seconds=settings.step_seconds,
        )
    if settings.backend == "cupy":
        from .cupy_backend import CupyBackend

        with PackedFile(settings.path) as packed:
            return CupyBackend(
                packed,
                max_seq_len=settings.max_seq_len,
                max_sequences=settings.max_sequences,
                max_prefill_tokens=settings.max_batch_tokens,
                num_pages=settings.num_pages,
                use_graphs=settings.use_graphs,
                batch_invariant=settings.batch_invariant,
                warm=True,
            ).executor
    from .numpy_backend import NumpyBackend
    from .numpy_executor import NumpyExecutor

    with PackedFile(settings.path) as packed:
        backend = NumpyBackend(packed)
    return NumpyExecutor(
        backend,
        num_pages=settings.num_pages,
        max_sequences=settings.max_sequences,
        max_seq_len=settings.max_seq_len,
    )


class EngineProcess:
    """Requests in, progress out, one scheduler step after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unframer = Unframer()
        self._pending: list[bytes] = []
        self._settings = self._first_settings()
        self._grammars: Grammars | None = None
        self._make_grammars: Callable[[], Grammars] = partial(no_grammars, self._settings.path)

    def _first_settings(self) -> EngineSettings:
        while not self._pending:
            self._pending = self._unframer.feed(self._receive(wait=True))
        message = to_engine_decoder.decode(self._pending.pop(0))
        if not isinstance(message, Settings):
            raise RequestError(f"the first message is {type(message).__name__}, not Settings")
        return message.settings

    def run(self) -> None:
        """Load, then serve until the socket ends."""
        begun = time.monotonic()
        try:
            self._make_grammars = grammars_of(self._settings.path)
            executor = build_executor(self._settings)
            scheduler = Scheduler(executor, self._settings.max_batch_tokens, self._settings.prefill_chunk)
        except MegalithError as error:
            self._send(Unusable(str(error), error.exit_code))
            return
        gc.collect()
        gc.freeze()  # what is loaded stays: a full collection of it takes 10 ms and more, between two tokens
        self._send(Ready(time.monotonic() - begun))
        self._serve(scheduler)

    def _serve(self, scheduler: Scheduler) -> None:
        said = 0.0
        while True:
            refused = self._take_messages(scheduler, wait=scheduler.is_idle)
            while (seconds := scheduler.spare_seconds()) > 0 and select.select([self._connection], [], [], seconds)[0]:
                refused += self._take_messages(scheduler, wait=False)
            emitted = scheduler.step()
            now = time.monotonic()
            if emitted or refused or now > said + _SIGN_SECONDS:
                self._send(progress(scheduler, emitted, refused))
                said = now

    def _take_messages(self, scheduler: Scheduler, wait: bool) -> list[Emission]:
        """What has come, handled; refusals."""
        data = self._receive(wait)
        if data:
            self._pending += self._unframer.feed(data)
        refused = [emission for message in self._pending for emission in self._handle(scheduler, message)]
        self._pending.clear()
        return refused

    def _handle(self, scheduler: Scheduler, data: bytes) -> list[Emission]:
        message = to_engine_decoder.decode(data)
        if isinstance(message, Cancel):
            scheduler.cancel(message.id)
        elif isinstance(message, Submit):
            try:
                scheduler.add(self._request(message))
            except RequestError as error:
                return [Emission(message.id, -1, None, (), (), Finish.FAILED.value, str(error), 0)]
        return []

    def _request(self, message: Submit) -> Request:
        guide = None
        if message.grammar is not None:
            if self._grammars is None:
                self._grammars = self._make_grammars()
            guide = self._grammars.guide(message.grammar)
        return Request(
            message.id,
            message.client,
            unpack_ids(message.prompt_ids),
            message.parameters,
            message.max_tokens,
            frozenset(message.stop_ids),
            message.deadline,
            message.score_prompt,
            guide,
        )

    def _receive(self, wait: bool) -> bytes:
        try:
            data = self._connection.recv(_RECEIVE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        if not data:
            raise EOFError
        return data

    def _send(self, message: FromEngine) -> None:
        self._connection.sendall(frame(message))


def grammars_of(path: str) -> Callable[[], Grammars]:
    """How to make grammars for a packed file, which is read now: it may be replaced later."""
    with PackedFile(path) as packed:
        if "tokenizer.json" not in packed.file_names():
            return partial(no_grammars, path)
        config, text = packed.index.config, packed.file("tokenizer.json").decode()
    return partial(Grammars, text, config.vocab_size, config.eos_token_ids)


def no_grammars(path: str) -> Grammars:
    raise RequestError(f"{printable(path)}: holds no tokenizer.json, which grammars need")


def progress(scheduler: Scheduler, emitted: list[Emitted], refused: list[Emission]) -> Progress:
    """A step's results in the short form where they are tokens alone."""
    tokens, emissions = [], refused
    for one in emitted:
        if one.finish is None and one.logprob is None and not one.scores and not one.cached_tokens:
            tokens.append((one.id, one.token))
            continue
        scores = tuple((score.logprob, score.top) for score in one.scores)
        finish = one.finish.value if one.finish else None
        emissions.append(Emission(one.id, one.token, one.logprob, one.top, scores, finish, one.message, one.cached_tokens))
    return Progress(tokens, emissions, scheduler.load)


def main() -> int:
    """Serve the socket whose descriptor is the first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        print("megalith: the engine process is started by `megalith serve`", file=sys.stderr)
        return EXIT_USAGE
    try:
        with socket.socket(fileno=int(sys.argv[1])) as connection:
            EngineProcess(connection).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
