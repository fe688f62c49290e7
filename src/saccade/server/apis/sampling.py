"""Fields that every API has for sampling, and SamplingParams out of them.

Next: completions.py and chat.py, whose requests have these.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from saccade.engine.params import SamplingParams
from saccade.errors import RequestError
from saccade.look.selected import MOST_SELECTED
from saccade.server.apis.constraints import ConstraintFields
from saccade.server.apis.types import ApiModel, Harmless, Number, Reason, Unserved, WholeNumber, YesNo
from saccade.server.refusals import NO_NAMES, ApiError, blame_field

MOST_CHOICES = 128
MOST_STOPS = 64
LONGEST_STOP = 1024  # characters: each new piece of text is compared with every beginning of a stop string
MOST_LOGPROBS = 20


HANDED_ON = (
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "stop_token_ids", "min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
    "prompt_logprobs",
)  # fmt: skip
FORMAT_WRITES = "the format of a chat writes all special tokens"
ONE_ORDER = "requests have one order: as they come"


class StreamOptions(ApiModel):
    include_usage: YesNo | None = None
    continuous_usage_stats: Annotated[Any, Unserved("usage comes once, at the end", False)] = None
    include_obfuscation: Annotated[Any, Harmless("events are never padded")] = None


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
    prompt_logprobs: WholeNumber | None = None
    stream: YesNo | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: YesNo | None = None  # as vLLM has it: texts of tokens may be alike
    return_tokens_as_token_ids: YesNo | None = None
    request_id: str | None = Field(None, min_length=1, max_length=256)
    saccade: SaccadeFields | None = None

    user: Annotated[Any, Harmless(Reason.NOBODY_LOOKS)] = None
    session_id: Annotated[Any, Harmless(Reason.NOBODY_LOOKS)] = None
    metadata: Annotated[Any, Harmless(Reason.NOBODY_LOOKS)] = None
    stream_interval: Annotated[Any, Harmless("events come as steps end; their number is no promise")] = None
    media_io_kwargs: Annotated[Any, Harmless("of media, and the model reads text alone")] = None
    mm_processor_kwargs: Annotated[Any, Harmless("of media, and the model reads text alone")] = None
    return_mm_kwargs: Annotated[Any, Harmless("of media, and the model reads text alone")] = None
    use_beam_search: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, False)] = None
    length_penalty: Annotated[Any, Unserved("of beam search", 1.0, 1)] = None
    watermarking: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, False)] = None
    spaces_between_special_tokens: Annotated[Any, Unserved("text is decoded as the tokenizer does", True)] = None
    truncate_prompt_tokens: Annotated[Any, Unserved("no prompt is cut")] = None
    truncation_side: Annotated[Any, Unserved("no prompt is cut")] = None
    allowed_token_ids: Annotated[Any, Unserved("use a grammar")] = None
    logprob_token_ids: Annotated[Any, Unserved("log-probabilities are of the likeliest tokens")] = None
    bad_words: Annotated[Any, Unserved("use logit_bias", [])] = None
    priority: Annotated[Any, Unserved(ONE_ORDER, 0)] = None
    cache_salt: Annotated[Any, Unserved("the prefix cache is shared by all who may ask")] = None
    kv_transfer_params: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, {})] = None
    ec_transfer_params: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, {})] = None
    vllm_xargs: Annotated[Any, Unserved("of another engine's extensions", {})] = None
    repetition_detection: Annotated[Any, Unserved(Reason.NOT_SUPPORTED)] = None
    routed_experts_prompt_start: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, 0)] = None
    return_token_offsets: Annotated[Any, Unserved(Reason.NOT_SUPPORTED, False)] = None

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

    def check_stream(self) -> None:
        """Refuse by name what only a stream has, or only a whole answer."""
        if self.stream_options is not None and not self.stream:
            raise refuse_field("stream_options", "allowed with stream=true only")
        if self.stream and self.prompt_logprobs is not None:
            raise refuse_field("prompt_logprobs", "not in a stream; expected stream=false")

    def make_params(
        self,
        max_tokens: int | None,
        logprobs: int | None,
        constraint: Mapping[str, Any],
        names: Mapping[str, str] = NO_NAMES,
        **more: Any,
    ) -> list[SamplingParams]:
        """Params of each of `n` answers: with a seed, answer i has seed + i. `constraint`: what the answer must match.
        `names`: what the request calls fields of SamplingParams, for errors. `more` counts over the fields."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        stops += more.pop("stops", ())
        if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
            text = f"stop: expected at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters"
            raise blame_field(text, names)
        given = {name: getattr(self, name) for name in HANDED_ON}
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        values |= {**constraint, **more}
        if self.top_k == -1:  # "no limit" elsewhere
            values["top_k"] = 0
        try:
            return SamplingParams(
                max_tokens=max_tokens, logprobs=logprobs, n=self.count, stop=tuple(stops), **values
            ).each()
        except RequestError as error:
            raise blame_field(str(error), names) from None


def refuse_field(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name}: {why}", name)
