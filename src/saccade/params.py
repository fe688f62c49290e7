"""What a request may ask of sampling, and what a checkpoint recommends.

`SamplingParams` is what the user writes; None means "as the checkpoint's generation_config.json says, else the
plainest choice". `Defaults` is that file, read. Knows neither torch nor tokenizers. Next: scheduler.py, sample.py.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from stat import S_ISREG
from typing import Any

from saccade.errors import ConfigError, RequestError

MOST = 2**63 - 1  # of any number that counts something: what a tensor of integers can hold

# What generation_config.json may ask for that is not done here, and the values that change nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "presence_penalty": (0.0,), "frequency_penalty": (0.0,), "num_beams": (1,),
    "num_beam_groups": (1,), "penalty_alpha": (0.0,), "guidance_scale": (1.0,), "bad_words_ids": ([],),
    "sequence_bias": ([], {}), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "min_length": (0,), "min_new_tokens": (0,), "max_new_tokens": (), "stop_strings": ([],),
    "watermarking_config": (), "dola_layers": (),
}  # fmt: skip
NOT_DONE_RANDOM: dict[str, tuple[Any, ...]] = {  # these say nothing about greedy decoding
    "min_p": (0.0,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "top_h": (),
}  # fmt: skip


def is_integer(value: object) -> bool:
    """True for int and numpy's integers; False for bool, which Python counts among the integers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_count(value: object, least: int) -> bool:
    """Whether `value` is an integer from `least` to 2**63 - 1."""
    return is_integer(value) and least <= value <= MOST  # type: ignore[operator]


def is_number(value: object) -> bool:
    """True for finite numbers that a float can hold; 10**400 is none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and isfinite(float(value))
    except OverflowError:
        return False


def show(value: object) -> str:
    """`value` for an error text: on one line, not long. An integer of 5,000 digits has no repr at all."""
    try:
        text = repr(value)
    except Exception:  # any class may define its own
        text = f"a value of type {type(value).__name__} that cannot be printed"
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def show_count(n: int, noun: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. None is what the checkpoint recommends, else the plainest choice.

    - `max_tokens`: new tokens; None: to the end of the context, or of the cache if that is smaller.
    - `temperature`: 0 is greedy.
    - `top_k`: choose among the k likeliest tokens; 0: among all.
    - `top_p`: then among the fewest whose probabilities reach p; 1: among all.
    - `seed`: the same seed gives the same tokens, whatever else runs; None: a fresh one.
    - `stop`: the text ends before the first of these strings; a single string is taken as one.
    - `ignore_eos`: go on past the end-of-sequence token.
    - `logprobs`: log-probabilities of tokens. None: none; 0: of the chosen one; n: of the n likeliest as well.

    Raises RequestError, naming the field, when a value makes no sense. Numbers of other libraries (numpy's) become
    Python's own, which neither overflow nor wrap.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))  # a frozen dataclass may still tidy itself while being born
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        self._require("max_tokens", "an integer of at least 1 and below 2**63", lambda v: is_count(v, 1), int)
        self._require("temperature", "a number of at least 0", lambda v: is_number(v) and v >= 0, float)
        self._require("top_k", "an integer of at least 0 (0: no limit)", lambda v: is_integer(v) and v >= 0, int)
        self._require("top_p", "a number above 0 and at most 1", lambda v: is_number(v) and 0 < float(v) <= 1, float)
        self._require("seed", "an integer", is_integer, int)
        self._require("ignore_eos", "True or False", lambda v: isinstance(v, bool), bool)
        self._require("logprobs", "an integer of at least 0 and below 2**63", lambda v: is_count(v, 0), int)
        is_text = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        if not is_text:
            raise RequestError(f"stop: expected strings that are not empty, found {show(self.stop)}")

    def _require(self, name: str, expected: str, is_right: Callable[[Any], bool], own: Callable[[Any], Any]) -> None:
        value = getattr(self, name)
        if value is None and name != "ignore_eos":
            return
        if not is_right(value):
            raise RequestError(f"{name}: expected {expected}, found {show(value)}")
        object.__setattr__(self, name, own(value))


@dataclass(frozen=True)
class Defaults:
    """generation_config.json: the sampling a checkpoint recommends, and its end-of-sequence tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()  # what the file asks for and does not get

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], eos_token_ids: tuple[int, ...] = ()) -> "Defaults":
        """`eos_token_ids` are config.json's, used when `values` names none (a number or a list).

        `do_sample: false` is greedy whatever else stands there, since transformers writes unused temperatures too.
        Without `do_sample`, a temperature means what it says. What is asked for and not done here (penalties, beams,
        min_p) is named in `notes`: a published file must not make a model unusable. Raises ConfigError.
        """
        eos = values.get("eos_token_id")
        if eos is None:
            ids = eos_token_ids
        else:
            ids = tuple(eos) if isinstance(eos, list) else (eos,)
            if not all(is_integer(i) and i >= 0 for i in ids):
                raise ConfigError(f"generation_config.json: eos_token_id: expected token ids, found {show(eos)}")
        do_sample = values.get("do_sample")
        if not (do_sample is None or isinstance(do_sample, bool)):
            raise ConfigError(f"generation_config.json: do_sample: expected true or false, found {show(do_sample)}")
        temperature = 0.0 if do_sample is False else values.get("temperature")
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        notes = _name_what_is_not_done(values, is_greedy=temperature == 0)
        if do_sample is False:
            return cls(eos_token_ids=ids, notes=notes)
        try:
            params = SamplingParams(temperature=temperature, top_k=values.get("top_k"), top_p=values.get("top_p"))
        except RequestError as error:
            raise ConfigError(f"generation_config.json: {error}") from None
        top_p = 1.0 if params.top_p is None else params.top_p
        return cls(params.temperature or 0.0, params.top_k or 0, top_p, ids, notes)

    @classmethod
    def load(cls, directory: str | Path, eos_token_ids: tuple[int, ...] = ()) -> "Defaults":
        """Read `directory`/generation_config.json; without that file: greedy."""
        values = read_object(Path(directory) / "generation_config.json")
        return cls(eos_token_ids=eos_token_ids) if values is None else cls.from_dict(values, eos_token_ids)

    def complete(self, params: SamplingParams) -> SamplingParams:
        """`params` with every None that has a recommendation filled in. `max_tokens`, `seed` and `logprobs` stay."""
        return replace(
            params,
            temperature=self.temperature if params.temperature is None else params.temperature,
            top_k=self.top_k if params.top_k is None else params.top_k,
            top_p=self.top_p if params.top_p is None else params.top_p,
        )


def _name_what_is_not_done(values: Mapping[str, Any], is_greedy: bool) -> tuple[str, ...]:
    """One note with every key of `values` that would change the tokens and is not honoured; () if there is none."""
    table = NOT_DONE if is_greedy else NOT_DONE | NOT_DONE_RANDOM
    asked = [f"{key}={show(values[key])}" for key in table if values.get(key) not in (None, False, *table[key])]
    return (f"generation_config.json: not supported and ignored: {', '.join(asked)}",) if asked else ()


def is_file_there(path: Path) -> bool:
    """False if there is nothing at `path`. Raises ConfigError for what is there but no file that can be read: a
    directory, a dangling link, a pipe that would be waited for."""
    try:
        is_regular = S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        if not path.is_symlink():
            return False
        raise ConfigError(f"{path}: expected a file, found a link to nothing") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not is_regular:
        raise ConfigError(
            f"{path}: expected a regular file, found a {'directory' if path.is_dir() else 'device or pipe'}"
        )
    return True


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None without the file. Raises ConfigError for anything else."""
    if not is_file_there(path):
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
