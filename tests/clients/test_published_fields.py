"""No field of the published APIs is unknown: those of the `openai` and `anthropic` packages, by the server's description."""

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from served_model import ServedModel

PUBLISHED = {
    "/v1/completions": completion_create_params.CompletionCreateParamsBase,
    "/v1/chat/completions": chat_create_params.CompletionCreateParamsBase,
    "/v1/responses": response_create_params.ResponseCreateParamsBase,
    "/v1/messages": message_create_params.MessageCreateParamsBase,
    "/v1/messages#beta": beta_create_params.MessageCreateParamsBase,
    "/v1/messages/count_tokens": message_count_tokens_params.MessageCountTokensParams,
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_every_published_field_is_served_without_effect_or_refused(scripted: ServedModel, path: str) -> None:
    told = scripted.client.get("/openapi.json").json()
    content = told["paths"][path.partition("#")[0]]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert set(PUBLISHED[path].__annotations__) - set(told["components"]["schemas"][name]["properties"]) == set()
