"""All steps on the testbed: fit a planner, plan for three preferences, prune, evaluate, report."""

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext import testbed
from hipp_ext.errors import HippError
from hipp_ext.evals.evaluator import search_evaluator
from hipp_ext.evals.generation import Workload
from hipp_ext.evals.report import table_rows, write_report
from hipp_ext.evals.report.entries import Entry
from hipp_ext.evals.report.files import LATENCY
from hipp_ext.evals.report.summary import write_summary
from hipp_ext.evals.text_table import print_table, text_table
from hipp_ext.files import write_atomic
from hipp_ext.plan import PruningPlan
from hipp_ext.planner import HiPPPlanner
from hipp_ext.planner.planner import Log
from hipp_ext.planner.settings import FitSettings
from hipp_ext.preference import Preference
from hipp_ext.surgery.checkpoint import load_pruned, read_plan, save_pruned
from hipp_ext.surgery.prune import prune

PREFERENCES = {
    "utility": Preference(utility=0.7, robustness=0.1, compression=0.2),
    "robustness": Preference(utility=0.1, robustness=0.7, compression=0.2),
    "compression": Preference(utility=0.3, robustness=0.3, compression=0.4),
}
DATA = ("POPE", "ScienceQA_TEST")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """The size of the demo.

    Attributes:
        settings: settings of the fit.
        search: number of questions per task that evaluate a plan during the fit.
        limit: number of questions per data set in the final evaluation; None for all.
        load: what the models generate while their latency and memory are measured.
    """

    settings: FitSettings = FitSettings(steps=20, preferences=2, budgets=2, rollouts=3)
    search: int = 192
    limit: int | None = None
    load: Workload = Workload(repeats=15)


def run_demo(
    folder: str | Path,
    size: DemoSize | None = None,
    *,
    log: Log | None = None,
    progress: bool = True,
) -> Path:
    """Run the demo in `folder`, without the steps that an earlier run finished; returns the
    report's page. Lines of progress go to `log`; None: to the logger of this module.

    Raises:
        MissingExtraError: VLMEvalKit is not installed.
        HippError: the folder holds results of other settings.
    """
    folder, size, log = Path(folder), size or DemoSize(), log or _log.info
    started = time.perf_counter()
    log("1/6  the testbed: a tiny LLaVA trained on a picture world, and its test questions")
    model, processor = testbed.load()
    data = folder / "data"
    if not (data / "test").exists():
        testbed.export(data, splits=("test",))
    log("2/6  fitting the planner on the search split")
    planner = HiPPPlanner(PREFERENCES["utility"], cache=folder / "signals")
    evaluator = search_evaluator(model, processor, size.search)
    result = planner.fit(
        model,
        evaluator,
        size.settings,
        folder=folder / "fit",
        processor=processor,
        progress=progress,
    )
    planner.save(folder / "planner", overwrite=True)
    log(f"     {result.evaluations} plans, hypervolume {result.hypervolume:.4f}")
    log("3/6  one policy call per preference, then surgery")
    plans = {name: planner.plan(model, preference=p) for name, p in PREFERENCES.items()}
    models = {"dense": _keep_model(model, processor, None, folder / "models/dense")}
    for name, plan in plans.items():
        write_atomic(folder / f"plans/{name}.json", plan.to_json())
        models[name] = _keep_model(model, processor, plan, folder / f"models/{name}")
        log(
            f"     {name}: {PREFERENCES[name]} -> "
            f"{100 * plan.pruning_ratio:.1f}% of prunable parameters removed"
        )
    folders = " ".join(map(str, models.values()))
    command = f"vlmeval --data {' '.join(DATA)} --model {folders} --lmu-data {data / 'test'}"
    log(f"4/6  {command}")
    records = _evaluate(models, data / "test", folder / "outputs", size.limit, progress)
    log("5/6  latency and memory")
    _measure(models, size.load, folder)
    log("6/6  report")
    rewards = dict(zip(plans, planner.rewards(model, list(plans.values()), evaluator), strict=True))
    dense = sum(p.numel() for p in model.parameters())
    entries = [Entry(name="dense", parameters=dense, records=records["dense"])]
    for name, plan in plans.items():
        removed = sum((g.width - g.keep) * g.unit_parameters for g in plan.groups)
        entries.append(
            Entry(
                name=name,
                preference=str(PREFERENCES[name]),
                plan=plan,
                reward=rewards[name],
                parameters=dense - removed,
                records=records[name],
            )
        )
    seeds = [
        f"fit: seed {size.settings.seed} of preferences, noise and policy",
        "testbed: its splits are fixed",
    ]
    commands = [f"hipp demo --out {folder}", f"the fit in it: {size.settings}", command]
    write_summary(folder, entries, commands, seeds, "planner")
    page = write_report(folder)
    title = "accuracy [%] on the test split ± standard error; POPE over all, then by split"
    print_table(text_table(*table_rows(entries), title=title))
    log(f"report: {page}   ({time.perf_counter() - started:.0f} s)")
    return page


def _keep_model(model: nn.Module, processor: Any, plan: PruningPlan | None, path: Path) -> Path:
    """Save the model pruned by `plan` to `path`, unless it is already there."""
    if path.exists():
        try:
            if read_plan(path) == plan and load_pruned(path) is not None:
                return path
        except HippError:
            pass  # an incomplete folder is replaced below
    save_pruned(prune(model, plan) if plan else model, path, processor, overwrite=True)
    return path


def _evaluate(
    models: dict[str, Path], data: Path, work_dir: Path, limit: int | None, progress: bool
) -> dict[str, dict]:
    from hipp_ext.integrations.vlmevalkit import evaluate

    records = evaluate(
        list(models.values()),
        list(DATA),
        lmu_data=data,
        work_dir=work_dir,
        limit=limit,
        batch_size=64,
        progress=progress,
    )
    return {
        name: {record.data: asdict(record) for record in records if record.model == name}
        for name in models
    }


def _measure(models: dict[str, Path], load: Workload, folder: Path) -> None:
    """Measure the costs of the models on this machine's CPU, unless that was done."""
    from hipp_ext.evals.latency import run

    file = folder / LATENCY
    if file.exists() and file.stat().st_mtime > max(p.stat().st_mtime for p in models.values()):
        return
    command = (
        f"hipp latency {' '.join(map(str, models.values()))}"
        f" --device cpu --repeats {load.repeats} -o {file}"
    )
    run(models, workload=load, device="cpu", command=command, out=file)
