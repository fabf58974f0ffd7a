"""Recovery on the rows of a file: what is trained, evaluated, kept and reported."""

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import hipp, hipp_json
from plans import random_plan
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from vlm_tables import scienceqa_rows, write_tsv

from hipp_ext import load_pruned, prune, save_pruned, testbed
from hipp_ext.errors import CheckpointError, DataError, HippError, MissingExtraError
from hipp_ext.recover import FileData, RecoverSettings, recover
from hipp_ext.recover.checkpoints import Progress
from hipp_ext.recover.parameters import prepared
from hipp_ext.recover.report import report_lines, skipped_line
from hipp_ext.training import cosine_factor
from recover.test_file_data import lines, table, texts
from recover.test_recover import weights

SETTINGS = RecoverSettings(steps=6, lr=1e-2, optimizer="adamw", evaluate_every=2)


def tokenizer():
    return AutoTokenizer.from_pretrained(testbed.WEIGHTS)


def dense(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
    )
    return LlamaForCausalLM(config).eval()


def pruned() -> LlamaForCausalLM:
    model = dense()
    return prune(model, random_plan(model))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return lines(tmp_path_factory.mktemp("data") / "a.jsonl", texts(60))


def data(file: Path, **options) -> FileData:
    return FileData(file, tokenizer(), **{"batch_size": 4, "holdout": 0.2, **options})


def run(file, folder, settings=SETTINGS, model=None, rows=None, **options):
    model = model or pruned()
    rows = rows or data(file)
    return model, recover(model, rows, settings, folder=folder, progress=False, **options)


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return *run(file, folder), folder


def test_the_held_out_loss_falls_and_the_report_says_so(whole, file):
    model, result, folder = whole
    steps = [e["step"] for e in result.evaluations]
    losses = [e["loss"] for e in result.evaluations]
    assert steps == [0, 2, 4, 6] and losses[-1] < losses[0] - 0.3
    assert result.step == steps[losses.index(min(losses))] and result.rows == 24
    report = json.loads((folder / "recover.json").read_text())
    assert report["evaluations"] == result.evaluations and report["losses"] == result.losses
    assert report["tokens"] == result.tokens > 100 and report["settings"]["steps"] == 6
    assert (folder / "recover.png").read_bytes()[:4] == b"\x89PNG"
    held = data(file)
    total = tokens = 0
    for batch in held.held_out(0, 1):
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * count
        tokens += count
    best = min(losses)
    assert abs(total / tokens - best) < 1e-5
    text = "\n".join(report_lines(result))
    assert f"held out: loss {losses[0]:.4g} -> {best:.4g} (weights of step {result.step})" in text
    assert "did not improve" not in text
    worse = [{"step": 0, "loss": 1.0}, {"step": 8, "loss": 1.5}]
    unchanged = dataclasses.replace(result, evaluations=worse, step=0)
    assert "the held-out loss did not improve (1 -> 1.5)" in report_lines(unchanged)[-1]
    assert "24 rows and" in text and skipped_line(result) is None
    lost = dataclasses.replace(result, skipped={9: "d", 2: "a", 4: "c", 3: "b"})
    assert skipped_line(lost) == (
        "4 rows of the data could not be used: row 2: a; row 3: b; row 4: c; and 1 more"
    )


def test_the_best_weights_are_kept_and_training_may_stop_early(file, tmp_path):
    settings = RecoverSettings(
        steps=40, lr=0.3, optimizer="adamw", evaluate_every=1, patience=2, save_every=1000
    )
    model, result = run(file, tmp_path / "a", settings)
    losses = [e["loss"] for e in result.evaluations]
    best = losses.index(min(losses))
    assert result.step == best and len(losses) == best + 3 < 41  # two evaluations without a gain
    again, same = run(file, tmp_path / "a", settings)
    assert torch.equal(weights(again), weights(model)) and same == result
    assert sorted(p.name for p in (tmp_path / "a").glob("step-*")) == sorted(
        {f"step-{best}", f"step-{best + 2}"}
    )
    last = RecoverSettings(steps=best + 2, lr=0.3, optimizer="adamw", evaluate_every=1, keep="last")
    _, result = run(file, tmp_path / "b", last)
    assert result.step == best + 2


