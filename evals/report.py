"""Evaluated models -> one self-contained HTML page: no network, pictures inside, readable on a phone and in the dark."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.evals.figures import front_figure, keeps_figure, png, pope_figure

from hipp_ext.errors import DataError
from hipp_ext.files import write_atomic
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.archive import Archive
from hipp_ext.planner.reward import Reward

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One evaluated model.

    Attributes:
        name: how it is called in tables and pictures.
        preference: what its plan was made for, as text; None for the dense model.
        plan: None for the dense model.
        reward: what the planner's evaluator says of the plan; None where it was not asked.
        parameters: of the whole model.
        records: by data set, as `vlmeval` writes them to results.json.
    """

    name: str
    preference: str | None
    plan: PruningPlan | None
    reward: Reward | None
    parameters: int
    records: dict[str, dict[str, Any]]


def write_summary(folder: str | Path, entries: Sequence[Entry], commands: Sequence[str], archive: str | None) -> None:
    """Write what a report needs to `folder`/summary.json.

    Args:
        archive: path of the fit's archive, relative to `folder`.
    """
    rows = [
        {
            "name": e.name, "preference": e.preference, "plan": e.plan.to_json() if e.plan else None,
            "reward": e.reward.as_dict() if e.reward else None, "parameters": e.parameters, "records": e.records,
        }
        for e in entries
    ]  # fmt: skip
    data = {"entries": rows, "commands": list(commands), "archive": archive}
    write_atomic(Path(folder) / SUMMARY, json.dumps(data, indent=1) + "\n")


def write_report(folder: str | Path) -> Path:
    """Make `folder`/report.html (and the pictures beside it) from the summary there; returns the page.

    Raises:
        DataError: there is no summary, or it is not one.
    """
    folder = Path(folder)
    try:
        data = json.loads((folder / SUMMARY).read_text())
        entries = [_entry(row) for row in data["entries"]]
        table_rows(entries)  # missing records show here
        commands, archive_path = data["commands"], data["archive"]
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {SUMMARY}; `hipp demo` writes one.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / SUMMARY} is damaged: {error!r}") from None
    archive = Archive(folder / archive_path) if archive_path else Archive()
    pictures = _pictures(entries, archive)
    for name, (_, picture) in pictures.items():
        write_atomic(folder / f"{name}.png", picture)
    page = folder / "report.html"
    write_atomic(page, _page(entries, pictures, commands, archive))
    return page


def table_rows(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the results table: sizes and scores with standard errors."""
    header = ["model", "removed", "size", "ScienceQA", "POPE", "rnd", "pop", "adv", "F1", "yes"]
    rows = []
    for e in entries:
        pope = e.records["POPE"]["metrics"]["vlmeval"]
        choice = e.records["ScienceQA_TEST"]["metrics"]["accuracy"]["overall"]
        splits = [f"{pope[s]['accuracy']:.1f}" for s in ("random", "popular", "adversarial")]
        rows.append([
            e.name, f"{100 * e.plan.pruning_ratio:.1f}%" if e.plan else "-", f"{e.parameters / 1e6:.2f}M",
            _with_error(choice, "accuracy"), _with_error(pope["overall"], "accuracy"), *splits,
            f"{pope['overall']['f1']:.1f}", f"{pope['overall']['yes_rate']:.1f}",
        ])  # fmt: skip
    return header, rows


def _with_error(scores: dict[str, Any], metric: str) -> str:
    error = scores.get(f"{metric}_se")
    return f"{scores[metric]:.1f}" + (f" ± {error:.1f}" if error is not None else "")


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(
        name=row["name"], preference=row["preference"], parameters=row["parameters"], records=row["records"],
        plan=PruningPlan.from_json(row["plan"]) if row["plan"] else None,
        reward=Reward(**row["reward"]) if row["reward"] else None,
    )  # fmt: skip


def _pictures(entries: Sequence[Entry], archive: Archive) -> dict[str, tuple[str, bytes]]:
    """Picture name -> (caption, PNG)."""
    pictures = {}
    if len(archive):
        chosen = {e.name: e.reward for e in entries if e.reward}
        evaluated, front = [r.reward for r in archive.records], [r.reward for r in archive.front()]
        caption = (
            f"{len(evaluated)} plans evaluated on the search split; {len(front)} are non-dominated. Upper right is better."
        )
        pictures["front"] = (caption, png(front_figure(evaluated, front, chosen)))
    plans = {e.name: e.plan for e in entries if e.plan}
    if plans:
        pictures["keep_counts"] = ("Units kept per layer. Preferences at work: what goes where.", png(keeps_figure(plans)))
    scores = {e.name: e.records["POPE"]["metrics"]["vlmeval"] for e in entries}
    caption = (
        "POPE by split on the test questions; error bars: image-clustered standard errors. A model that looks says yes "
        "half the time."
    )
    pictures["pope"] = (caption, png(pope_figure(scores)))
    return pictures


def _page(entries: Sequence[Entry], pictures: dict, commands: Sequence[str], archive: Archive) -> str:
    header, rows = table_rows(entries)
    head = "".join(f"<th>{html.escape(c)}</th>" for c in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    wishes = "".join(f"<li><b>{html.escape(e.name)}</b>: {html.escape(e.preference)}</li>" for e in entries if e.preference)
    figures = "".join(
        f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, (caption, data) in pictures.items()
    )
    ran = "\n".join(html.escape(c) for c in commands)
    volume = f"<p>Hypervolume of the front: {archive.hypervolume():.4f} (reference point 0, 0, 0).</p>" if len(archive) else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>hipp-ext report</title><style>{_STYLE}</style></head><body><main>
<h1>What pruning cost, and where</h1>
<p>Accuracies in percent, ± one standard error, measured by VLMEvalKit's rules on questions no plan was chosen on.</p>
<ul>{wishes}</ul>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{figures}{volume}
<h2>How it was made</h2><pre>{ran}</pre>
</main></body></html>
"""


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d9dce1; --soft: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --paper: #17191c; --line: #3a3e45; --soft: #22252a; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; background: var(--soft); }
figure { margin: 2rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 8px; padding: 6px;
  box-sizing: border-box; border: 1px solid var(--line); } figcaption { font-size: .9rem; opacity: .8; margin-top: .4rem; }
pre { background: var(--soft); padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .85rem; }
"""
