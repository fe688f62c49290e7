"""What a request may ask of sampling, and what a checkpoint recommends.

`SamplingParams` is what the user writes; None means "as the checkpoint's generation_config.json says, else the
plainest choice". `Defaults` is that file, read. Knows neither torch nor tokenizers. Next: scheduler.py, sample.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saccade.base.json_files import read_leniently
from saccade.base.values import MOST_COUNT, is_count, is_integer, is_number, is_short, show
from saccade.config.keys import read_number, read_token_ids
from saccade.errors import RequestError

# What generation_config.json may ask for that is not done here, and the values that change nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "presence_penalty": (0.0,), "frequency_penalty": (0.0,), "num_beams": (1,),
    "num_beam_groups": (1,), "penalty_alpha": (0.0,), "guidance_scale": (1.0,), "bad_words_ids": ([],),
    "sequence_bias": ([], {}), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "min_length": (0,), "min_new_tokens": (0,), "max_new_tokens": (),
    "watermarking_config": (), "dola_layers": (),
}  # fmt: skip
NOT_DONE_RANDOM: dict[str, tuple[Any, ...]] = {  # these say nothing about greedy decoding
    "min_p": (0.0,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "top_h": (),
}  # fmt: skip


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
    """generation_config.json: the sampling a checkpoint recommends, its end-of-sequence tokens and stop strings."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()  # what is odd in the file, and what it asks for and does not get
    stop: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Defaults":
        """What the file says. Nothing in it is refused: a published file must not make a model unusable. What another
        convention writes (`top_k: -1`, 50.0 for 50) gets its meaning there, what makes no sense is ignored, and what is
        not done here (penalties, beams, min_p) is left; each is named in `notes`.

        `do_sample: false` is greedy whatever else stands there, since transformers writes unused temperatures too.
        Without `do_sample`, a temperature means what it says.
        """
        odd = list[str]()
        ids, oddities = read_token_ids(values.get("eos_token_id"))
        odd += [f"eos_token_id: {text}" for text in oddities]
        do_sample = _read_flag(values, "do_sample", odd)
        temperature = None if do_sample is False else _read_number(values, "temperature", odd)
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        top_k, top_p = 0, None
        if do_sample is not False:
            top_k, top_p = int(_read_number(values, "top_k", odd) or 0), _read_number(values, "top_p", odd)
            if top_p == 0:  # transformers' rule
                odd.append(f"top_p={show(values['top_p'])} is taken as top_k=1: the likeliest token alone")
                top_k = 1
        stop = _read_stop(values, odd)
        notes = [f"generation_config.json: {text}" for text in odd]
        notes += _name_what_is_not_done(values, is_greedy=temperature == 0)
        return cls(float(temperature), top_k, float(top_p or 1.0), ids, tuple(notes), stop)

    @classmethod
    def load(cls, directory: str | Path) -> "Defaults":
        """Read `directory`/generation_config.json. Without that file, or with one that cannot be read: greedy."""
        values, notes = read_leniently(Path(directory) / "generation_config.json")
        found = cls.from_dict(values or {})
        return replace(found, notes=notes + found.notes)

    def complete(self, params: SamplingParams) -> SamplingParams:
        """`params` with every None that has a recommendation filled in, and with the checkpoint's stop strings unless
        ends are ignored. `max_tokens`, `seed` and `logprobs` stay."""
        return replace(
            params,
            temperature=self.temperature if params.temperature is None else params.temperature,
            top_k=self.top_k if params.top_k is None else params.top_k,
            top_p=self.top_p if params.top_p is None else params.top_p,
            stop=params.stop if params.ignore_eos else (*params.stop, *self.stop),
        )


# Each option's least and greatest number, and whether it is a whole one.
_RANGES = {"temperature": (0, float("inf"), False), "top_k": (0, MOST_COUNT, True), "top_p": (0, 1, False)}


def _read_number(values: Mapping[str, Any], name: str, odd: list[str]) -> int | float | None:
    """A sampling option of a file; None if it is not there, or makes no sense."""
    value = values.get(name)
    if value is None:
        return None
    number = read_number(value)
    least, most, is_whole = _RANGES[name]
    if name == "top_k" and number == -1:  # vLLM and SGLang
        odd.append(f"top_k={show(value)} is taken as 0: no limit")
        return 0
    if number is None or not least <= number <= most or (is_whole and number != int(number)):
        odd.append(f"{name}={show(value)} makes no sense and is ignored")
        return None
    if isinstance(value, str) or (is_whole and not isinstance(value, int)):
        number = int(number) if is_whole else number
        odd.append(f"{name}={show(value)} is taken as {number}")
    return number


def _read_flag(values: Mapping[str, Any], name: str, odd: list[str]) -> bool | None:
    """True or false of a file, also as 1 and 0 or as text; None if it is not there, or neither."""
    value = values.get(name)
    if value is None or isinstance(value, bool):
        return value
    meaning = {"1": True, "0": False, "true": True, "false": False}.get(str(value).lower() if is_short(value) else "")
    odd.append(f"{name}={show(value)} " + ("is ignored" if meaning is None else f"is taken as {str(meaning).lower()}"))
    return meaning


def _read_stop(values: Mapping[str, Any], odd: list[str]) -> tuple[str, ...]:
    """The stop strings of a file: one or a list."""
    value = values.get("stop_strings")
    items = [] if value is None else value if isinstance(value, list) else [value]
    odd += [f"stop_strings: {show(item)} is no stop string and is ignored" for item in items if not is_stop(item)]
    return tuple(dict.fromkeys(item for item in items if is_stop(item)))


def is_stop(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _name_what_is_not_done(values: Mapping[str, Any], is_greedy: bool) -> tuple[str, ...]:
    """One note with every key of `values` that would change the tokens and is not honoured; () if there is none."""
    table = NOT_DONE if is_greedy else NOT_DONE | NOT_DONE_RANDOM
    asked = [f"{key}={show(values[key])}" for key in table if values.get(key) not in (None, False, *table[key])]
    return (f"generation_config.json: not supported and ignored: {', '.join(asked)}",) if asked else ()
