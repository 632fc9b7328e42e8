"""Renders chat templates in a process of its own: one request as JSON on stdin, or with the argument `serve` many.

The jinja2 sandbox stops attribute tricks, not nested loops or `"a" * 3e8`: limits on processor time and memory do. A
serving process compiles its template once, under these limits, and renders each request in a fork of itself that has them
to itself. Its frames are JSON after a length of four bytes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

CPU_SECONDS = 4
MEMORY_BYTES = 512 << 20
MAX_OUTPUT_CHARACTERS = 1 << 24


def compile_template(template: str) -> Any:
    """A template in transformers' environment, with its globals."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def answer_to(work: Callable[[], str]) -> dict[str, str]:
    """{"text"} or {"error"} of what renders a template."""
    try:
        text = work()
    except MemoryError:
        return {"error": "needs more memory than a template may use"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if len(text) > MAX_OUTPUT_CHARACTERS:
        return {"error": "renders more than 16 Mi characters"}
    return {"text": text}


def limit_processor(seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def read_frame() -> bytes | None:
    """The next frame of stdin, None at its end."""
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        return None
    return sys.stdin.buffer.read(int.from_bytes(head, "little"))


def write_frame(data: bytes) -> None:
    sys.stdout.buffer.write(len(data).to_bytes(4, "little") + data)
    sys.stdout.buffer.flush()


def in_fork(work: Callable[[], str]) -> bytes:
    """The JSON of a fork's answer, b"" for one that exceeded its limits."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        limit_processor(CPU_SECONDS)
        with open(writing, "wb") as pipe:
            pipe.write(json.dumps(answer_to(work)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    return data if not status else b""


def _rendered(compiled: list[Any], context: dict[str, Any]) -> str:
    return str(compiled[0].render(**context))


def serve() -> None:
    """Compile the template in the first frame, render it with the context in each of the others."""
    template = json.loads(read_frame() or b'""')
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    limit_processor(CPU_SECONDS)
    compiled: list[Any] = []

    def compile_once() -> str:
        compiled.append(compile_template(template))
        return ""

    failed = answer_to(compile_once)
    limit_processor(resource.RLIM_INFINITY)
    while (frame := read_frame()) is not None:
        render = partial(_rendered, compiled, json.loads(frame))
        data = in_fork(render) if compiled else json.dumps(failed).encode()
        write_frame(data or json.dumps({"error": "used more processor time or memory than it may"}).encode())


def main() -> None:
    """Read a request, answer {"text"} or {"error"}."""
    if sys.argv[1:] == ["serve"]:
        serve()
        return
    request = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answer = answer_to(lambda: compile_template(request["template"]).render(**request["context"]))
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
