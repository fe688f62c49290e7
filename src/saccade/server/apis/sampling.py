"""Fields that every API has for sampling, and SamplingParams out of them.

Types are strict: "1" is no number, 1.0 no integer, true neither. Fields that no engine knows are ignored, as others do.
Next: completions.py and chat.py, whose requests have these.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict

from saccade.engine.params import SamplingParams
from saccade.errors import RequestError
from saccade.server.refusals import ApiError

WholeNumber = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
YesNo = Annotated[bool, Strict()]

MOST_CHOICES = 128
MOST_STOPS = 64
LONGEST_STOP = 1024  # characters: each new piece of text is compared with every beginning of a stop string
MOST_LOGPROBS = 20


class ApiModel(BaseModel):
    """A part of a request. Numbers are finite."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(ApiModel):
    include_usage: YesNo = False
    continuous_usage_stats: YesNo = False


class SamplingFields(ApiModel):
    """What requests of OpenAI's APIs share, and the fields that vLLM and SGLang add to them."""

    model: str | None = None
    n: WholeNumber | None = Field(None, ge=1, le=MOST_CHOICES)
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: WholeNumber | None = None
    min_p: Number | None = None
    seed: WholeNumber | None = None
    stop: str | list[str] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    stop_token_ids: list[WholeNumber] | None = None
    min_tokens: WholeNumber | None = None
    ignore_eos: YesNo | None = None
    stream: YesNo | None = None
    stream_options: StreamOptions | None = None
    user: Any = None

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def make_params(self, max_tokens: int | None, logprobs: int | None, **more: Any) -> list[SamplingParams]:
        """Params of each of `n` answers: with a seed, answer i has seed + i."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
            text = f"stop: expected at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters"
            raise ApiError(400, text, "stop")
        values: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # -1 is "no limit" elsewhere
            "top_p": self.top_p,
            "stop": tuple(stop for stop in stops if stop),
            "ignore_eos": self.ignore_eos or False,
            "logprobs": logprobs,
            **self._collect_more(),
            **more,
        }
        seeds = [None if self.seed is None else self.seed + i for i in range(self.count)]
        try:
            return [SamplingParams(seed=seed, **values) for seed in seeds]
        except RequestError as error:
            raise ApiError(400, str(error), str(error).partition(":")[0]) from None

    def _collect_more(self) -> dict[str, Any]:
        """The fields that were given and that change something."""
        names = (
            "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stop_token_ids",
            "min_tokens",
        )  # fmt: skip
        neutral = {"repetition_penalty": 1.0}
        given = {name: getattr(self, name) for name in names}
        return {k: v for k, v in given.items() if v is not None and v != neutral.get(k, 0) and v not in ({}, [])}


def refuse_field(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name}: {why}", name)
