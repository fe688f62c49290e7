"""Types of fields, as strict as clients can bear: "1" is no number, 1.0 no integer, true neither.

Fields that nothing here knows are ignored, as other engines do: clients send what some other server wants. Next:
sampling.py, whose fields have these types.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Strict

WholeNumber = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
YesNo = Annotated[bool, Strict()]


class ApiModel(BaseModel):
    """A part of a request. Numbers are finite."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())
