"""The mmproj of LLaVA: llama.cpp sees the same picture as transformers."""

import base64
import io
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from llama_cpp_runtime import ask, greedy, save, serve
from models import IMAGE_TOKEN, _text, build
from PIL import Image
from plans import random_plan
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from hipp_ext import load_pruned, prune, save_pruned, testbed
from hipp_ext.calibration import encode
from hipp_ext.errors import CheckpointError, ServerError, UnsupportedModelError
from hipp_ext.evals.served import ServedVLM
from hipp_ext.groups import find_groups
from hipp_ext.integrations.llama_cpp import export_gguf
from hipp_ext.integrations.llama_cpp_mmproj import vision_refusals
from hipp_ext.units import plan_from_counts

SIZE = 32  # of pictures: nothing is resized
PROCESSOR = CLIPImageProcessor(
    size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
)


def llava(act: str = "quick_gelu", **options: Any) -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=8,
        hidden_act=act,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text(LlamaConfig),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=16,
        **options,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def with_processor(model: nn.Module, folder: Path) -> Path:
    save(model, folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((SIZE, SIZE))


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def class_token_last(model: nn.Module) -> nn.Module:
    """`model`, seeing as llama.cpp does (b11549): the class token stands behind the patches, and
    positions and features are chosen as if it stood in front.

    Source: llama.cpp issue 25814.
    """
    (part,) = (m for m in model.modules() if hasattr(m, "class_embedding"))

    def forward(self: Any, pixel_values: torch.Tensor, **_: Any) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([patches, token], 1) + self.position_embedding(self.position_ids)

    part.forward = types.MethodType(forward, part)
    return model


@torch.no_grad()
def largest_difference(folder: Path, language: Path, mmproj: Path) -> float:
    """Largest difference of log probabilities over four pictures."""
    server, worst = serve(language, mmproj), 0.0
    model = class_token_last(load_pruned(folder))
    marker = ask(server, "props")["media_marker"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    before, behind = "the cat ", " sat on a mat"
    for seed in range(4):
        asked = {
            "prompt_string": f"{before}{marker}{behind}",
            "multimodal_data": [data_url(picture(seed)).partition(",")[2]],
        }
        # A further image token would be a picture to transformers.
        steps = greedy(server, asked, tokens=5, banned=[IMAGE_TOKEN])
        ids = [
            *tokenizer(before)["input_ids"],
            *[IMAGE_TOKEN] * 16,
            *tokenizer(behind)["input_ids"],
        ]
        pixels = PROCESSOR(picture(seed), return_tensors="pt")["pixel_values"]
        whole = torch.tensor([[*ids, *(step["id"] for step in steps)]])
        logits = model(input_ids=whole, pixel_values=pixels).logits[0, len(ids) - 1 : -1]
        for step, expected in zip(steps, logits.log_softmax(-1), strict=True):
            for top in step["top_logprobs"]:
                worst = max(worst, abs(top["logprob"] - float(expected[top["id"]])))
    return worst


@torch.no_grad()
def test_the_testbed_sees_in_llama_cpp(tmp_path):
    """Pruned, from whole words to whole words, by the chat template in the file."""
    model, processor = testbed.load()
    small = prune(model, random_plan(model, 0.2))
    folder = save_pruned(small, tmp_path / "model", processor)
    mmproj = tmp_path / "mmproj.gguf"
    server = serve(export_gguf(folder, tmp_path / "a.gguf", type="f32", mmproj=mmproj).path, mmproj)
    reference, closest = class_token_last(load_pruned(folder)), []
    for question in testbed.questions("POPE", "test", 60)[::10]:
        parts = [{"type": "image_url", "image_url": {"url": data_url(question.image)}}]
        parts += [{"type": "text", "text": question.prompt}]
        asked = {"messages": [{"role": "user", "content": parts}], "logprobs": True}
        asked |= {"temperature": 0, "max_tokens": 1, "top_logprobs": 3}
        (step,) = ask(server, "v1/chat/completions", asked)["choices"][0]["logprobs"]["content"]
        batch = encode(processor, [question.prompt], [question.image])
        expected = reference(**batch).logits[0, -1].log_softmax(-1)
        ids = processor.tokenizer.convert_tokens_to_ids(
            [top["token"] for top in step["top_logprobs"]]
        )
        found = torch.tensor([top["logprob"] for top in step["top_logprobs"]])
        closest.append(float((found - expected[ids]).abs().max()))
        assert int(expected.argmax()) == ids[0]
    assert max(closest) < 0.005


CASES = [
    ("whole", {}),
    ("gelu", {"act": "gelu"}),
    ("last", {"vision_feature_layer": -1}),
    ("pruned", {}),
    ("dropped", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_llama_cpp_sees_what_transformers_sees(tmp_path, name, options):
    model = llava(**options)
    if name == "pruned":
        model = prune(model, random_plan(model, towers=("language", "vision")))
    if name == "dropped":
        groups = find_groups(model, ("language", "vision"))
        gone = ("vision.0.attention", "vision.1.ffn", "language.1.ffn")
        scores = {g.name: torch.arange(g.width, dtype=torch.float) for g in groups}
        counts = [0 if g.name in gone else g.width for g in groups]
        model = prune(model, plan_from_counts(groups, counts, scores))
    folder = with_processor(model, tmp_path / "model")
    done = export_gguf(
        folder, tmp_path / "language.gguf", type="f32", mmproj=tmp_path / "mmproj.gguf"
    )
    (note,) = done.notes
    assert "issue 25814" in note
    # llama.cpp looks GELU and quick GELU up in a table of f16.
    assert largest_difference(folder, done.path, tmp_path / "mmproj.gguf") < 0.005


def test_layers_behind_the_features_are_left_out(tmp_path):
    folder = with_processor(llava(), tmp_path / "model")
    export_gguf(folder, tmp_path / "a.gguf", mmproj=tmp_path / "b.gguf")
    reader = GGUFReader(tmp_path / "b.gguf")
    assert reader.get_field("clip.vision.block_count").contents() == 2
    assert not any(tensor.name.startswith("v.blk.2.") for tensor in reader.tensors)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"act": "relu"}, "vision tower has the activation relu"),
        ({"projector_hidden_act": "relu"}, "projector has the activation relu"),
        ({"vision_feature_select_strategy": "full"}, "selected by 'full'"),
        ({"vision_feature_layer": [-2, -1]}, r"several layers, \[-2, -1\]"),
    ],
)
def test_what_an_mmproj_cannot_say(options, match):
    (reason,) = vision_refusals(llava(**options).config)
    with pytest.raises(UnsupportedModelError, match=match):
        raise UnsupportedModelError(reason)


