"""What each section of a configuration is: strict, typed, frozen, a sentence for every key."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of the configuration, which refuses unknown keys, other types and infinite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def wrong(key: str, problem: str) -> PydanticCustomError:
    """Return the error of a dotted key."""
    # A plain ValueError would not tell which key to point at, and braces in values would be taken
    # for placeholders.
    return PydanticCustomError("setting", "{problem}", {"key": key, "problem": problem})
