"""Types of fields, as strict as clients can bear: "1" is no number, 1.0 no integer, true neither.

A request has no field that nothing here knows: it is refused by name, because it might change the answer. Published
fields that are not served stand among the others, as `Harmless` or `Unserved`. null is as good as leaving a field out.
Next: sampling.py, whose fields have these types; tools/request_fields.py, which writes the page that lists all of them.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, Strict
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

WholeNumber = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
YesNo = Annotated[bool, Strict()]


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


class ApiModel(BaseModel):
    """A part of a request. Numbers are finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
