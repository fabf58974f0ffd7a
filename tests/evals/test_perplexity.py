"""`hipp perplexity` on tiny models: against transformers' own losses, and its answers."""

import json
import math

import numpy as np
import pytest
import torch
from command import hipp, hipp_json, run
from models import save_chats, save_language_model
from transformers import AutoTokenizer

from hipp_ext import load_pruned
from hipp_ext.calibration import Calibration, encode_text
from hipp_ext.errors import DataError
from hipp_ext.evals.perplexity import answer_losses, repeated, repeating, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = save_language_model(tmp_path_factory.mktemp("perplexity"))
    hipp("plan", place / "llama", "--pruning-ratio", "0.3", "-o", place / "plan.json",
         "--allocator", "uniform", "--scorer", "magnitude")  # fmt: skip
    hipp("prune", place / "llama", place / "plan.json", "-o", place / "small")
    return place


def expected(folder, name: str) -> np.ndarray:
    """(-log p, tokens) of each chat, by a pass of its own through the model's own loss."""
    model = load_pruned(folder / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    found = []
    for n in range(8):
        row = encode_text(tokenizer, [f"what is {n}"], ["a number"])
        tokens = int((row["labels"] != -100).sum())
        with torch.no_grad():
            found.append((float(model(**row).loss) * tokens, tokens))
    return np.array(found)


def test_it_is_what_transformers_own_loss_gives(folder):
    models = [folder / "llama", folder / "small"]
    result = hipp_json("perplexity", *models, "--data", folder / "chats.jsonl", "--answers", "2")
    dense, small = (expected(folder, name) for name in ("llama", "small"))
    tokens = dense[:, 1].sum()
    assert result["rows"] == 8 and result["tokens"] == tokens
    first, second = result["models"].values()
    assert first["perplexity"]["value"] == pytest.approx(math.exp(dense[:, 0].sum() / tokens))
    ratio = math.exp((small[:, 0] - dense[:, 0]).sum() / tokens)
    assert second["times_first"]["value"] == pytest.approx(ratio, rel=1e-4)
    assert second["times_first"]["low"] <= ratio <= second["times_first"]["high"]
    assert "times_first" not in first and second["parameters"] < first["parameters"]
    assert len(first["written"]) == len(second["written"]) == len(result["prompts"]) == 2


def test_answers_are_greedy_from_the_prompt_alone(folder):
    model, tokenizer = (
        load_pruned(folder / "llama"),
        AutoTokenizer.from_pretrained(folder / "llama"),
    )
    rows = Calibration.from_file(folder / "chats.jsonl", tokenizer, rows=1, batch_size=1).batches
    prompts, written = write(model, tokenizer, rows, 5)
    inputs = encode_text(tokenizer, ["what is 0"])
    out = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert written == [answer.strip()] and "what is" in prompts[0] and "number" not in prompts[0]


def test_pictures_and_plain_texts(folder, tmp_path):
    save_chats(tmp_path)
    told = hipp("perplexity", "testbed", "--data", tmp_path / "chats.jsonl", "--rows", "6")
    assert "6 rows" in told and "repeated" in told and told.count("...") == 4
    text = tmp_path / "text.txt"
    text.write_text("is there a cup in the image ? " * 40)
    values = hipp_json("perplexity", folder / "llama", "--data", text, "--sequence-length", "64")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    batches = Calibration.from_file(text, tokenizer, sequence_length=64).batches
    losses, counts = answer_losses(load_pruned(folder / "llama"), batches)
    (own,) = values["models"].values()
    assert own["perplexity"]["value"] == pytest.approx(math.exp(losses.sum() / counts.sum()))
    assert all(0 < len(prompt.split()) <= 32 for prompt in values["prompts"])


def test_a_model_that_repeats_itself_is_named(folder):
    assert repeated(["a b c d"]) == 0 and repeated(["a b"]) is None
    # Of six 4-grams of "a b a b ...", two differ.
    assert repeated(["a b a b a b a b a"]) == pytest.approx(100 * 4 / 6)
    shares = {"dense": 5.0, "fine": 9.0, "loops": 60.0}
    models = {name: {"repeated": share} for name, share in shares.items()}
    assert repeating({"models": models}) == ["loops"]
    assert repeating({"models": {"dense": {"repeated": None}, "small": {"repeated": None}}}) == []


def test_what_cannot_be_compared_is_refused(folder, tmp_path):
    data = folder / "chats.jsonl"
    model = load_pruned(folder / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="other tokens of"):
        run("perplexity", folder / "llama", tmp_path / "other", "--data", data)
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(DataError, match="no processor or tokenizer"):
        run("perplexity", tmp_path / "alone", "--data", data)
    with pytest.raises(DataError, match="two folders of one name"):
        run("perplexity", folder / "llama", folder / "llama", "--data", data)


def test_without_answers(folder):
    options = ("--data", folder / "chats.jsonl", "--answers", "0", "--rows", "1")
    result = json.loads(run("perplexity", folder / "llama", *options, "--json").stdout)
    (own,) = result["models"].values()
    assert result["prompts"] == [] and "written" not in own and own["perplexity"]["low"] is None
    assert "repeated" in hipp("perplexity", folder / "llama", *options)
