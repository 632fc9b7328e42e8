"""The ASGI application: routes, keys, request ids, errors, logs. It needs nothing of the server that runs it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from megalith.format.errors import RequestError

from . import routes
from .auth import Keys
from .chat import chat_completions
from .completions import completions
from .errors import ApiError, invalid
from .http import ClientGoneError, Exchange, Receive, Scope, Send
from .logs import log
from .service import Service

Handler = Callable[[Service, Exchange], Awaitable[None]]
CLIENT_GONE = 499  # in logs and metrics: no status was sent, or none that was read


@dataclass(frozen=True)
class Route:
    """What answers a path; `is_open` needs no key, `generates` takes a place in the queue."""

    method: str
    handler: Handler
    is_open: bool = False
    generates: bool = False


ROUTES = {
    "/": Route("GET", routes.page),
    "/health": Route("GET", routes.health, is_open=True),
    "/health/ready": Route("GET", routes.ready, is_open=True),
    "/ready": Route("GET", routes.ready),
    "/metrics": Route("GET", routes.metrics),
    "/version": Route("GET", routes.version),
    "/openapi.json": Route("GET", routes.openapi_document),
    "/facts": Route("GET", routes.facts),
    "/tokenizer_info": Route("GET", routes.tokenizer_info),
    "/tokenize": Route("POST", routes.tokenize),
    "/detokenize": Route("POST", routes.detokenize),
    "/v1/models": Route("GET", routes.models),
    "/v1/completions": Route("POST", completions, generates=True),
    "/v1/chat/completions": Route("POST", chat_completions, generates=True),
}
MODEL_PREFIX = "/v1/models/"


class App:
    """Serves HTTP scopes."""

    def __init__(self, service: Service, keys: Keys) -> None:
        self._service, self._keys = service, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = time.monotonic()
        exchange = Exchange(scope, receive, send, _request_id(scope))
        path = exchange.path if exchange.path in ROUTES else "other"
        try:
            await self._answer(exchange)
        except ClientGoneError:
            exchange.status = CLIENT_GONE
        finally:
            self._record(exchange, path, time.monotonic() - begun)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            await self._dispatch(exchange)
        except ApiError as error:
            await self._fail(exchange, error)
        except RequestError as error:  # of the tokenizer, the sampler or a grammar
            await self._fail(exchange, invalid(str(error)))
        except ClientGoneError:
            raise
        except Exception as error:
            log("error", "internal_error", request_id=exchange.request_id, error=f"{type(error).__name__}: {error}"[:500])
            await self._fail(exchange, ApiError(500, "an internal error", "internal_error"))
            raise

    async def _dispatch(self, exchange: Exchange) -> None:
        route = ROUTES.get(exchange.path)
        if route is None and exchange.path.startswith(MODEL_PREFIX):
            route = Route("GET", routes.model)
        if route is None or not route.is_open:
            self._authorise(exchange)
        if route is None:
            raise ApiError(404, f"no such path: {exchange.path[:100]}", "not_found")
        if exchange.method != route.method and not (exchange.method == "HEAD" and route.method == "GET"):
            raise ApiError(405, f"{exchange.path[:100]} takes {route.method}", "method_not_allowed")
        if not route.generates:
            await route.handler(self._service, exchange)
            return
        if not self._service.is_ready:
            text = "the server is shutting down" if self._service.is_draining else "the engine is not ready"
            raise ApiError(503, text, "engine_not_ready", retry_after=1)
        self._service.places.take()
        try:
            await route.handler(self._service, exchange)
        finally:
            self._service.places.give_back(1)

    def _authorise(self, exchange: Exchange) -> None:
        if not self._keys:
            return
        identity = self._keys.identity(exchange.headers.get(b"authorization", b""))
        if identity is None:
            raise ApiError(401, "no valid API key was given", "invalid_api_key")
        exchange.identity = identity

    async def _fail(self, exchange: Exchange, error: ApiError) -> None:
        if exchange.status:  # the response has begun: an event is all that can be said
            await exchange.write(b"data: " + error.body + b"\n\n", more=False)
            return
        headers = []
        if error.status == 401:
            headers.append((b"www-authenticate", b'Basic realm="megalith"' if exchange.path == "/" else b"Bearer"))
        if error.status == 405:
            headers.append((b"allow", ROUTES[exchange.path].method.encode() if exchange.path in ROUTES else b"GET"))
        await exchange.error(error, headers)

    def _record(self, exchange: Exchange, path: str, seconds: float) -> None:
        metrics = self._service.metrics
        metrics.requests.labels(path, str(exchange.status)).inc()
        if exchange.completion_tokens:
            metrics.generation_tokens.inc(exchange.completion_tokens)
        log(
            "info",
            "request",
            request_id=exchange.request_id,
            client=exchange.identity,
            method=exchange.method,
            path=exchange.path[:200],
            status=exchange.status,
            ms=round(seconds * 1e3, 1),
            prompt_tokens=exchange.prompt_tokens,
            completion_tokens=exchange.completion_tokens,
        )


def _request_id(scope: Scope) -> str:
    """The client's x-request-id where it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 0 < len(value) <= 128 and value.replace(b"-", b"").replace(b"_", b"").isalnum():
            return str(value.decode("ascii"))
    return secrets.token_hex(12)
