"""Chats with a model: messages in, an answer out, whole or as it comes.

The format says how messages are written and answers read; the model continues a text as ever. Next: chat/find.py;
llm.py, whose `chat` and `stream_chat` these serve.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saccade.api.outputs import Completion, Stream
from saccade.chat.answer import ChatAnswer
from saccade.chat.find import find_chat_format
from saccade.chat.messages import require_question
from saccade.chat.rules import constrain_answer
from saccade.chat.types import CallDelta, ChatDelta, ChatFormat, ChatOptions, ChatParser, Message, Tool
from saccade.engine.pace import Tally
from saccade.engine.params import SamplingParams, check_params
from saccade.engine.sampling.choice import Choice
from saccade.engine.sampling.rules import GRAMMARS
from saccade.errors import ConfigError, RequestError
from saccade.text.tokenizer import Tokenizer, require_tokenizer


@dataclass(frozen=True)
class ChatCompletion:
    """The answer to a chat.

    - `content`: what is said to the user, "" if nothing.
    - `reasoning`: what the model thought before, "" if nothing.
    - `calls`: tools that it asks for: `name`, `arguments` (JSON text), `id`.
    - `message`: the answer as a message, to be put behind the others before the next question.
    - `finish_reason`: "tool_calls" if it ended with calls, else as in Completion.
    - `unparsed`: text that began as a call and is none, cut off or not as the format wants it.
    - `prompt_token_ids`, `token_ids`, `logprobs`, `drafts`: as in Completion.
    """

    content: str
    reasoning: str
    calls: list[CallDelta]
    message: dict[str, Any]
    finish_reason: str
    unparsed: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[Choice] | None = None
    drafts: Tally | None = None


@dataclass(frozen=True)
class ChatPiece:
    """What a chat's stream shows of one step.

    - `deltas`: ContentDelta, ReasoningDelta (each with `text`), CallDelta, UnparsedDelta; often none, while a marker is
      incomplete.
    - `token_ids`, `logprobs`, `finish_reason`, `drafts`: as in Piece; the reason as in ChatCompletion.
    """

    deltas: list[ChatDelta]
    token_ids: list[int]
    logprobs: list[Choice] | None = None
    finish_reason: str | None = None
    drafts: Tally | None = None


@dataclass(frozen=True)
class AskedChat:
    """A chat as the model gets it, and what reads its answer."""

    prompt: str
    token_ids: list[int]
    parser: ChatParser

    def read(self, completion: Completion) -> ChatCompletion:
        """A whole answer, taken apart."""
        answer = ChatAnswer()
        answer.add(self.parser.feed(completion.text or ""))
        answer.add(self.parser.finish(is_cut=completion.finish_reason == "length"))
        return ChatCompletion(
            content=answer.content,
            reasoning=answer.reasoning,
            calls=answer.calls,
            message=answer.to_message(),
            finish_reason=name_reason(completion.finish_reason, answer),
            unparsed=answer.unparsed,
            prompt_token_ids=self.token_ids,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            drafts=completion.drafts,
        )


class ChatStream(Iterator[ChatPiece]):
    """The pieces of one answer; `answer` is what they amount to so far. As Stream: closing it cancels the request."""

    def __init__(self, stream: Stream, asked: AskedChat) -> None:
        self._stream, self._parser, self.prompt_token_ids = stream, asked.parser, asked.token_ids
        self.answer = ChatAnswer()

    def __next__(self) -> ChatPiece:
        piece = next(self._stream)
        deltas = self._parser.feed(piece.text)
        if piece.finish_reason is not None:
            deltas += self._parser.finish(is_cut=piece.finish_reason == "length")
        self.answer.add(deltas)
        reason = piece.finish_reason and name_reason(piece.finish_reason, self.answer)
        return ChatPiece(deltas, piece.token_ids, piece.logprobs, reason, piece.drafts)

    def close(self) -> None:
        """Cancel the request unless it has ended."""
        self._stream.close()


def name_reason(reason: str, answer: ChatAnswer) -> str:
    return "tool_calls" if reason == "stop" and answer.calls else reason


def find_format_or_obstacle(directory: Path, model_type: str) -> tuple[ChatFormat | None, str]:
    """How the model in `directory` writes chats; or None, and why it cannot."""
    try:
        return find_chat_format(directory, model_type), ""
    except ConfigError as error:
        return None, str(error)


@dataclass(frozen=True)
class Chats:
    """The chats of one model: its format and its tokenizer, or why it has none."""

    chat_format: ChatFormat | None
    no_chat: str
    tokenizer: Tokenizer | None
    no_text: str

    def ask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        params: SamplingParams | None,
        options: ChatOptions,
    ) -> tuple[AskedChat, SamplingParams]:
        """As `open_chat`, of whatever a caller gave. RequestError, also where the model has no chats."""
        params = complete_chat_params(None if params is None else check_params(params))
        if self.chat_format is None:
            raise RequestError(f"chat: {self.no_chat}")
        tokenizer = require_tokenizer(self.tokenizer, "a chat", self.no_text)
        return open_chat(self.chat_format, tokenizer, messages, tools, options, params)


def open_chat(
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    options: ChatOptions,
    params: SamplingParams,
) -> tuple[AskedChat, SamplingParams]:
    """The prompt of a chat, and the params that hold the answer to the options too. RequestError for messages that the
    format cannot write."""
    offered = () if options.tool_choice == "none" else tools or ()
    prompt = chat_format.render(messages, offered, options)
    require_question(messages, options.continues)
    constraint = constrain_answer(chat_format.syntax, prompt, offered, options, params.constraint)
    if constraint:
        params = replace(params, **{**dict.fromkeys(GRAMMARS), **constraint})
    asked = AskedChat(prompt, tokenizer.encode_rendered(prompt), chat_format.new_parser(prompt, offered))
    return asked, params


def choose_options(options: ChatOptions | None, thinking: bool | None, reasoning_effort: str | None) -> ChatOptions:
    """`options` with what was asked for by name."""
    options = options or ChatOptions()
    if thinking is not None:
        options = replace(options, thinking=thinking)
    return options if reasoning_effort is None else replace(options, reasoning_effort=reasoning_effort)


def complete_chat_params(params: SamplingParams | None) -> SamplingParams:
    """`params`, with the special tokens kept in the text: markers of reasoning and calls may be such tokens."""
    params = params or SamplingParams()
    if params.n != 1:
        raise RequestError(f"n: a chat has one answer; expected 1, found {params.n}")
    return replace(params, skip_special_tokens=False)
