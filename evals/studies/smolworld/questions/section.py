"""The answers as a section for RESULTS.md, made from their JSON."""

from collections.abc import Mapping
from typing import Any

SECTION = """## A model that sees: the questions

`{command}`

{device}, {threads} threads, {dtype}. The rules were written before anything was measured, but for
the SynFlow question. There it was changed where plans are drawn (around equal fractions nearly all
of them collapsed, and around the planner's plan none), what error a share of them has, and that a
threshold rejects at most 5% of the sound ones instead of about 5%. Models are those of the table
above, at 30% where no other ratio is named; {seeds} fits of each corner where no other number is
named. Differences are in percentage points ± standard error over pictures, paired by question;
where several fits are compared, their spread adds to it.

{questions}
"""


def section(result: Mapping[str, Any]) -> str:
    """The section.

    Args:
        result: what the command writes.
    """
    return SECTION.format(
        command=result["command"],
        device=result["device"],
        threads=result["threads"],
        dtype=result["identity"]["sizes"]["dtype"],
        seeds=result["seeds"],
        questions="\n\n".join(_question(own) for own in result["questions"].values()),
    )


def _question(found: Mapping[str, Any]) -> str:
    figures = [f"- {name}: {_figure(value)}" for name, value in found["figures"].items()]
    head = f"**{found['question']} {found['answer'].capitalize()}.** {found['rule']}"
    return "\n".join([head, "", *figures])


def _figure(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, float) for v in value):
        return f"{value[0]:+.2f} ± {value[1]:.2f}"
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_figure(own)}" for name, own in value.items()) or "none"
    return "none" if value is None else str(value)