def test_a_teacher_is_learnt_from(file, tmp_path):
    sure = dense()
    with torch.no_grad():
        sure.lm_head.weight.mul_(20)
    _, result = run(file, tmp_path, teacher=sure)
    first, last = result.evaluations[0], result.evaluations[-1]
    assert first["kl"] == pytest.approx(first["loss"]) and last["kl"] < 0.8 * first["kl"]
    model, result = run(file, tmp_path / "same", model=dense(), teacher=dense())
    assert result.evaluations[0]["kl"] < 1e-6 and result.step == 0
    assert torch.equal(weights(model), weights(dense()))


class Repeated:
    """A source with the same batches in every step, which the processes share."""

    token_mean = True

    def __init__(self, own):
        self.own = own

    def batches(self, rank, workers, start):
        while True:
            for batch in self.own[rank::workers]:
                yield [batch]


def unequal() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """(eight rows, the same rows as two batches): most answers in one, most text in the other."""
    ids = torch.randint(3, 200, (8, 12), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:2, :4], labels[2:, :-1], mask[2:, :3] = -100, -100, 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return batch, [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]


UNEQUAL = {  # how they are learnt
    "labels": {},
    "answers of a teacher": {"positions": "answers"},
    "text of a teacher": {"positions": "text"},
    "both": {"positions": "text", "cross_entropy_share": 0.3, "temperature": 2.0},
}


def learnt(source, folder, options, **settings) -> tuple[torch.Tensor, list[float]]:
    """(how the weights moved, losses) in two steps without dropout."""
    model, teacher = dense(), dense(seed=1) if options else None
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    chosen = RecoverSettings(steps=2, lr=1e-2, optimizer="adamw", **options, **settings)
    result = recover(model, source, chosen, folder=folder, teacher=teacher, progress=False)
    return weights(model) - weights(dense()), result.losses


def assert_learnt_the_same(found, expected):
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    # AdamW makes something of gradients that are nothing but rounding.
    assert (found[0] - expected[0]).norm() < 1e-3 * expected[0].norm()


@pytest.mark.parametrize("options", UNEQUAL.values(), ids=UNEQUAL)
def test_a_position_is_worth_the_same_in_any_accumulation(tmp_path, options):
    """The loss is the mean over what is learnt, whatever the passes it is in."""
    whole, parts = unequal()
    expected = learnt(Repeated([whole]), tmp_path / "whole", options)
    found = learnt(Repeated(parts), tmp_path / "parts", options, accumulation=2)
    assert_learnt_the_same(found, expected)


