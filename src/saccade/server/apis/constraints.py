"""What an answer must match, under the names that clients know: response_format of OpenAI, and those of other engines.

Next: sampling.py, whose requests have these fields; engine/params.py, whose fields they become.
"""

import json
from typing import Any, Literal

from pydantic import Field

from saccade.server.apis.types import ApiModel
from saccade.server.refusals import ApiError


class NamedSchema(ApiModel):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(ApiModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(ApiModel):
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class ConstraintFields(ApiModel):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None


def find_constraint(fields: ConstraintFields) -> dict[str, Any]:
    """The field of SamplingParams that the request asks for, or {}. ApiError for several."""
    found = dict[str, Any]()

    def add(name: str, value: Any, said: str) -> None:
        if value is None:
            return
        if found:
            raise ApiError(400, f"{said}: expected one constraint of the answer, found several", said)
        found[name] = value

    form = fields.response_format
    if form is not None and form.type == "json_object":
        add("json_schema", {"type": "object"}, "response_format")
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(400, "response_format.json_schema.schema: expected a JSON schema", "response_format")
        add("json_schema", form.json_schema.schema_, "response_format")
    outputs = fields.structured_outputs or StructuredOutputs.model_validate({})
    add("json_schema", outputs.json_, "structured_outputs")
    add("regex", outputs.regex, "structured_outputs")
    add("grammar", outputs.grammar, "structured_outputs")
    add("grammar", write_choice(outputs.choice), "structured_outputs")
    add("json_schema", fields.guided_json, "guided_json")
    add("regex", fields.guided_regex, "guided_regex")
    add("grammar", fields.guided_grammar, "guided_grammar")
    add("grammar", write_choice(fields.guided_choice), "guided_choice")
    return found


def write_choice(texts: list[str] | None) -> str | None:
    """A grammar of one of several texts."""
    return None if not texts else "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
