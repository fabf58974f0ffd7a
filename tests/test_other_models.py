"""The commands on models that are not the testbed: a LLaVA with pictures of another size, and a
language model.
"""

import re
from pathlib import Path

import pytest
import torch
from command import hipp
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hipp_ext import HiPPPlanner, Preference, PruningPlan, load_pruned, testbed
from hipp_ext.calibration import encode_text, find_processor
from hipp_ext.errors import CalibrationError, CheckpointError, DataError
from hipp_ext.recover import QuestionData, TestbedData
from hipp_ext.testbed.model import is_own_processor

TEXT = LlamaConfig(
    vocab_size=200,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(TEXT).save_pretrained(folder)
    AutoTokenizer.from_pretrained(testbed.WEIGHTS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    processor = AutoProcessor.from_pretrained(testbed.WEIGHTS)
    processor.image_processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=56)
    processor.patch_size = 14
    vision = CLIPVisionConfig(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
        projection_dim=36,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=TEXT, image_token_id=processor.image_token_id)
    ).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_language_model_is_planned_pruned_and_recovered_on_the_command_line(llama, tmp_path):
    plan = tmp_path / "plan.json"
    out = hipp(
        "plan", llama, "-o", plan, "-c", "0.3", "--calibration-rows", "12", "--device", "cpu"
    )
    made = PruningPlan.load(plan)
    assert (
        "warning: The calibration is on the built-in questions, which are about a toy world" in out
    )
    total = sum(p.numel() for p in load_pruned(llama).parameters())
    prunable = sum(g.width * g.unit_parameters for g in made.groups)
    gone = prunable - made.kept_parameters
    assert (
        f"preference: utility 0.00, robustness 0.00, compression 1.00\n"
        "One weight was given, and only proportions count. To fix the size, add "
        f"--pruning-ratio 0.3.\n{plan}: removes {100 * made.pruning_ratio:.1f}% of the prunable "
        f"parameters ({gone:,} of {prunable:,}), {100 * gone / total:.1f}% of all parameters, "
        f"{4 * gone / 2**20:.1f} MiB"
    ) in out
    out = hipp("prune", llama, plan, "-o", tmp_path / "small", "--reconstruct", "--device", "cpu")
    assert (
        re.search(r"\d of \d pruned blocks were reconstructed", out)
        and "which are about a toy world" in out
    )
    out = hipp(
        "recover",
        tmp_path / "small",
        "-o",
        tmp_path / "back",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    )
    then = f"next: hipp perplexity {tmp_path / 'small'} {tmp_path / 'back'} --data held-out.jsonl"
    assert then in out
    back = load_pruned(tmp_path / "back").hipp_plan
    assert "are a toy" in out and back == made.after(*back.commands[1:])  # hipp prune is the second


def test_a_fit_of_a_language_model_ends_before_any_work(llama, tmp_path):
    with pytest.raises(
        CalibrationError,
        match=r"takes none: there is no fit on them. `hipp plan MODEL --pruning-ratio 0\.3`",
    ):
        hipp("fit", llama, "-o", tmp_path / "planner", "--device", "cpu")
    assert not list(tmp_path.iterdir())


def test_any_vision_language_model_is_recovered_with_its_own_processor(llava, tmp_path):
    out = hipp(
        "recover",
        llava,
        "-o",
        tmp_path / "back",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    )
    assert "are a toy, to see that it runs" in out and "in 2 steps" in out
    before, after = load_pruned(llava), load_pruned(tmp_path / "back")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_training_questions_go_through_the_models_processor_and_resume(llava):
    processor = find_processor(load_pruned(llava))
    assert not is_own_processor(processor) and is_own_processor(testbed.load()[1])
    stream = TestbedData(processor, batch_size=3).batches(0, 2, 0)
    _, second = next(stream), next(stream)
    resumed = next(TestbedData(processor, batch_size=3).batches(0, 2, 1))
    other = next(TestbedData(processor, batch_size=3).batches(1, 2, 1))
    assert [tuple(b["pixel_values"].shape) for b in second] == [(3, 3, 56, 56)] * 2
    assert all(torch.equal(a[k], b[k]) for a, b in zip(second, resumed, strict=True) for k in a)
    assert not torch.equal(second[0]["pixel_values"], other[0]["pixel_values"])
    for b in second:
        words = [processor.tokenizer.decode(row[row >= 0]).strip() for row in b["labels"]]
        assert all(words) and all(
            w in ("Yes", "No", *"ABCD") or set(w.split()) <= set(testbed.world.OBJECTS)
            for w in words
        )


def test_what_has_no_processor_or_pictures_says_so(llama):
    with pytest.raises(CalibrationError, match="No processor was given"):
        TestbedData(None)
    tokenizer = find_processor(load_pruned(llama))
    data = QuestionData(tokenizer, [testbed.questions("POPE", "calibration", 8)], batch_size=2)
    with pytest.raises(
        DataError,
        match="questions have pictures, and TokenizersBackend takes none: leave out --pope",
    ):
        next(data.batches(0, 1, 0))


@pytest.mark.parametrize("template", ["parts", "strings", None])
def test_questions_as_text_end_in_their_answers(llama, template):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    if template != "parts":
        text = (
            "{{ bos_token }}{% for m in messages %}{{ 'USER: ' + m['content'] + ' ' }}"
            "{% endfor %}ASSISTANT:"
        )
        tokenizer.chat_template = text if template else None
    tokenizer.pad_token = None if template == "strings" else tokenizer.pad_token
    asked = [q for q in testbed.questions("ScienceQA", "calibration", 9) if q.scene is None]
    batch = encode_text(tokenizer, [q.prompt for q in asked], [q.answer for q in asked])
    alone = encode_text(tokenizer, [asked[0].prompt], [asked[0].answer])
    valid = batch["attention_mask"][0].bool()
    assert torch.equal(batch["input_ids"][0][valid], alone["input_ids"][0]) and valid[-1]
    for row, question in zip(batch["labels"], asked, strict=True):
        assert (
            tokenizer.decode(row[row != -100]).strip() == question.answer
            and (row[-1:] != -100).all()
        )
    if template:
        assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == len(asked), (
            "one beginning of text"
        )


def test_the_model_is_looked_for_before_the_output(llama, tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    for command in ("plan", "fit", "recover"):
        with pytest.raises(CheckpointError, match="typo is not a model folder"):
            hipp(command, tmp_path / "typo", "-o", tmp_path / "plan.json")


def test_a_toy_is_called_one_from_python_too(llama):
    model = load_pruned(llama)
    with pytest.warns(
        UserWarning,
        match=r"toy world.*Calibration\.from_file.*calibration=batches.*--calibration FILE",
    ):
        HiPPPlanner(Preference(1, 1, 1), cache=None).plan(model, rows=4)
    with pytest.raises(CalibrationError, match="rows=1: a whole number of 2 or more"):
        HiPPPlanner(Preference(1, 1, 1), cache=None).plan(model, rows=1)
