"""Values of a packed file made safe to print: JSON-ready, and text without control characters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from megalith.format.errors import printable


def jsonable(value: Any) -> Any:
    """`value` with bytes as hex and non-finite floats as text, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def shown(value: Any) -> str:
    """Text as it is, anything else as JSON; escaped and cut."""
    return printable(value if isinstance(value, str) else json.dumps(value))


def fields(values: Mapping[str, Any], indent: str = "  ") -> list[str]:
    """One aligned line per entry."""
    width = max((len(printable(name)) for name in values), default=0)
    return [f"{indent}{printable(name):<{width}}  {shown(value)}" for name, value in values.items()]
