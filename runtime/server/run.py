"""Runs the application on uvicorn: start, drain, stop."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from megalith.format.errors import MegalithError, RequestError
from megalith.format.reader import PackedFile
from megalith.runtime.serving_plan import ServingPlan
from megalith.runtime.tokenizer import Tokenizer

from .app import App
from .auth import Keys
from .engine_client import EngineClient
from .logs import log
from .metrics import Metrics
from .protocol import HEADER_SECONDS, MAX_HEADER_BYTES, limited_protocol
from .renderer import ChatRenderer
from .service import Limits, Places, Service


@dataclass(frozen=True)
class ServerOptions:
    """How to listen and what to allow."""

    host: str = "127.0.0.1"
    port: int = 8000
    model_id: str | None = None
    keys: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    max_header_bytes: int = MAX_HEADER_BYTES
    header_seconds: float = HEADER_SECONDS
    cors_origins: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None


class EngineUnusableError(MegalithError):
    """The engine's own reason not to start, with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or SIGINT stops accepting and lets requests finish; the second stops at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        name = signal.Signals(sig).name
        if self.should_exit:
            self.force_exit = True
            log("info", "stopping", signal=name)
            return
        self._service.is_draining = True
        self.should_exit = True
        log("info", "draining", signal=name, running=self._service.places.taken)


def build_service(packed: PackedFile, plan: ServingPlan, options: ServerOptions) -> Service:
    """All parts of the server, the engine not yet started."""
    settings, index = plan.settings, packed.index
    metrics = Metrics()
    tokenizer = Tokenizer(packed) if "tokenizer.json" in packed.file_names() else None
    limits = Limits(
        settings.max_seq_len,
        settings.max_sequences + options.max_queue,
        options.max_body_bytes,
        options.body_seconds,
        options.request_seconds,
    )
    config = index.config
    facts: dict[str, object] = {
        "architecture": config.architecture,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        **plan.to_dict(),
        "max_queue": options.max_queue,
    }
    return Service(
        model_id=options.model_id or Path(settings.path).stem,
        created=int(time.time()),
        config=config,
        tokenizer=tokenizer,
        engine=EngineClient(settings, metrics.take),
        renderer=ChatRenderer(tokenizer),
        limits=limits,
        metrics=metrics,
        places=Places(limits.max_outstanding),
        facts=facts,
    )


def serve(packed: PackedFile, plan: ServingPlan, options: ServerOptions) -> None:
    """Serve until a signal; RequestError where the address cannot be had, the engine's error where it cannot start."""
    service = build_service(packed, plan, options)
    packed.close()
    app: Any = App(service, Keys(list(options.keys)))
    if options.cors_origins:
        app = CORSMiddleware(app, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
    config = uvicorn.Config(
        app,
        http=limited_protocol(options.max_header_bytes, options.header_seconds),
        ws="none",
        lifespan="off",
        loop="uvloop",
        access_log=False,
        log_level="critical",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(options.drain_seconds)),
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        proxy_headers=False,
    )
    listener = _listen(options)
    server = DrainingServer(config, service)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(server, service, listener, options))


def _listen(options: ServerOptions) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot listen on {options.host} port {options.port}: {error}") from None


async def _serve(server: DrainingServer, service: Service, listener: socket.socket, options: ServerOptions) -> None:
    engine = service.engine
    gc.collect()
    gc.freeze()  # what is loaded stays: a full collection of it takes 10 ms and more, between two tokens
    engine.begin()
    address = listener.getsockname()
    log("info", "listening", host=address[0], port=address[1], model=service.model_id, tls=options.tls_cert is not None)
    watcher = asyncio.create_task(_stop_when_unusable(server, service))
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
        await service.renderer.stop()
        await engine.stop()
        log("info", "stopped")
    if engine.unusable is not None:
        raise EngineUnusableError(engine.unusable.message, engine.unusable.exit_code)


async def _stop_when_unusable(server: DrainingServer, service: Service) -> None:
    """A file that cannot be served ends the command, if it is so from the beginning."""
    await service.engine.first_outcome.wait()
    if service.engine.unusable is not None:
        server.should_exit = True
