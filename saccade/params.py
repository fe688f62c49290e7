"""What a request may ask of sampling, and what a checkpoint recommends.

`SamplingParams` is what the user writes; None means "as the checkpoint's generation_config.json says, else the
plainest choice". `Defaults` is that file, read. Knows neither torch nor tokenizers. Next: scheduler.py, sample.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from saccade.errors import ConfigError, RequestError


def is_integer(value: object) -> bool:
    """True for int and numpy's integers; False for bool, which Python counts among the integers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises RequestError, naming the field, when a value makes no sense."""

    max_tokens: int | None = None  # new tokens; None: to the end of the context, or of the cache if that is smaller
    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None  # choose among the k likeliest tokens; 0: among all
    top_p: float | None = None  # then among the fewest whose probabilities reach p; 1: among all
    seed: int | None = None  # the same seed gives the same tokens, whatever else runs; None: a fresh one
    stop: tuple[str, ...] = ()  # the text ends before the first of these; a single string is taken as one
    ignore_eos: bool = False  # go on past the end-of-sequence token
    logprobs: int | None = None  # None: none; 0: of the chosen token; n: of the n likeliest as well

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))  # a frozen dataclass may still tidy itself while being born
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        self._require("max_tokens", "an integer of at least 1", lambda v: is_integer(v) and v >= 1)
        self._require("temperature", "a number of at least 0", lambda v: is_number(v) and v >= 0)
        self._require("top_k", "an integer of at least 0 (0: no limit)", lambda v: is_integer(v) and v >= 0)
        self._require("top_p", "a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1)
        self._require("seed", "an integer", is_integer)
        self._require("ignore_eos", "True or False", lambda v: isinstance(v, bool))
        self._require("logprobs", "an integer of at least 0", lambda v: is_integer(v) and v >= 0)
        is_text = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        if not is_text:
            raise RequestError(f"stop: expected strings that are not empty, found {self.stop!r}")

    def _require(self, name: str, expected: str, is_right: Any) -> None:
        value = getattr(self, name)
        if value is None and name != "ignore_eos":
            return
        if not is_right(value):
            raise RequestError(f"{name}: expected {expected}, found {value!r}")


@dataclass(frozen=True)
class Defaults:
    """generation_config.json: the sampling a checkpoint recommends, and its end-of-sequence tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], eos_token_ids: tuple[int, ...] = ()) -> "Defaults":
        """`eos_token_ids` are config.json's, used when `values` names none (a number or a list).

        `do_sample: false` is greedy whatever else stands there, since transformers writes unused temperatures too.
        Without `do_sample`, a temperature means what it says. Raises ConfigError.
        """
        eos = values.get("eos_token_id")
        if eos is None:
            ids = eos_token_ids
        else:
            ids = tuple(eos) if isinstance(eos, list) else (eos,)
            if not all(is_integer(i) and i >= 0 for i in ids):
                raise ConfigError(f"generation_config.json: eos_token_id: expected token ids, found {eos!r}")
        if values.get("do_sample") is False:
            return cls(eos_token_ids=ids)
        temperature = values.get("temperature")
        if temperature is None:
            temperature = 1.0 if values.get("do_sample") else 0.0
        try:
            params = SamplingParams(temperature=temperature, top_k=values.get("top_k"), top_p=values.get("top_p"))
        except RequestError as error:
            raise ConfigError(f"generation_config.json: {error}") from None
        return cls(temperature, params.top_k or 0, 1.0 if params.top_p is None else params.top_p, ids)

    @classmethod
    def load(cls, directory: str | Path, eos_token_ids: tuple[int, ...] = ()) -> "Defaults":
        """Read `directory`/generation_config.json; without that file: greedy."""
        path = Path(directory) / "generation_config.json"
        if not path.is_file():
            return cls(eos_token_ids=eos_token_ids)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: expected JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
        return cls.from_dict(values, eos_token_ids)

    def complete(self, params: SamplingParams) -> SamplingParams:
        """`params` with every None that has a recommendation filled in. `max_tokens`, `seed` and `logprobs` stay."""
        return replace(
            params,
            temperature=self.temperature if params.temperature is None else params.temperature,
            top_k=self.top_k if params.top_k is None else params.top_k,
            top_p=self.top_p if params.top_p is None else params.top_p,
        )
