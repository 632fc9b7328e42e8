"""The endpoints that generate nothing."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import msgspec

from megalith.version import __version__

from .bodies import DetokenizeBody, TokenizeBody, decode
from .chat import normalised
from .errors import ApiError, invalid
from .http import Exchange
from .metrics import CONTENT_TYPE
from .openapi import document
from .service import Service
from .text import token_text

_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)
_PAGE_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
     b"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]  # fmt: skip


async def page(service: Service, exchange: Exchange) -> None:
    """The page for a person."""
    await exchange.respond(200, files(__package__).joinpath("page.html").read_bytes(), _PAGE_HEADERS)


async def health(service: Service, exchange: Exchange) -> None:
    """Alive: the server answers, and its engine runs or is being started."""
    alive = service.engine.pid is not None
    await exchange.json(
        {"status": "ok" if alive else "no engine", "engine_ready": service.engine.is_ready}, 200 if alive else 503
    )


async def ready(service: Service, exchange: Exchange) -> None:
    """Takes requests."""
    if not service.is_ready:
        reason = "draining" if service.is_draining else "the engine is not ready"
        raise ApiError(503, reason, "not_ready", retry_after=1)
    await exchange.json({"status": "ready"})


async def metrics(service: Service, exchange: Exchange) -> None:
    await exchange.respond(200, service.metrics.text(service), [(b"content-type", CONTENT_TYPE)])


async def version(service: Service, exchange: Exchange) -> None:
    await exchange.json({"version": __version__})


async def openapi_document(service: Service, exchange: Exchange) -> None:
    await exchange.json(document())


async def facts(service: Service, exchange: Exchange) -> None:
    """What the page shows: the model, its memory, the load."""
    load = service.engine.load
    now = {
        "running": load.running,
        "waiting": load.waiting,
        "kv_pages_used": load.pages_used,
        "kv_pages": load.pages_total,
        "ready": service.is_ready,
    }
    await exchange.json({"model": service.model_id, "version": __version__, **service.facts, "load": now})


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "megalith",
        "max_model_len": service.limits.max_seq_len,
    }


async def models(service: Service, exchange: Exchange) -> None:
    await exchange.json({"object": "list", "data": [_model(service)]})


async def model(service: Service, exchange: Exchange) -> None:
    service.check_model(exchange.path.removeprefix("/v1/models/"))
    await exchange.json(_model(service))


async def tokenizer_info(service: Service, exchange: Exchange) -> None:
    tokenizer = service.need_tokenizer()
    config = service.config
    await exchange.json(
        {
            "vocab_size": config.vocab_size,
            "bos_token_id": config.bos_token_id,
            "eos_token_ids": config.eos_token_ids,
            "max_model_len": service.limits.max_seq_len,
            "special_tokens": tokenizer.special_tokens,
            "chat_template": tokenizer.chat_template,
        }
    )


async def tokenize(service: Service, exchange: Exchange) -> None:
    """Ids of a text, or of messages in the chat template."""
    body: TokenizeBody = decode(await _body(service, exchange), _tokenize_decoder)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give one of prompt and messages", "prompt")
    if body.messages is not None:
        text = await service.renderer.render(normalised(body.messages), None)
        ids = await service.encode(text, bool(body.add_special_tokens))
    else:
        ids = await service.encode(body.prompt or "", body.add_special_tokens is not False)
    answer = {"tokens": ids, "count": len(ids), "max_model_len": service.limits.max_seq_len}
    if body.return_token_strs:
        tokenizer = service.need_tokenizer()
        answer["token_strs"] = [token_text(tokenizer, token) for token in ids]
    await exchange.json(answer)


async def detokenize(service: Service, exchange: Exchange) -> None:
    """The text of ids."""
    body: DetokenizeBody = decode(await _body(service, exchange), _detokenize_decoder)
    service.check_model(body.model)
    size = service.config.vocab_size
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        raise invalid(f"token {wrong}: ids go from 0 to {size - 1}", "tokens")
    text = service.need_tokenizer().decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    await exchange.json({"prompt": text})


async def _body(service: Service, exchange: Exchange) -> bytes:
    return await exchange.body(service.limits.max_body_bytes, service.limits.body_seconds)
