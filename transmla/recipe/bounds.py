"""Numbers that a recipe can mean. What is beyond them is a slip of the hand, and would run for ever or fail late."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes for 1 and 0
        raise ValueError("give a number in the place of true or false")
    return value


def _greedy_or_not(temperature: float) -> float:
    if 0.0 < temperature < 0.01:
        raise ValueError("a temperature is 0 (greedy), or from 0.01 to 100")
    return temperature


Whole = Annotated[int, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]

Tokens = Annotated[Whole, Field(gt=0, le=10**12)]  # of a budget
Length = Annotated[Whole, Field(gt=0, le=2**22)]  # tokens of a prompt or reply; the model's positions are checked too
Window = Annotated[Whole, Field(ge=2, le=2**22)]  # tokens of a row of text: one alone predicts nothing
Batch = Annotated[Whole, Field(gt=0, le=2**16)]  # rows at a time
Count = Annotated[Whole, Field(gt=0, le=10**9)]  # of rows or questions
Skipped = Annotated[Whole, Field(ge=0, le=10**9)]
Dimension = Annotated[Whole, Field(gt=0, le=2**20)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]  # numpy takes no other

Temperature = Annotated[Number, Field(ge=0.01, le=100.0)]
SamplingTemperature = Annotated[Number, Field(ge=0.0, le=100.0), AfterValidator(_greedy_or_not)]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Factor = Annotated[Number, Field(ge=1e-6, le=1e6)]
