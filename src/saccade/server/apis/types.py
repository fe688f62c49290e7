"""Types of fields, as strict as clients can bear: "1" is no number, 1.0 no integer, true neither.

A request has no field that nothing here knows, and neither has an object inside of it: it is refused by name, because
it might change the answer. Published fields that are not served stand among the others, as `Harmless` or `Unserved`.
null is as good as leaving a field out. Next: sampling.py, whose fields have these types; parts/, what stands inside of
requests; tools/request_fields.py, which writes the page that lists all of them.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from operator import or_
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, GetCoreSchemaHandler, Strict, Tag
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from saccade.base.values import show

WholeNumber = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
YesNo = Annotated[bool, Strict()]


class Reason(StrEnum):
    """Why several fields are without effect, or refused."""

    NOBODY_LOOKS = "read by nobody here"
    NOT_SUPPORTED = "not supported"
    FOUND_ANYWAY = "what was computed before is found without"
    NO_TOOLS = "the server runs no tools"
    ALL_AT_ONCE = "the model hears of all tools at once"
    READS_TEXT = "the model reads text alone"


@dataclass(frozen=True)
class Harmless:
    """Of a field that is accepted and does nothing, and why no answer changes."""

    why: str


@dataclass(frozen=True, init=False, eq=False)  # equal ones would be one: 0 and False are
class Unserved:
    """Of a field that would change the answer and is not served. `neutral`: values that ask for nothing."""

    why: str
    neutral: tuple[Any, ...]

    def __init__(self, why: str, *neutral: Any) -> None:
        object.__setattr__(self, "why", why)
        object.__setattr__(self, "neutral", neutral)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: Any) -> Any:
        if value is None or any(value == one and type(value) is type(one) for one in self.neutral):
            return value
        expected = " or ".join(str(one).lower() if isinstance(one, bool) else repr(one) for one in self.neutral)
        raise PydanticCustomError("refused", f"{self.why}; expected {expected or 'none'}")


def stop_at_first(schema: Any) -> None:
    """Have each list end at its first wrong entry: 6 MB of nulls, each with three problems, took 59 s and 3.9 GB."""
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list | tuple) else ():
        stop_at_first(part)
    if isinstance(schema, dict) and schema.get("type") == "list":
        schema["fail_fast"] = True


class ApiModel(BaseModel):
    """A part of a request. Numbers are finite. A field that is a word of Python (`async`) may come with its `_`, as the
    `openai` package writes what it sends back."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=(), populate_by_name=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        stop_at_first(schema)
        return schema


class As:
    """Checks an object as `model`, and leaves it as it came: chat formats write it as the client did."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any, inner: Any) -> Any:
            inner(value)
            return value

        return core_schema.no_info_wrap_validator_function(check, handler.generate_schema(self.model))


def one_of(field: str, *models: type[ApiModel], usual: str = "") -> Any:
    """A type: one of several objects, each with other values of `field`. `usual`: the value where there is none."""

    def find(value: Any) -> str | None:
        kind = value.get(field, usual) if isinstance(value, dict) else None
        return None if kind is None else f"{field}={kind if isinstance(kind, str) else show(kind)}"

    # A tag has the field's name in it, so that no key of an object is one (app.py, name_field).
    kinds = [(model, kind) for model in models for kind in list_kinds(model, field)]
    tagged = [Annotated[model, Tag(f"{field}={kind}")] for model, kind in kinds]
    return Annotated[reduce(or_, tagged), Discriminator(find)]


def list_kinds(model: type[ApiModel], field: str) -> list[str]:
    """The values of a field that is a Literal, null aside."""
    parts = get_args(model.model_fields[field].annotation)  # texts, or a Literal of them and NoneType
    return [kind for part in parts for kind in get_args(part) or (part,) if isinstance(kind, str)]
