"""The base of every section of a configuration: strict, typed, frozen, every key explained."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of the configuration; unknown keys, wrong types and infinite numbers are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def wrong(key: str, problem: str) -> PydanticCustomError:
    """Return the error of a dotted key."""
    # A plain ValueError could not name the key, and would take braces in values for placeholders.
    return PydanticCustomError("setting", "{problem}", {"key": key, "problem": problem})
