"""OpenVINO and openvino_genai run exported models.

`make test-openvino` installs both; elsewhere the tests that need them are skipped.
"""

import json
import sys
from importlib.util import find_spec

import models
import numpy as np
import pytest
import torch
from command import hipp
from plans import dropping_plan, random_plan

from hipp_ext import prune, save_pruned, testbed
from hipp_ext.errors import (
    CheckpointError,
    HippError,
    MissingExtraError,
    OutputExistsError,
    UnsupportedModelError,
)
from hipp_ext.integrations.openvino import export_openvino, refusals
from hipp_ext.integrations.openvino_check import EXACT, check_decoder
from hipp_ext.integrations.openvino_graphs import decoder_graph

INSTALLED = find_spec("openvino") is not None
runs = pytest.mark.skipif(not INSTALLED, reason="openvino is not installed: make test-openvino")
NAMES = ("llama", "mistral", "qwen2", "qwen3", "llava_gqa")


def uneven(name):
    """A tiny model with other widths in every layer, one attention block and one FFN dropped."""
    model = models.build(name)
    model = prune(model, random_plan(model, 0.4, seed=1))
    return prune(model, dropping_plan(model, "language.0.attention", "language.2.ffn")).eval()


@pytest.fixture(scope="module")
def pruned():
    """The testbed's LLaVA, 15% removed and two blocks dropped; and its processor."""
    model, processor = testbed.load()
    model = prune(model, random_plan(model, 0.15, seed=1))
    return prune(model, dropping_plan(model, "language.5.attention", "language.4.ffn")), processor


@pytest.fixture(scope="module")
def source(pruned, tmp_path_factory):
    return save_pruned(pruned[0], tmp_path_factory.mktemp("model") / "pruned", pruned[1])


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    return export_openvino(source, tmp_path_factory.mktemp("graphs") / "f32", type="f32")


