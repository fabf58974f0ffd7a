"""A tiny random LLaVA, and POPE and ScienceQA files about drawn squares: real formats, nothing
downloaded.
"""

import base64
import csv
import io
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = [
    "Yes",
    "No",
    "yes",
    "no",
    "A",
    "B",
    "C",
    ".",
    ",",
    "not",
    "is",
    "there",
    "a",
    "the",
    "red",
    "blue",
    "green",
    "square",
    "purple",
    "maybe",
    "Question",
    "Options",
    ":",
    "?",
    "Hint",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
COLOURS = ("red", "blue", "green", "yellow")
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% "
    "else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} : {% endif %}"
)


def save_llava(folder: Path, seed: int = 0) -> Path:
    """Write a LLaVA of random weights with its processor; another seed is another model of the same
    shape.
    """
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(SPECIAL + WORDS),
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=4,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # strong enough that answers differ between pictures and questions
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5 if "embed" not in name else 1.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(colour: str, at: int = 0) -> str:
    """A base64 PNG: a square of a colour on grey."""
    image = Image.new("RGB", (40, 32), "grey")
    image.paste(Image.new("RGB", (14, 14), colour), (3 + 5 * at, 6))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def pope_rows() -> list[dict]:
    """12 questions about 4 pictures; a picture is given once and then repeated by index; splits
    overlap.
    """
    rows = []
    for n in range(12):
        image, ask = divmod(n, 3)
        rows.append(
            {
                "index": n,
                "image": picture(COLOURS[image], image) if ask == 0 else str(3 * image),
                "question": f"is there a {COLOURS[(image + ask) % 4]} square ?" + " the" * (n % 5),
                "answer": "Yes" if ask == 0 or n in (4, 8) else "No",
                "category": ("random", "random,popular", "popular,adversarial")[ask],
            }
        )
    return rows


def scienceqa_rows() -> list[dict]:
    """6 questions; some have a hint, some a third option."""
    return [
        {
            "index": 10 + n,
            "image": picture(COLOURS[n % 4], n),
            "question": "the square is" + " red" * (n % 3),
            "hint": "a square" if n % 2 else "",
            "A": "red",
            "B": "blue",
            "C": "green" if n > 2 else "",
            "answer": "AABBCA"[n],
            "category": "physics" if n < 4 else "biology",
        }
        for n in range(6)
    ]


def write_tsv(path: Path, rows: list[dict], drop: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = [column for column in rows[0] if column not in drop]
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path
