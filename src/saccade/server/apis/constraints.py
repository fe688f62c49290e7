"""What an answer must match, under the names that clients know: response_format of OpenAI, and those of other engines.

Next: sampling.py, whose requests have these fields; engine/params.py, whose fields they become.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from saccade.server.apis.types import ApiModel, Harmless, Unserved, YesNo
from saccade.server.chats import Constraint
from saccade.server.refusals import ApiError

ANY_JSON = {"type": "object"}
MOST_TEXTS = 1 << 13  # to choose from: a grammar has 65,536 characters at most
NO_BLANKS = "blanks between the signs of JSON are the model's choice"


class NamedSchema(ApiModel):
    name: Annotated[Any, Harmless("a name")] = None
    description: Annotated[Any, Harmless("told to no model")] = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Annotated[YesNo | None, Harmless("a schema is always kept")] = None


class ResponseFormat(ApiModel):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = None
    format: dict[str, Any] | None = None  # of a structural tag


class StructuredOutputs(ApiModel):
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: YesNo | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=MOST_TEXTS)
    structural_tag: dict[str, Any] | str | None = None
    disable_fallback: Annotated[Any, Harmless("there is one grammar engine")] = None
    disable_any_whitespace: Annotated[Any, Unserved(NO_BLANKS, False)] = None
    disable_additional_properties: Annotated[Any, Unserved('say "additionalProperties": false', False)] = None
    whitespace_pattern: Annotated[Any, Unserved(NO_BLANKS)] = None


class ConstraintFields(ApiModel):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1, max_length=MOST_TEXTS)
    guided_decoding_backend: Annotated[Any, Harmless("there is one grammar engine")] = None
    guided_whitespace_pattern: Annotated[Any, Unserved(NO_BLANKS)] = None


def find_constraint(fields: ConstraintFields) -> Constraint | None:
    """What the request asks for. ApiError for several, and for a field that asks for nothing."""
    found = list[Constraint]()

    def add(name: str, value: Any, field: str) -> None:
        if value is not None:
            found.append(Constraint(name, value, field))

    if fields.response_format is not None:
        found += read_response_format(fields.response_format)
    outputs = fields.structured_outputs
    if outputs is not None:
        add("json_schema", outputs.json_, "structured_outputs.json")
        add("json_schema", ANY_JSON if outputs.json_object else None, "structured_outputs.json_object")
        add("regex", outputs.regex, "structured_outputs.regex")
        add("grammar", outputs.grammar, "structured_outputs.grammar")
        add("grammar", write_choice(outputs.choice), "structured_outputs.choice")
        add("structural_tag", outputs.structural_tag, "structured_outputs.structural_tag")
        if not found:
            raise ApiError(400, "structured_outputs: expected json, regex, grammar or choice", "structured_outputs")
    add("json_schema", fields.guided_json, "guided_json")
    add("regex", fields.guided_regex, "guided_regex")
    add("grammar", fields.guided_grammar, "guided_grammar")
    add("grammar", write_choice(fields.guided_choice), "guided_choice")
    if len(found) > 1:
        text = f"{found[1].field}: expected one constraint of the answer, found {found[0].field} as well"
        raise ApiError(400, text, found[1].field)
    return found[0] if found else None


def read_response_format(form: ResponseFormat) -> list[Constraint]:
    """A response_format as a constraint; none if it is text."""
    for name, kind in (("json_schema", "json_schema"), ("format", "structural_tag")):
        if form.type != kind and getattr(form, name) is not None:
            raise ApiError(400, f'response_format.{name}: expected with type "{kind}" only', f"response_format.{name}")
    if form.type == "json_object":
        return [Constraint("json_schema", ANY_JSON, "response_format")]
    if form.type == "structural_tag":
        if form.format is None:
            raise ApiError(400, "response_format.format: expected a format of xgrammar", "response_format.format")
        tag = {"type": "structural_tag", "format": form.format}
        return [Constraint("structural_tag", tag, "response_format.format")]
    if form.type == "json_schema":
        field = "response_format.json_schema.schema"
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(400, f"{field}: expected a JSON schema", field)
        return [Constraint("json_schema", form.json_schema.schema_, field)]
    return []


def write_choice(texts: list[str] | None) -> str | None:
    """A grammar of one of several texts."""
    return None if not texts else "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