def test_held_out_losses_do_not_depend_on_the_batches(tmp_path):
    """Of a few long answers and many short ones; texts have a label at every position."""
    rows = [
        {"messages": [{"role": "user", "content": "cup " * n}, {"role": "assistant", "content": a}]}
        for n, a in ((k % 7 + 1, "dog " * 20 if k % 9 == 0 else f"{k}") for k in range(60))
    ]
    file, found = lines(tmp_path / "chats.jsonl", rows), []
    settings = RecoverSettings(
        steps=1, lr=0.0, positions="text", cross_entropy_share=0.3, hidden_share=0.0, top_k=9
    )
    for size in (1, 16):
        own = data(file, batch_size=size, holdout=0.5)
        _, result = run(None, tmp_path / str(size), settings, rows=own, teacher=dense(seed=1))
        found.append(result.evaluations[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=2e-7)  # the KL is 0.002
    first = found[0]
    assert first["loss"] == pytest.approx(0.7 * first["kl"] + 0.3 * first["cross_entropy"])


def test_adapters_are_merged_into_a_normal_folder(file, tmp_path):
    before = pruned()
    settings = RecoverSettings(steps=4, lr=1e-2, train="lora", lora_rank=4, save_every=2)
    model, result = run(file, tmp_path / "run", settings, rows=data(file, holdout=0.0))
    assert result.losses[-1] < result.losses[0]
    changed = {
        name
        for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {n for n, _ in model.named_parameters() if n.endswith("proj.weight")}
    assert all(p.requires_grad for p in model.parameters())
    loaded = load_pruned(save_pruned(model, tmp_path / "out", tokenizer()))
    assert torch.equal(weights(loaded), weights(model)) and loaded.hipp_plan == before.hipp_plan
    # A checkpoint has the adapters alone, and goes on with the same model only.
    sizes = [p.stat().st_size for p in (tmp_path / "run").glob("step-4/weights.safetensors")]
    assert sizes[0] < sum(p.numel() for p in model.parameters()) * 2
    again, same = run(file, tmp_path / "run", settings, rows=data(file, holdout=0.0))
    assert torch.equal(weights(again), weights(model)) and same == result
    with pytest.raises(CheckpointError, match="holds another run: frozen is"):
        other = prune(dense(seed=1), random_plan(dense()))
        run(file, tmp_path / "run", settings, model=other, rows=data(file, holdout=0.0))


def test_whole_modules_are_trained_beside_adapters(file, tmp_path):
    settings = RecoverSettings(steps=2, lr=1e-2, train="lora", whole_modules=("layers.1.mlp",))
    with prepared(pruned(), settings) as model:
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora" not in n} == {
        f"base_model.model.model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert any("layers.0.mlp" in n for n in trained)
    assert not [n for n in trained if "lora" in n and "layers.1.mlp" in n]
    model, _ = run(file, tmp_path, settings)
    before, after = (m.model.layers[1].mlp.up_proj.weight for m in (pruned(), model))
    rank = torch.linalg.matrix_rank(after.detach() - before.detach(), atol=1e-5)
    assert rank > settings.lora_rank or rank == min(before.shape)
    missing = RecoverSettings(train="lora", whole_modules=("projector",))
    with pytest.raises(HippError, match="has no module 'projector'"), prepared(pruned(), missing):
        pass


def test_only_norms(file, tmp_path):
    settings = RecoverSettings(steps=2, lr=1e-2, train="norms")
    model, _ = run(file, tmp_path, settings)
    for (name, a), b in zip(model.named_parameters(), pruned().parameters(), strict=True):
        assert torch.equal(a, b) == ("norm" not in name), name


def test_half_precision_is_trained_in_float32_and_returned_as_it_was(file, tmp_path):
    seen = set()

    class Watched(FileData):
        def batches(self, rank, workers, start):
            for batches in super().batches(rank, workers, start):
                seen.update(p.dtype for p in model.parameters())
                yield batches

    model = pruned().bfloat16()
    rows = Watched(file, tokenizer(), batch_size=4)
    kinds = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda _, inputs, output: kinds.add(output.dtype)
    )
    _, result = run(file, tmp_path, model=model, rows=rows)
    assert seen == {torch.float32} and kinds == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert result.losses[-1] < result.losses[0]
    with pytest.raises(CheckpointError, match="another run: precision is auto there, and float32"):
        run(file, tmp_path, RecoverSettings(**(vars(SETTINGS) | {"precision": "float32"})))


def test_gradient_checkpointing_computes_the_same(whole, file, tmp_path):
    settings = RecoverSettings(**(vars(SETTINGS) | {"gradient_checkpointing": True}))
    model, result = run(file, tmp_path, settings)
    assert result.losses == pytest.approx(whole[1].losses, abs=1e-5)
    assert not model.is_gradient_checkpointing
    with pytest.raises(HippError, match="Linear has no gradient checkpointing"):
        recover(torch.nn.Linear(2, 2), data(file), settings, folder=tmp_path / "b")


def test_a_loss_that_is_not_finite_names_the_rows_and_leaves_the_checkpoint(file, tmp_path):
    model, passes = pruned(), []

    def poison(module, inputs, output):
        passes.append(1)
        return output * torch.nan if len(passes) == 4 else output

    model.lm_head.register_forward_hook(poison)
    rows = data(file, holdout=0.0)
    fourth = next(itertools.islice(data(file, holdout=0.0).batches(0, 1, 0), 3, None))
    settings = RecoverSettings(steps=6, save_every=2, optimizer="adamw")
    named = ", ".join(map(str, sorted(row for b in fourth for row in b.rows)))
    with pytest.raises(HippError, match=f"loss of step 4 is nan: .*Rows of the file.*: {named}\\."):
        run(file, tmp_path, settings, model=model, rows=rows)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-2"]
    _, result = run(file, tmp_path, settings, rows=data(file, holdout=0.0))
    assert len(result.losses) == 6


def test_more_is_measured_beside_the_held_out_rows(file, tmp_path):
    rows = data(file, holdout=0.0)
    calls = []

    def measure(model):
        calls.append(model.training)
        return {"norm": float(model.lm_head.weight.detach().norm())}

    settings = RecoverSettings(steps=2, optimizer="adamw", evaluate_every=1)
    model, result = run(file, tmp_path, settings, rows=rows, measure=measure)
    assert [sorted(e) for e in result.evaluations] == [["norm", "step"]] * 3 and result.step == 2
    assert result.evaluations[-1]["norm"] == float(model.lm_head.weight.detach().norm())
    assert result.evaluations[0]["norm"] != result.evaluations[1]["norm"] and calls == [False] * 3


def test_adapters_are_gone_after_an_error(file, tmp_path):
    model = pruned()
    settings = RecoverSettings(train="lora")
    with pytest.raises(KeyboardInterrupt), prepared(model, settings):
        raise KeyboardInterrupt
    assert torch.equal(weights(model), weights(pruned()))
    assert not [n for n, _ in model.named_modules() if "lora" in n]
    save_pruned(model, tmp_path / "out", tokenizer())


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"keep": "best"}, {"holdout": 0.0}, "The best weights .* need held-out rows"),
        ({"patience": 1}, {"holdout": 0.0}, "early stopping need held-out rows"),
        ({"sharding": "fsdp"}, {}, "sharding='fsdp' needs several processes"),
        ({"freeze_vision": True}, {}, "has no parameters of a vision tower to freeze"),
        ({"temperature": 2.0, "top_k": 8}, {}, "temperature=2.0, top_k=8: this is about what"),
    ],
)
def test_settings_that_do_not_fit(file, tmp_path, settings, options, message):
    with pytest.raises(HippError, match=message):
        run(file, tmp_path, RecoverSettings(**settings), rows=data(file, **options))


