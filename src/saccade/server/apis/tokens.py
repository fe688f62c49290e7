"""POST /tokenize and /detokenize: text to token ids and back, as prompts are read. Next: text/tokenizer.py."""

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field

from saccade.chat.types import ChatOptions
from saccade.errors import RequestError
from saccade.server.apis.parts.chat_parts import ChatMessages, ChatTools
from saccade.server.apis.sampling import FORMAT_WRITES, refuse_field
from saccade.server.apis.types import ApiModel, Harmless, Unserved, WholeNumber, YesNo
from saccade.server.bodies import JsonRoute, respond
from saccade.server.chats import ChatQuestion, is_answer_begun, write_chat
from saccade.server.refusals import blame_request
from saccade.server.service import COUNTED, Service, beside


class TokenizeRequest(ApiModel):
    model: str | None = None
    prompt: str | None = None
    messages: ChatMessages | None = Field(None, min_length=1)  # a chat instead
    tools: ChatTools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: YesNo | None = None
    return_token_strs: YesNo | None = None
    add_generation_prompt: Annotated[Any, Unserved("a chat is counted as it is asked", True)] = None
    continue_final_message: Annotated[Any, Unserved("a chat is counted as it is asked", False)] = None
    chat_template: Annotated[Any, Unserved("the server has one: --chat-template")] = None
    mm_processor_kwargs: Annotated[Any, Harmless("of media, and the model reads text alone")] = None

    def check(self) -> None:
        """Refuse by name what a chat alone has, or a text alone."""
        if (self.prompt is None) == (self.messages is None):
            raise refuse_field("prompt", "expected a prompt, or messages")
        if self.messages is None:
            for name in ("tools", "chat_template_kwargs"):
                if getattr(self, name):
                    raise refuse_field(name, "of chats; expected messages, or none of it")
        elif self.add_special_tokens:
            raise refuse_field("add_special_tokens", f"{FORMAT_WRITES}; expected false")


class DetokenizeRequest(ApiModel):
    model: str | None = None
    tokens: list[WholeNumber] = Field(max_length=1 << 20)


async def encode_beside(service: Service, text: str, is_rendered: bool) -> list[int]:
    try:
        return await beside(lambda: service.encode(text, is_rendered, COUNTED), len(text))
    except RequestError as error:
        raise blame_request(error) from None


def route_tokens(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text, with those that the checkpoint puts before a prompt; or of a chat."""
        service.check_model(body.model)
        body.check()
        if body.messages is not None:
            options = ChatOptions(continues=is_answer_begun(body.messages), variables=body.chat_template_kwargs or {})
            question = ChatQuestion(body.messages, body.tools or (), options)
            tokens = (await write_chat(service, question, COUNTED)).tokens
        else:
            tokens = await encode_beside(service, body.prompt or "", body.add_special_tokens is False)
        found = {"count": len(tokens), "max_model_len": service.longest, "tokens": tokens}
        if body.return_token_strs:
            found["token_strs"] = [service.spell(token).decode(errors="replace") for token in tokens]
        return respond(found)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, without special tokens."""
        service.check_model(body.model)
        service.check_tokens(body.tokens)
        return respond({"prompt": service.decode(body.tokens)})

    @router.get("/tokenizer_info")
    async def tell_tokenizer() -> Response:
        """The special tokens that evaluation harnesses ask for."""
        names = service.find_special_tokens()
        return respond({"tokenizer_class": "saccade", "pad_token": None, **names})

    return router
