"""What a request may ask of sampling, and what a checkpoint recommends.

`SamplingParams` is what the user writes; None means "as the checkpoint's generation_config.json says, else the
plainest choice". `Defaults` is that file, read. Knows neither torch nor tokenizers. Next: scheduler.py, sample.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saccade.base.json_files import read_leniently
from saccade.base.values import MOST_COUNT, is_short, show
from saccade.config.keys import read_number, read_token_ids
from saccade.engine.sampling.rules import FIELD_RULES, GRAMMARS, is_stop
from saccade.errors import RequestError
from saccade.text.prompts import as_list, is_list

# What generation_config.json may ask for that is not done here, and the values that change nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "num_beams": (1,),
    "num_beam_groups": (1,), "penalty_alpha": (0.0,), "guidance_scale": (1.0,), "bad_words_ids": ([],),
    "sequence_bias": ([], {}), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "min_length": (0,), "min_new_tokens": (0,), "max_new_tokens": (),
    "watermarking_config": (), "dola_layers": (),
}  # fmt: skip
NOT_DONE_RANDOM: dict[str, tuple[Any, ...]] = {  # these say nothing about greedy decoding
    "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "top_h": (),
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
    - `logprobs`: log-probabilities of tokens. None: none; 0: of the chosen one; n: of the n likeliest as well. They are
      the model's own: before temperature, penalties, bias and grammar.
    - `n`: answers to the prompt. Answer i has the seed `seed + i`.
    - `min_p`: before top_k and top_p, drop tokens less likely than min_p times the likeliest; 0: none.
    - `presence_penalty`, `frequency_penalty`: from -2 to 2, taken off the logit of a token that the answer holds: once;
      and as often as it does. Tokens of the prompt do not count.
    - `repetition_penalty`: above 0. The logit of a token that prompt or answer hold is divided by it if positive, else
      multiplied; 1 changes nothing. It comes before the other two.
    - `logit_bias`: token id -> number from -100 to 100, added to the logit after all penalties.
    - `min_tokens`: so many tokens come before any end: end tokens and `stop_token_ids` cannot be chosen, stop strings
      are looked for behind them.
    - `stop_token_ids`: tokens that end the answer as an end token does; with `ignore_eos` too.
    - `include_stop_str_in_output`: the text keeps the stop string, or the text of the token that ended it.
    - `skip_special_tokens`: False: the text shows special tokens too.
    - `prompt_logprobs`: as `logprobs`, of each token of the prompt but the first.
    - `json_schema` (text or dict), `regex`, `grammar` (EBNF, from its rule `root`), `structural_tag` (of xgrammar, text
      or dict): at most one of them; the answer matches it as a whole, and ends where it does. Needs the package
      xgrammar. A keyword of a schema that cannot be enforced is refused by name.

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
    n: int = 1
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[Any, float] | tuple[tuple[int, float], ...] | None = None  # pairs, once it is checked
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None  # text, once it is checked
    regex: str | None = None
    grammar: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None  # text, once it is checked

    def __post_init__(self) -> None:
        for name, expected, is_right, own in FIELD_RULES:
            value = getattr(self, name)
            if value is None and getattr(type(self), name) is None:
                continue
            if not is_right(value):
                raise RequestError(f"{name}: expected {expected}, found {show(value)}")
            object.__setattr__(self, name, own(value))  # a frozen dataclass may still tidy itself while being born
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens: expected at most max_tokens={self.max_tokens}, found {show(self.min_tokens)}"
            )
        asked = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(asked) > 1:
            raise RequestError(f"{' and '.join(asked)}: expected at most one of {', '.join(GRAMMARS)}")

    @property
    def penalties(self) -> tuple[float, float, float]:
        """Repetition, presence, frequency."""
        repetition = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        return repetition, self.presence_penalty or 0.0, self.frequency_penalty or 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether any token is chosen from other logits than the model's."""
        return bool(self.penalties != (1.0, 0.0, 0.0) or self.logit_bias or self.min_tokens or self.constraint)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """What is added to the logit of which token."""
        return tuple(self.logit_bias or ())  # pairs by now

    @property
    def constraint(self) -> tuple[str, str] | None:
        """Which of GRAMMARS the answer must match, and its text."""
        return next(((name, str(getattr(self, name))) for name in GRAMMARS if getattr(self, name) is not None), None)

    def check_tokens(self, vocab_size: int) -> None:
        """RequestError for a token that the model does not have."""
        named = [("logit_bias", token) for token, _ in self.biases]
        for name, token in named + [("stop_token_ids", token) for token in self.stop_token_ids]:
            if token >= vocab_size:
                raise RequestError(f"{name}: token {token} is not in the vocabulary; ids are 0 to {vocab_size - 1}")

    def each(self) -> "list[SamplingParams]":
        """The n requests of one answer that these are."""
        if self.n == 1:
            return [self]
        return [replace(self, n=1, seed=None if self.seed is None else self.seed + i) for i in range(self.n)]