def test_processes_that_are_not_connected_say_so(file, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HippError, match="torchrun started 2 processes.*call torch.distributed"):
        run(file, tmp_path, RecoverSettings())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("library", "train"), [("accelerate", "full"), ("peft", "lora")])
def test_a_missing_library_names_the_extra(file, tmp_path, monkeypatch, library, train):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        MissingExtraError, match=rf"{library} is not installed.*hipp-ext\[recover\]"
    ):
        run(file, tmp_path, RecoverSettings(train=train))


@pytest.mark.parametrize(
    ("train", "message"),
    [("lora", "Embedding has no linear layers"), ("norms", "Embedding has no norms to train")],
)
def test_models_without_what_is_to_be_trained(train, message):
    model = torch.nn.Embedding(2, 2)
    with pytest.raises(HippError, match=message), prepared(model, RecoverSettings(train=train)):
        pass
    assert model.weight.requires_grad


def test_a_gradient_that_is_not_finite_ends_the_run(file, tmp_path):
    model = pruned()
    model.lm_head.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(HippError, match="gradient of step 1 has the norm .*Rows of the file"):
        run(file, tmp_path, model=model)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-0"]


def test_held_out_rows_that_cannot_be_used(tmp_path):
    silent = [{"messages": [{"role": "user", "content": f"{n}"}]} for n in range(400)]
    rows = data(lines(tmp_path / "a.jsonl", [*texts(8), *silent]), holdout=0.01, batch_size=1)
    with pytest.raises(HippError, match="None of the held-out rows can be used"):
        run(None, tmp_path / "run", rows=rows)


def test_other_data_in_the_same_folder_is_refused(whole, file, tmp_path):
    other = lines(tmp_path / "b.jsonl", texts(60, seed=1))
    with pytest.raises(CheckpointError, match="holds another run: data.rows is"):
        run(other, whole[2])


def test_the_cosine_falls_to_zero():
    factors = [cosine_factor(step, 100, warmup=10) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[55] == pytest.approx(0.5) and 0 < factors[99] < 1e-3
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_the_best_step_is_the_first_of_equal_ones():
    evaluations = [{"step": float(s), "loss": v} for s, v in ((0, 3.0), (2, 1.0), (4, 1.0))]
    progress = Progress(step=4, evaluations=evaluations)
    assert progress.best_step == 2 and progress.since_best == 1


@pytest.mark.parametrize(
    ("options", "ends"),
    [(["--kills", "1"], 2), (["--workers", "2", "--local-steps", "2", "--kills", "5"], 1)],
    ids=["one process, and two with LQ-SGD", "local steps of two processes"],
)
def test_killed_at_random_moments_it_ends_with_the_same_weights(options, ends):
    """`kills.py --kills 20` does more."""
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *options],
        env=os.environ | {"PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{options[-1]} kills in") == ends


def test_rows_that_cannot_be_used_are_warned_of_in_quiet_runs_too(tmp_path):
    save_pruned(pruned(), tmp_path / "small", tokenizer())
    rows = [*texts(3), {"messages": [{"role": "user", "content": "hello"}]}]
    common = ["--data", lines(tmp_path / "a.jsonl", rows), "--device", "cpu", "--batch-size", "2"]
    told = hipp(
        *("--quiet", "recover", tmp_path / "small", *common, "--steps", "2"),
        *("-o", tmp_path / "back"),
    )
    warned = "hipp: warning: 1 row of the data could not be used: row 4: it has no answer"
    assert [line for line in told.splitlines() if "hipp" in line] == [warned]
    assert "learnt from" not in told


