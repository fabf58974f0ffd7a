"""What a shrinking has done: shrink.json, which a run goes on from, a picture, and its disk use."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hipp_ext.errors import DataError
from hipp_ext.files import write_atomic
from hipp_ext.files.untrusted import read_plain
from hipp_ext.recover import RecoverResult
from hipp_ext.runs import RunFolder

REPORT, PICTURE = "shrink.json", "shrink.png"
CHECKPOINTS = 3  # the best one, the last one, and the one that is being written
TRAINED_BYTES = 12  # of a parameter in a checkpoint: itself and two moments, in float32


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants"
    )


class Minutes(_Strict):
    """Time for the stages of a round. What an interrupted stage had taken is not in it."""

    plan: float = Field(ge=0, allow_inf_nan=False)
    prune: float = Field(ge=0, allow_inf_nan=False)
    recover: float = Field(ge=0, allow_inf_nan=False)

    @property
    def total(self) -> float:
        """The sum."""
        return self.plan + self.prune + self.recover


class Round(_Strict):
    """What one round did.

    Attributes:
        number: number of the round, from 1; the folder `round-NUMBER` has its model.
        ratio_asked, ratio: pruning_ratio after the round, of the dense model's prunable parameters.
        parameters: number of all parameters of the model after the round.
        steps, step_kept: steps of the recovery, and the one whose weights were kept.
        rows, tokens, skipped: rows and tokens that were learnt from, and rows that could not be.
        before, after: losses on the held-out rows before and after the recovery [nats per token],
            by name; empty without such rows.
        minutes: time for each stage.
    """

    number: int = Field(ge=1)
    ratio_asked: float = Field(ge=0, lt=1)
    ratio: float = Field(ge=0, lt=1)
    parameters: int = Field(ge=0, lt=2**63)
    steps: int = Field(ge=0, lt=2**63)
    step_kept: int
    rows: int
    tokens: int
    skipped: int
    before: dict[str, float]
    after: dict[str, float]
    minutes: Minutes

    @classmethod
    def of(cls, result: RecoverResult, **about: Any) -> "Round":
        """The record of a recovery, and what else is known about the round."""
        found = {
            int(e["step"]): {n: v for n, v in e.items() if n != "step"} for e in result.evaluations
        }
        return cls(
            steps=len(result.losses),
            step_kept=result.step,
            rows=result.rows,
            tokens=result.tokens,
            skipped=len(result.skipped),
            before=found.get(0, {}),
            after=found.get(result.step, {}),
            **about,
        )

    @property
    def folder(self) -> str:
        """Name of the folder of its model."""
        return round_folder(self.number)


class ShrinkReport(_Strict):
    """What a run has done so far.

    Attributes:
        to: pruning_ratio that was asked for.
        start_ratio, start_parameters: those of the model that it began with.
        rounds: the rounds that are complete.
    """

    format: int = Field(default=1, ge=1, le=1)
    to: float = Field(ge=0, lt=1)
    start_ratio: float = Field(ge=0, lt=1)
    start_parameters: int = Field(ge=0, lt=2**63)
    rounds: tuple[Round, ...] = ()

    @classmethod
    def read(cls, run: RunFolder, start: "ShrinkReport") -> "ShrinkReport":
        """The report in the folder of a run; `start` where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        if not (run / REPORT).exists():
            return start
        try:
            found = cls.model_validate_json(read_plain(run / REPORT))
            if [r.number for r in found.rounds] != list(range(1, len(found.rounds) + 1)):
                raise ValueError(f"the rounds in {REPORT} are not numbered from 1 on")
        except (ValidationError, DataError, ValueError) as error:
            raise run.damaged(" ".join(str(error).split())) from None
        return found

    def and_round(self, new: Round) -> "ShrinkReport":
        """The report with one more round."""
        return self.model_copy(update={"rounds": (*self.rounds, new)})

    def write(self, folder: Path) -> None:
        """Write shrink.json and shrink.png."""
        write_atomic(folder / PICTURE, _picture(self))
        write_atomic(folder / REPORT, self.model_dump_json(indent=1) + "\n")

    def minutes_left(self, steps: Sequence[int]) -> float | None:
        """Time that rounds of so many steps take, by those that are complete; None: none is."""
        if not self.rounds:
            return None
        recovering = sum(r.minutes.recover for r in self.rounds)
        before = sum(r.minutes.plan + r.minutes.prune for r in self.rounds)
        done = sum(r.steps for r in self.rounds)
        return sum(steps) * recovering / max(1, done) + len(steps) * before / len(self.rounds)


def round_folder(number: int) -> str:
    """Name of the folder of the model of a round."""
    return f"round-{number}"


def disk_bytes(sizes: Sequence[int], parameter_bytes: float, trained: bool, only_last: bool) -> int:
    """Most bytes that a run takes on disk.

    Args:
        sizes: numbers of parameters after every round.
        parameter_bytes: bytes of a parameter in a model folder.
        trained: whether all parameters are trained, which are in the checkpoints then.
        only_last: whether only the last folder stays.
    """
    kept = max(map(sum, zip(sizes, [*sizes[1:], 0], strict=True))) if only_last else sum(sizes)
    checkpoints = CHECKPOINTS * TRAINED_BYTES * sizes[0] if trained else 0
    return int((kept + sizes[0]) * parameter_bytes + checkpoints)


def _picture(report: ShrinkReport) -> bytes:
    """Held-out loss over pruning_ratio, before and after every recovery, in PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    name = "kl" if all("kl" in r.before for r in report.rounds) else "loss"
    shown = [r for r in report.rounds if name in r.before and name in r.after]
    ratios = [100 * r.ratio for r in shown]
    before, after = [r.before[name] for r in shown], [r.after[name] for r in shown]
    for ratio, one, other in zip(ratios, before, after, strict=True):
        axes.plot([ratio, ratio], [one, other], color="0.8", zorder=1)
    axes.plot(ratios, before, "^", color="C1", label="pruned")
    axes.plot(ratios, after, "o-", color="C0", label="recovered")
    axes.set_xlabel("prunable parameters removed [%]")
    axes.set_ylabel(f"{'KL from the dense model' if name == 'kl' else name}, held out [nats/token]")
    axes.set_xlim(0, 100 * report.to * 1.05 + 1)
    axes.set_ylim(bottom=0)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()