@dataclass(frozen=True)
class Defaults:
    """generation_config.json: the sampling a checkpoint recommends, its end-of-sequence tokens and stop strings."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()  # what is odd in the file, and what it asks for and does not get
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Defaults":
        """What the file says. Nothing in it is refused: a published file must not make a model unusable. What another
        convention writes (`top_k: -1`, 50.0 for 50) gets its meaning there, what makes no sense is ignored, and what is
        not done here (beams, typical_p) is left; each is named in `notes`.

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
        min_p = _read_number(values, "min_p", odd) if do_sample is not False else None
        penalties = [_read_number(values, name, odd) for name in PENALTIES]
        stop = _read_stop(values, odd)
        notes = [f"generation_config.json: {text}" for text in odd]
        notes += _name_what_is_not_done(values, is_greedy=temperature == 0)
        return cls(
            float(temperature), top_k, float(top_p or 1.0), ids, tuple(notes), stop, float(min_p or 0.0),
            float(penalties[0] or 0.0), float(penalties[1] or 0.0), float(penalties[2] or 1.0),
        )  # fmt: skip

    @classmethod
    def load(cls, directory: str | Path) -> "Defaults":
        """Read `directory`/generation_config.json. Without that file, or with one that cannot be read: greedy."""
        values, notes = read_leniently(Path(directory) / "generation_config.json")
        found = cls.from_dict(values or {})
        return replace(found, notes=notes + found.notes)

    def complete(self, params: SamplingParams) -> SamplingParams:
        """`params` with every None that has a recommendation filled in, and with the checkpoint's stop strings unless
        ends are ignored. `max_tokens`, `seed` and what has no recommendation stay."""
        names = ("temperature", "top_k", "top_p", "min_p", *PENALTIES)
        open_ones = {name: getattr(self, name) for name in names if getattr(params, name) is None}
        return replace(params, **open_ones, stop=params.stop if params.ignore_eos else (*params.stop, *self.stop))


PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")

# Each option's least and greatest number, and whether it is a whole one.
_RANGES = {
    "temperature": (0, float("inf"), False), "top_k": (0, MOST_COUNT, True), "top_p": (0, 1, False),
    "min_p": (0, 1, False), "presence_penalty": (-2, 2, False), "frequency_penalty": (-2, 2, False),
    "repetition_penalty": (1e-6, 1e6, False),
}  # fmt: skip


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


def _name_what_is_not_done(values: Mapping[str, Any], is_greedy: bool) -> tuple[str, ...]:
    """One note with every key of `values` that would change the tokens and is not honoured; () if there is none."""
    table = NOT_DONE if is_greedy else NOT_DONE | NOT_DONE_RANDOM
    asked = [f"{key}={show(values[key])}" for key in table if values.get(key) not in (None, False, *table[key])]
    return (f"generation_config.json: not supported and ignored: {', '.join(asked)}",) if asked else ()


def choose_params(params: Any, sampling_params: Any) -> Any:
    """What was given under either name; RequestError if both were."""
    if params is not None and sampling_params is not None:
        raise RequestError("params and sampling_params are one argument; expected one of them, found both")
    return sampling_params if params is None else params


def check_params(params: object) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params: expected SamplingParams, found {show(params)}")
    return params


def list_params(params: Any, prompts: int) -> list[SamplingParams]:
    """Of each prompt: one for all, or a list of one each. RequestError for others."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    options = [check_params(given) for given in (as_list(params) if is_list(params) else [params])]
    if len(options) != prompts:
        raise RequestError(f"{prompts} prompts but {len(options)} params; expected one for all, or one each")
    return options
