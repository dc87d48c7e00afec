"""What the sections of params.yaml have in common: strict reading, and kinds of numbers with their ranges."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
HalfOpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Percentage = Annotated[int, Field(ge=1, le=100)]
NonNegative = Annotated[float, Field(ge=0.0)]
CropScale = Annotated[  # strict=False: YAML has lists, not tuples
    tuple[Annotated[float, Field(gt=0.0, le=1.0)], Annotated[float, Field(gt=0.0, le=1.0)]],
    Field(strict=False),
]
FractionPair = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
PositivePair = Annotated[
    tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]], Field(strict=False)
]
Providers = Literal["auto"] | Annotated[list[str], Field(min_length=1)]


class Section(BaseModel):
    # strict, so that "8" or true is not silently a number
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