def test_other_models_have_no_mmproj(tmp_path):
    folder = save(build("smolvlm"), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="LLaVA-1.5 with a CLIP tower.*idefics3"):
        export_gguf(folder, tmp_path / "a.gguf", mmproj=tmp_path / "b.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_picture_processor_is_needed(tmp_path):
    folder = with_processor(llava(), tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no usable picture processor"):
        export_gguf(folder, tmp_path / "a.gguf", mmproj=tmp_path / "b.gguf")
    shutil.rmtree(folder)
    assert not list(tmp_path.iterdir())


def test_its_server_is_evaluated(tmp_path):
    model, processor = testbed.load()
    folder = save_pruned(model, tmp_path / "model", processor)
    mmproj = tmp_path / "mmproj.gguf"
    language = export_gguf(folder, tmp_path / "a.gguf", type="f32", mmproj=mmproj).path
    questions = []
    for number, asked in enumerate(testbed.questions("POPE", "test", 60)[::10]):
        asked.image.save(tmp_path / f"{number}.png")
        image = {"type": "image", "value": str(tmp_path / f"{number}.png")}
        questions.append([image, {"type": "text", "value": asked.prompt}])
    seeing = serve(language, mmproj)
    served = ServedVLM(seeing.listening_address, parallel=3)
    answers = served.generate_batch(questions)
    assert set(answers) == {"Yes", "No"}
    assert answers == [served.generate(question) for question in questions]
    assert served.told["owned_by"] == "llamacpp" and served.told["meta"]["n_params"] > 1000
    blind = serve(language)
    with pytest.raises(ServerError, match="llama.cpp needs --mmproj FILE"):
        ServedVLM(blind.listening_address, retries=0).generate(questions[0])
