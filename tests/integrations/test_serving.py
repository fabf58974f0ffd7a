"""Which runtimes take a folder, and why the others do not."""

import pytest
from command import hipp
from llama_cpp_runtime import save
from models import build
from plans import dropping_plan, random_plan, random_scores

from hipp_ext import load_pruned, prune, save_pruned
from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.errors import CheckpointError, PlanError
from hipp_ext.groups import find_groups
from hipp_ext.integrations.serving import check_serving, pruned_refusals
from hipp_ext.units import plan_from_counts

pytestmark = pytest.mark.filterwarnings("ignore:.*no processor:UserWarning")
EVERYTHING = {"transformers", "hipp-ext", "vllm", "llama.cpp", "openvino"}


def served(folder) -> set[str]:
    """The runtimes that take a folder; the others give reasons."""
    verdicts = check_serving(folder)
    assert {v.runtime for v in verdicts} == EVERYTHING
    assert all(str(folder) in v.command for v in verdicts)
    return {v.runtime for v in verdicts if not v.reasons}


def uniform_plan(model):
    groups = find_groups(model)
    counts = keep_counts(groups, None, 0.3, Bounds(shape="uniform"))
    return plan_from_counts(groups, counts, random_scores(groups))


@pytest.mark.parametrize(
    ("family", "make", "refusing"),
    [
        ("llama", random_plan, {"transformers"}),
        ("llama", uniform_plan, set()),
        ("llama", lambda m: dropping_plan(m, "language.0.attention"), {"transformers"}),
        ("llama", lambda m: dropping_plan(m, "language.1.attention", "language.1.ffn"), set()),
        ("llava", random_plan, {"transformers"}),
        ("qwen3", random_plan, {"transformers", "llama.cpp"}),
        ("qwen2_5_vl", random_plan, {"transformers", "llama.cpp", "openvino"}),
    ],
)
def test_what_a_plan_leaves_is_served_by(family, make, refusing, tmp_path):
    model = build(family)
    save_pruned(prune(model, make(model)), tmp_path / "small")
    assert EVERYTHING - served(tmp_path / "small") == refusing


def test_stock_transformers_is_no_choice_for_a_pruned_vision_tower(tmp_path):
    model = build("llava")
    plan = random_plan(model, towers=("vision",))
    save_pruned(prune(model, plan), tmp_path / "small")
    assert not {"transformers", "vllm"} & served(tmp_path / "small")


@pytest.mark.parametrize(
    ("family", "runtime", "reason"),
    [
        ("llama", "gguf", None),
        ("llama", "vllm", None),
        ("qwen2_5_vl", "vllm", None),
        ("qwen2_5_vl", "gguf", "M-RoPE"),
        ("qwen3", "gguf", "norms of queries"),
        ("granite_llava", "vllm", "not among the models"),
    ],
)
def test_what_would_be_refused_is_known_before_a_plan_is_made(family, runtime, reason):
    model = build(family)
    model.config.architectures = [type(model).__name__]
    before = model.config.to_dict()
    reasons = "; ".join(pruned_refusals(model.config, runtime))
    assert reason in reasons if reason else not reasons
    assert model.config.to_dict() == before


def test_the_command_says_yes_or_why_not(tmp_path):
    folder = save(prune(build("llama"), random_plan(build("llama"))), tmp_path / "small")
    shown = hipp("check-serving", folder)
    assert "transformers no" in shown and "--serve stock" in shown
    assert f"vllm serve {folder}" in shown
    with pytest.raises(CheckpointError, match="is not a model folder"):
        hipp("check-serving", tmp_path / "nothing")


def test_a_plan_for_a_runtime(tmp_path):
    plan = tmp_path / "plan.json"
    options = ["--pruning-ratio", "0.3", "--effort", "fisher", "--calibration-rows", "8"]
    hipp("plan", "testbed", "--serve", "stock", *options, "-o", plan)
    shown = hipp("prune", "testbed", plan, "-o", tmp_path / "small")
    assert "can be served by transformers, hipp-ext, vllm, llama.cpp, openvino\n" in shown
    assert served(tmp_path / "small") == EVERYTHING
    assert load_pruned(tmp_path / "small").hipp_plan.pruning_ratio >= 0.3
    with pytest.raises(PlanError, match="--serve gguf: .*norms of queries"):
        qwen3 = save_pruned(build("qwen3"), tmp_path / "qwen3")
        hipp("plan", qwen3, "--serve", "gguf", "--pruning-ratio", "0.3", "-o", tmp_path / "p.json")
    with pytest.raises(PlanError, match="omit --drop"):
        hipp("plan", "testbed", "--serve", "stock", "--drop", "blocks", "-o", tmp_path / "p.json")