def test_the_command(file, tmp_path):
    model = dense()
    model.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    save_pruned(pruned(), tmp_path / "small", tokenizer())
    common = ["--data", file, "--holdout", "0.2", "--batch-size", "4", "--steps", "2"]
    out = hipp(
        "recover",
        tmp_path / "small",
        "--teacher",
        tmp_path / "dense",
        *common,
        *("--train", "lora", "--schedule", "cosine", "--device", "cpu", "-o", tmp_path / "back"),
    )
    assert "loss " in out and "8 rows and" in out and ", kl " in out
    assert load_pruned(tmp_path / "back").hipp_plan == pruned().hipp_plan
    report = json.loads((tmp_path / "back.recover/recover.json").read_text())
    assert report["settings"]["train"] == "lora" and len(report["losses"]) == 2
    again = ("recover", tmp_path / "small", *common, "--device", "cpu", "-o", tmp_path / "json")
    assert hipp_json(*again)["settings"]["train"] == "full"
    with pytest.raises(DataError, match="Give --data, or --pope and --scienceqa"):
        hipp("recover", tmp_path / "small", *common, "--pope", file, "-o", tmp_path / "other")
    for options, message in (
        (("--teacher-device", "cpu"), "--teacher-device needs --teacher"),
        (("--teacher-dtype", "bfloat16"), "--teacher-dtype needs --teacher"),
        (("--teacher", tmp_path / "dense", "--teacher-dtype", "int8"), "--teacher-dtype int8: exp"),
        (("--teacher", tmp_path / "none"), "none is not a model folder"),
        (("--hidden-layers", "1,x"), "--hidden-layers 1,x: numbers with commas"),
    ):
        with pytest.raises(HippError, match=message):
            hipp("recover", tmp_path / "small", *common, *options, "-o", tmp_path / "c")


def test_what_a_teacher_on_the_command_line_is_asked_for(file, tmp_path):
    dense().save_pretrained(tmp_path / "dense")
    save_pruned(pruned(), tmp_path / "small", tokenizer())
    common = ["recover", tmp_path / "small", "--teacher", tmp_path / "dense", "--data", file]
    common += ["--steps", "1", "--batch-size", "4", "--device", "cpu", "--hidden-share", "0.5"]
    losses = {}
    for name, options in {
        "all": (),
        "first": ("--hidden-layers", "0"),
        "both": ("--hidden-layers", "0,1"),
        "bf16": ("--teacher-dtype", "bfloat16"),
    }.items():
        hipp(*common, *options, "-o", tmp_path / name)
        report = json.loads((tmp_path / f"{name}.recover/recover.json").read_text())
        losses[name] = report["losses"][0]
    assert losses["both"] == losses["all"] != losses["first"]
    assert losses["bf16"] != losses["all"] == pytest.approx(losses["bf16"], rel=0.05)
    assert report["settings"]["objective"]["hidden_layers"] is None
    assert "hidden_layers" not in report["settings"]  # runs of older versions go on


def test_margins_of_tables_and_published_test_sets_on_the_command_line(tmp_path, monkeypatch):
    from hipp_ext.evals import tables

    asked = table(tmp_path)
    choices = write_tsv(tmp_path / "choices.tsv", scienceqa_rows()[:4])
    common = ["--data", asked, "--steps", "1", "--batch-size", "2", "--device", "cpu"]
    hipp(
        *("recover", "testbed", *common, "-o", tmp_path / "back"),
        *("--measure", asked, "--measure", choices, "--keep", "last"),
    )
    report = json.loads((tmp_path / "back.recover/recover.json").read_text())
    assert [e["step"] for e in report["evaluations"]] == [0, 1]
    assert all(0 <= e["pope_accuracy"] <= 100 for e in report["evaluations"])
    with pytest.raises(DataError, match="--measure is given twice"):
        hipp("recover", "testbed", *common, "-o", tmp_path / "b", "--measure", asked)
    digest = hashlib.md5(asked.read_bytes()).hexdigest()
    monkeypatch.setitem(tables._OFFICIAL, "POPE", ("", digest))
    with pytest.raises(DataError, match="is the published POPE, a test set"):
        hipp("recover", "testbed", *common, "-o", tmp_path / "c")
