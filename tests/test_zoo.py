"""Every family of the zoo: pruned rightly, or refused by a name and a reason; as docs/families.md
says.

`python tests/zoo/check.py` runs more checks on them, which take longer.
"""

import contextlib

import pytest
from zoo import FAMILIES
from zoo.checks import CHECKS, Case, NotApplicable
from zoo.table import COMMAND, FILE, HEAD, line

from hipp_ext.errors import UnsupportedModelError

LAWS = ("mask", "smaller", "reload", "generate", "answers")
# A head of several layers cannot be told from the last hidden states.
REFUSED = {"ModernBertDecoderForCausalLM": ("answers", "computes its logits in an unknown way")}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> Case:
    return Case(family=FAMILIES[request.param])


@pytest.mark.filterwarnings("ignore")
def test_it_is_pruned_rightly_or_refused_by_name(case):
    try:
        assert case.groups
    except UnsupportedModelError as error:
        modules = dict(case.model.named_modules())
        names = {*modules, *(type(m).__name__ for m in modules.values())} - {""}
        assert any(name in str(error) for name in names), str(error)
        return
    for law in LAWS:
        refused, reason = REFUSED.get(case.family.architecture, ("", ""))
        if law == refused:
            with pytest.raises(UnsupportedModelError, match=reason):
                CHECKS[law](case)
            continue
        with contextlib.suppress(NotApplicable):
            CHECKS[law](case)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("blip2", "planner"),  # the tokens of all rows lie in one dimension
        ("lfm2_vl", "planner"),  # layers that keep a state
        ("gemma3n", "planner"),  # several residual streams
        ("gemma4_text", "reconstruct"),  # layers that read the keys of others
        ("minimax", "drop"),  # the residual stream passes the norms
        ("granitemoehybrid", "drop"),  # experts and an FFN behind one norm
        ("falcon", "drop"),  # adds in place
        ("mpt", "drop"),  # blocks that add to the residual stream themselves
        ("mpt", "uniform"),  # no field for the width
        ("lfm2", "uniform"),  # a width that is computed from the field
        ("glm4v", "uniform"),  # an entry that has the width of another part
        ("step3p7", "uniform"),  # fields that are derived when a configuration is read
        ("granitemoehybrid", "uniform"),  # two widths under one name
    ],
)
def test_peculiar_families_in_more_than_the_laws(name, check):
    CHECKS[check](Case(family=FAMILIES[name]))


def test_the_page_says_what_is_so(case, request):
    name = next(n for n, f in FAMILIES.items() if f is case.family)
    row = line(name, case.family, case.model)
    assert row in FILE.read_text("utf-8").splitlines(), f"{COMMAND} rewrites the page: {row}"


def test_the_page_has_these_families_and_no_others():
    text = FILE.read_text("utf-8")
    assert text.startswith(HEAD), f"{COMMAND} rewrites the page"
    rows = [row.split(" | ")[0].removeprefix("| ") for row in text[len(HEAD) :].splitlines()]
    assert rows == list(FAMILIES)
