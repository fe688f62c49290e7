"""Fields that every API has for sampling, and SamplingParams out of them.

Next: completions.py and chat.py, whose requests have these.
"""

from typing import Any

from pydantic import Field

from saccade.engine.params import SamplingParams
from saccade.errors import RequestError
from saccade.look.selected import MOST_SELECTED
from saccade.server.apis.constraints import ConstraintFields, find_constraint
from saccade.server.apis.types import ApiModel, Number, WholeNumber, YesNo
from saccade.server.refusals import ApiError

MOST_CHOICES = 128
MOST_STOPS = 64
LONGEST_STOP = 1024  # characters: each new piece of text is compared with every beginning of a stop string
MOST_LOGPROBS = 20


HANDED_ON = (
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "stop_token_ids", "min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip


class StreamOptions(ApiModel):
    include_usage: YesNo = False
    continuous_usage_stats: YesNo = False


class SaccadeFields(ApiModel):
    """What no other API has."""

    selection: YesNo = False  # tell where each token of the answer looked


class SamplingFields(ConstraintFields):
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
    include_stop_str_in_output: YesNo | None = None
    skip_special_tokens: YesNo | None = None
    stream: YesNo | None = None
    stream_options: StreamOptions | None = None
    user: Any = None
    saccade: SaccadeFields | None = None

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def wants_look(self, config: Any, limit: int) -> bool:
        """Whether it is asked where answers look. ApiError if that is too much to tell; `limit`: tokens of one."""
        if self.saccade is None or not self.saccade.selection:
            return False
        seen = config.num_hidden_layers * min(config.index_topk, config.max_position_embeddings)
        if seen * limit * self.count > MOST_SELECTED:
            most = MOST_SELECTED // (seen * self.count)
            text = f"{seen:,} selected tokens for each token of an answer; expected a max_tokens of at most {most}"
            raise ApiError(400, f"saccade.selection: {text}, found {limit}", "saccade.selection")
        return True

    def make_params(self, max_tokens: int | None, logprobs: int | None, **more: Any) -> list[SamplingParams]:
        """Params of each of `n` answers: with a seed, answer i has seed + i. `more` counts over the fields."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stops += more.pop("stops", ())
        if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
            text = f"stop: expected at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters"
            raise ApiError(400, text, "stop")
        given = {name: getattr(self, name) for name in HANDED_ON}
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        values |= find_constraint(self) | more
        if self.top_k == -1:  # "no limit" elsewhere
            values["top_k"] = 0
        try:
            return SamplingParams(
                max_tokens=max_tokens, logprobs=logprobs, n=self.count, stop=tuple(s for s in stops if s), **values
            ).each()
        except RequestError as error:
            raise ApiError(400, str(error), str(error).partition(":")[0]) from None


def refuse_field(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name}: {why}", name)
