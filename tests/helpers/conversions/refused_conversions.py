"""A conversion that is refused in one line and changes nothing, and calls of the system that fail."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_conversions import digest

from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.errors import ConvertError, PlanError, SaccadeError

BF16 = Mode("bf16")


def refuse(words: str, model: Path, out: Path, mode: Mode = BF16, kind: type[SaccadeError] = ConvertError) -> None:
    """The conversion is refused in one line with these words, and changes nothing anywhere."""
    before = digest(model.parent)
    with pytest.raises(kind, match=words) as error:
        convert(model, out, mode)
    assert kind is PlanError or "\n" not in str(error.value)
    assert digest(model.parent) == before


def failing(call: Callable[..., Any], at: int, code: int) -> Callable[..., Any]:
    """`call`, whose `at`-th use fails as the system would."""
    left = [at]

    def fail(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return fail
