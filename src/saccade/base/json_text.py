"""JSON, as every command prints it: what any parser takes.

Python's own `json.dumps` writes NaN and Infinity, which are no JSON. Here such a number is null.
"""

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text. A number that is not finite becomes null, a key that is one becomes its name ("nan")."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:  # rare, so that nothing is copied otherwise; a list that holds itself raises again
        return json.dumps(_replace(value), indent=indent, allow_nan=False)


def _replace(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_spell(key): _replace(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(item) for item in value]
    return value


def _spell(key: Any) -> Any:
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
