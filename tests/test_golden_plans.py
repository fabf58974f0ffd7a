"""The same model, calibration and preference give the same plan in every version."""

import pytest
from golden_plans import FAMILIES, FOLDER, SETTINGS, golden_plan

from hipp_ext.plan import PruningPlan


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_is_what_it_was(family, setting):
    plan, golden = (
        golden_plan(family, setting),
        PruningPlan.load(FOLDER / f"{family}-{setting}.json"),
    )
    assert plan.groups == golden.groups
    assert plan.preference == pytest.approx(golden.preference) and plan.scorer == golden.scorer
