"""What a run did, as recover.json, a picture of its losses, and lines to print."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hipp_ext.calibration.reading import listed
from hipp_ext.files import write_atomic
from hipp_ext.recover.settings import RecoverResult

REPORT, PICTURE = "recover.json", "recover.png"


def write_report(folder: Path, result: RecoverResult, identity: Mapping[str, Any]) -> None:
    """Write recover.json and recover.png into the folder of a run.

    Args:
        folder: the folder.
        result: what the run returned.
        identity: settings of the run, and of its data.
    """
    content = {
        "settings": {n: v for n, v in identity.items() if n not in ("shapes", "plan", "frozen")},
        "steps": len(result.losses),
        "step_kept": result.step,
        "rows": result.rows,
        "tokens": result.tokens,
        "skipped": [{"row": row, "reason": why} for row, why in sorted(result.skipped.items())],
        "compression": result.stats,
        "evaluations": result.evaluations,
        "losses": result.losses,
    }
    write_atomic(folder / REPORT, json.dumps(content, indent=1) + "\n")
    write_atomic(folder / PICTURE, _picture(result))


def report_lines(result: RecoverResult) -> list[str]:
    """What `hipp recover` prints of a run."""
    losses = result.losses
    lines = [f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps"]
    lines.append(f"{result.rows:,} rows and {result.tokens:,} tokens were learnt from")
    if result.evaluations:
        first = result.evaluations[0]
        kept = next(e for e in result.evaluations if e["step"] == result.step)
        names = [name for name in first if name != "step" and name in kept]
        changes = ", ".join(f"{name} {first[name]:.4g} -> {kept[name]:.4g}" for name in names)
        lines.append(f"held out: {changes} (weights of step {result.step})")
        if not result.step:
            last = result.evaluations[-1]["loss"]
            lines.append(
                f"the held-out loss did not improve ({first['loss']:.4g} -> {last:.4g}), so the "
                "weights are those before training: take more steps, another --lr, or --keep last"
            )
    return lines


def skipped_line(result: RecoverResult) -> str | None:
    """What to warn of: how many rows could not be used, and why the first ones; None: all could."""
    if not result.skipped:
        return None
    reasons = [f"row {row}: {why}" for row, why in sorted(result.skipped.items())]
    named = "1 row" if len(reasons) == 1 else f"{len(reasons)} rows"
    return f"{named} of the data could not be used: {listed(reasons)}"


def _picture(result: RecoverResult) -> bytes:
    """Losses over steps, in PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(result.losses) + 1)
    axes.plot(steps, result.losses, color="0.7", label="loss, trained on")
    shown: list[list[tuple[float, float]]] = [[]]
    for name in ("loss", "kl", "cross_entropy"):
        points = [(e["step"], e[name]) for e in result.evaluations if name in e]
        if points not in shown:  # the loss may be the KL divergence alone
            shown.append(points)
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, held out")
    if result.evaluations:
        axes.axvline(result.step, color="0.5", linestyle=":", label=f"kept: step {result.step}")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token" if result.evaluations else "nats")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()