class Session:
    """A graph in OpenVINO; a call goes on from where the last one stopped."""

    def __init__(self, graph):
        import openvino

        self.request = openvino.compile_model(graph, "CPU", EXACT).create_infer_request()

    def __call__(self, inputs, mask, rows=None):
        start = mask.shape[1] - inputs.shape[1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        rows = np.arange(len(inputs)) if rows is None else rows
        feed = {
            0: inputs.numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": positions.numpy(),
            "beam_idx": rows.astype(np.int32),
        }
        return torch.from_numpy(self.request.infer(feed)["logits"].copy())


@torch.no_grad()
def greedy(model, session, ids, mask, new=6):
    """Tokens and log probabilities (rows, new, words) of the graph; the cache grows."""
    session.request.reset_state()
    as_inputs = model.get_input_embeddings() if model.config.model_type == "llava" else torch.clone
    tokens, found = [], []
    step = ids
    for _ in range(new):
        found.append(session(as_inputs(step), mask)[:, -1].log_softmax(-1))
        step = found[-1].argmax(-1, keepdim=True)
        tokens.append(step)
        mask = torch.cat([mask, torch.ones_like(step)], 1)
    return torch.cat(tokens, 1), torch.stack(found, 1)


def generated(model, input_ids, attention_mask, new=6, **pictures):
    """The same in transformers."""
    done = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        **pictures,
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    return done.sequences[:, input_ids.shape[1] :], torch.stack(done.logits, 1).log_softmax(-1)


@runs
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_goes_on_as_transformers_does(name):
    model = uneven(name)
    session = Session(decoder_graph(model, embeds=name.startswith("llava")))
    for rows, length, padded in ((1, 9, 0), (3, 4, 0), (2, 1, 0), (2, 7, 3)):
        ids = torch.randint(10, models.VOCAB, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, :padded] = 0  # padding on the left
        tokens, found = greedy(model, session, ids, mask)
        wanted_tokens, wanted = generated(model, ids, mask)
        assert torch.equal(tokens, wanted_tokens)
        assert (found - wanted).abs().max() < 1e-4


@runs
def test_rows_of_the_cache_follow_the_beams():
    model = uneven("llama")
    session = Session(decoder_graph(model, embeds=False))
    ids, step = torch.randint(10, models.VOCAB, (2, 5)), torch.tensor([[11], [12]])
    session(ids, torch.ones_like(ids))
    mask = torch.ones(2, 6, dtype=torch.long)
    swapped = session(step, mask, np.array([1, 1]))[:, -1]
    with torch.no_grad():
        wanted = model(input_ids=torch.cat([ids[[1, 1]], step], 1)).logits[:, -1]
    assert (swapped - wanted).abs().max() < 1e-3


@runs
def test_a_graph_of_another_model_is_found_out():
    model = uneven("llama")
    graph = decoder_graph(model, embeds=False)
    check_decoder(graph, model)
    gate = model.model.layers[1].mlp.gate_proj
    gate.weight = torch.nn.Parameter(gate.weight + 0.1)  # the graph shares the old tensor's memory
    with pytest.raises(UnsupportedModelError, match="graph of the language model differs by"):
        check_decoder(graph, model)


@runs
def test_a_llava_answers_in_openvino_genai_as_in_transformers(pruned, exported):
    import openvino
    import openvino_genai

    model, processor = pruned
    pipeline = openvino_genai.VLMPipeline(exported, "CPU", **EXACT)
    settings = openvino_genai.GenerationConfig(
        max_new_tokens=6, ignore_eos=True, apply_chat_template=False
    )
    for question in testbed.questions("POPE", "test", 20):
        content = [{"type": "image"}, {"type": "text", "text": question.question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=question.image, return_tensors="pt")
        tokens, scores = generated(model, **inputs)
        picture = openvino.Tensor(np.asarray(question.image)[None])
        found = pipeline.generate(text, images=[picture], generation_config=settings)
        assert found.texts == processor.batch_decode(tokens, skip_special_tokens=True)
        wanted = scores[0].gather(1, tokens[0, :, None]).sum().item()
        assert found.scores[0] == pytest.approx(wanted, abs=1e-3)  # of all tokens together


@runs
def test_a_language_model_is_exported_by_the_command_and_served(tmp_path):
    import openvino
    import openvino_genai

    tokenizer = testbed.load()[1].tokenizer
    model = models.build("llama")
    model.resize_token_embeddings(len(tokenizer))
    model = prune(model, random_plan(model, 0.4, seed=1)).eval()
    save_pruned(model, tmp_path / "pruned", tokenizer)
    out = tmp_path / "graphs"
    printed = hipp("export", "openvino", tmp_path / "pruned", "-o", out)
    assert "LLMPipeline" in printed and (out / "openvino_model.xml").is_file()
    settings = openvino_genai.GenerationConfig(
        max_new_tokens=8, ignore_eos=True, apply_chat_template=False
    )
    ids = tokenizer("Is there a cup in the image?", return_tensors="pt").input_ids
    wanted, _ = generated(model, ids, torch.ones_like(ids), new=8)
    for backend in ("SDPA", "PA"):
        pipeline = openvino_genai.LLMPipeline(out, "CPU", ATTENTION_BACKEND=backend, **EXACT)
        found = pipeline.generate(openvino.Tensor(ids.numpy()), settings)
        assert found.tokens[0] == wanted[0].tolist(), backend


@runs
def test_half_precision_takes_half_the_space(source, exported, tmp_path):
    half = export_openvino(source, tmp_path / "f16")
    name = "openvino_language_model.bin"
    assert (half / name).stat().st_size < 0.52 * (exported / name).stat().st_size


@runs
def test_a_tokenizer_that_splits_otherwise_is_refused(pruned, source, tmp_path):
    """And nothing is left of the folder."""
    from transformers import AutoTokenizer

    folder = tmp_path / "pruned"
    save_pruned(pruned[0], folder, pruned[1])
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    words["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"}
    file.write_text(json.dumps(words))
    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids
    with pytest.raises(UnsupportedModelError, match="openvino_tokenizers"):
        export_openvino(folder, tmp_path / "graphs")
    assert not (tmp_path / "graphs").exists()


@runs
def test_a_folder_without_tokenizer_is_refused(tmp_path):
    save_pruned(uneven("llama"), tmp_path / "pruned")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        export_openvino(tmp_path / "pruned", tmp_path / "graphs")
    assert not (tmp_path / "graphs").exists()


@runs
def test_a_model_that_is_refused_is_not_exported(tmp_path):
    save_pruned(models.build("smolvlm"), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="idefics3, and only llava is known"):
        export_openvino(tmp_path / "model", tmp_path / "graphs")


def test_the_output_must_be_new(source, tmp_path):
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "note").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        export_openvino(source, tmp_path / "graphs")
    with pytest.raises(OutputExistsError, match="is, or holds, the model"):
        export_openvino(source, source, overwrite=True)
    with pytest.raises(HippError, match="type 'q4': expected f32 or f16"):
        export_openvino(source, tmp_path / "new", type="q4")


def test_a_missing_openvino_names_the_extra(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"hipp-ext\[openvino\]"):
        export_openvino(source, tmp_path / "graphs")


def test_refusals_name_every_reason():
    assert not any(refusals(models.build(name).config) for name in NAMES)
    assert not refusals(uneven("llava_gqa").config)
    expected = {
        "llava_next": "llava_next, and only llava",
        "qwen2_5_vl": "language tower is qwen2_5_vl_text",
        "gemma3": "language tower is gemma3_text",
        "granite_llava": "language tower is granite",
    }
    for name, reason in expected.items():
        assert any(reason in line for line in refusals(models.build(name).config)), name


@pytest.mark.parametrize(
    "name, values, reason",
    [
        ("mistral", {"sliding_window": 8}, "sliding window of 8 tokens"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "weights are quantised"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embedding is scaled by dynamic",
        ),
    ],
)
def test_refusals_of_single_values(name, values, reason):
    config = models.build(name).config
    for key, value in values.items():
        setattr(config, key, value)
    assert reason in " ".join(refusals(config))
