"""Plans that must not change: `python tests/golden_plans.py` writes them into tests/golden/."""

from pathlib import Path

from models import batch, build

from hipp_ext import HiPPPlanner, Preference
from hipp_ext.plan import PruningPlan

FOLDER = Path(__file__).parent / "golden"
FAMILIES = ("llava", "llava_gqa", "qwen2_5_vl", "llama", "qwen3")
SETTINGS = {
    "balanced": (Preference(utility=0.4, robustness=0.4, compression=0.2), None),
    "half": (Preference(utility=0.7, robustness=0.1, compression=0.2), 0.5),
}


def golden_plan(family: str, setting: str) -> PruningPlan:
    """A plan for random float64 weights, where rounding decides nothing."""
    preference, pruning_ratio = SETTINGS[setting]
    model = build(family, seed=7).double()
    calibration = {
        "utility": [batch(family, size=3, seed=1), batch(family, size=3, seed=2)],
        "robustness": [batch(family, size=3, seed=3)],
    }
    planner = HiPPPlanner(preference, pruning_ratio=pruning_ratio, cache=None)
    return planner.plan(model, calibration=calibration)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for family in FAMILIES:
        for setting in SETTINGS:
            golden_plan(family, setting).save(FOLDER / f"{family}-{setting}.json")
