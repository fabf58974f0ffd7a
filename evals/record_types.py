"""The fields of results.json that are used, with strict types and bounds.

Such a file is untrusted: a text in place of a number would reach the page of a report, an infinite
number the axis of a figure. Other fields are left out.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hipp_ext.errors import DataError

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]


class Strict(BaseModel):
    """Base of what is read from such a file."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Made(Strict):
    """When and on what something was measured, see `measuring.about`."""

    date: str | None = None
    device: str | None = None
    threads: Count | None = None
    versions: dict[str, str] | None = None


class _Choice(Strict):
    n: Count = 0
    accuracy: Percent
    accuracy_se: Percent | None


class _YesNo(_Choice):
    f1: Percent
    f1_se: Percent | None
    yes_rate: Percent
    yes_rate_se: Percent | None


_Scores = dict[str, dict[str, Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None]]


class _Metrics(Strict):
    accuracy: dict[str, _Choice] | None = None
    vlmeval: dict[str, _YesNo] | None = None
    official: dict[str, Any] | None = None
    scores: dict[str, _Scores] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "_Metrics":
        pope = self.vlmeval is not None and self.official is not None
        if self.accuracy is None and self.scores is None and not pope:
            raise ValueError("accuracy is needed, or scores, or both vlmeval and official")
        return self


class Record(Strict):
    """A results.json of `vlmeval`."""

    model: str
    model_hash: str
    data: str
    data_hash: str
    n: Count
    metrics: _Metrics
    settings: dict[str, str | int | float | bool | None]
    predictions: str
    command: str | None = None
    made: Made | None = None


def checked(kind: type[Strict], data: Any, wrong: str) -> dict[str, Any]:
    """The fields of `kind` that `data` has, as plain data.

    Raises:
        DataError: a field is missing, has another type or is out of bounds. The message is `wrong`
            and names the field.
    """
    try:
        return kind.model_validate(data).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise DataError(
            f"{wrong}: {'.'.join(map(str, first['loc']))[:200]!r}: {first['msg']}"
        ) from None
