"""Renders one chat template in a process of its own: JSON on stdin, text on stdout.

The jinja2 sandbox stops attribute tricks, not nested loops or `"a" * 3e8`: limits on processor time and memory do.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

CPU_SECONDS = 4
MEMORY_BYTES = 512 << 20
MAX_OUTPUT_CHARACTERS = 1 << 24


def render(template: str, context: dict[str, Any]) -> str:
    """The text of a template with transformers' environment and globals."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template).render(**context)


def main() -> None:
    """Read a request, answer {"text"} or {"error"}."""
    request = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        text = render(request["template"], request["context"])
        answer = {"text": text} if len(text) <= MAX_OUTPUT_CHARACTERS else {"error": "renders more than 16 Mi characters"}
    except MemoryError:
        answer = {"error": "needs more memory than a template may use"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
