"""What searches reach on the search split, evaluation by evaluation."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hipp_ext.evals.studies.smolworld.questions.needed import seeded
from hipp_ext.evals.studies.smolworld.table.cells import CORNERS
from hipp_ext.evals.studies.smolworld.table.methods import CMAES, FITTED, TPE
from hipp_ext.evals.studies.smolworld.table.searching import evaluated_rewards
from hipp_ext.planner.reward import Reward

PARTS = (0.25, 0.5, 1.0)  # of the evaluations


def curves(folder: Path, seeds: int) -> dict[str, dict[str, float]]:
    """Search -> part of the evaluations -> best mean of utility and robustness until then.

    Means over the seeds that were run; searches without any are left out. A margin of 1 is certain
    and right.
    """
    found: dict[str, dict[str, float]] = {}
    for method in (FITTED, TPE, CMAES):
        searches = seeded(method, "middle", seeds)
        runs = [run for cell in searches if (run := evaluated_rewards(folder, cell))]
        if runs:
            each = [best_so_far(run) for run in runs]
            found[method] = {
                f"{part:.0%} of the evaluations": round(sum(own[i] for own in each) / len(each), 4)
                for i, part in enumerate(PARTS)
            }
    return found


def best_so_far(rewards: Sequence[Reward]) -> list[float]:
    """The best mean of both tasks after each of PARTS of the evaluations."""
    weights = torch.tensor(CORNERS["middle"].as_tuple())
    values = [float(weights @ torch.tensor(r.objectives())) for r in rewards]
    return [max(values[: max(1, round(part * len(values)))]) for part in PARTS]
