"""The model: a small CLIP vision tower, a projector, and SmolLM2-135M-Instruct, as stock LLaVA."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import DataError
from hipp_ext.evals.studies.real_lm import model as smollm2
from hipp_ext.evals.studies.smolworld.painting import PATCH
from hipp_ext.evals.studies.smolworld.scenes import SIZE

IMAGE, REPLACED = "<image>", "<empty_output>"  # a token of SmolLM2 that no chat has
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# SmolLM2's chat without its system prompt, which tells that the model is a text assistant.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vision_config(hidden: int = 192, layers: int = 8) -> Any:
    """The tower: 3.7 million parameters, 36 patches of 16 px and a class token."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=hidden,
    )


def build_processor(tokenizer: Any) -> Any:
    """The processor of 96 x 96 px pictures (36 image tokens) and SmolLM2's tokens.

    Args:
        tokenizer: SmolLM2's own; it is copied.
    """
    from tokenizers import Tokenizer
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    text = tokenizer.backend_tokenizer.to_str()
    content = json.loads(text)
    content["model"]["vocab"][IMAGE] = content["model"]["vocab"].pop(REPLACED)
    for token in content["added_tokens"]:
        token["content"] = IMAGE if token["content"] == REPLACED else token["content"]
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
    )
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        chat_template=CHAT_TEMPLATE,
    )


def assemble(language: nn.Module, processor: Any, vision: Any, seed: int = 0) -> Any:
    """A LLaVA with the weights of `language`; its tower and projector are random.

    Args:
        language: a `LlamaForCausalLM`.
        processor: what `build_processor` returned.
        vision: the tower's configuration.
        seed: random seed of tower and projector.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    make: Any = LlavaConfig
    ids = processor.tokenizer.convert_tokens_to_ids
    text: Any = language.config
    text.pad_token_id, text.bos_token_id, text.eos_token_id = ids(PAD), ids(BOS), ids(EOS)
    config = make(
        vision_config=vision,
        text_config=text,
        image_token_id=ids(IMAGE),
        vision_feature_layer=-1,  # the tower is trained for this; no layer is left unused
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())  # type: ignore[union-attr]
    model.lm_head.load_state_dict(language.lm_head.state_dict())  # type: ignore[union-attr]
    model.tie_weights()
    model.generation_config.update(
        pad_token_id=ids(PAD), bos_token_id=ids(BOS), eos_token_id=ids(EOS)
    )
    return model.eval()


def build_base(seed: int = 0) -> tuple[Any, Any]:
    """(model whose tower and projector are random, processor) from the package of SmolLM2.

    Raises:
        DataError: the package is not installed.
    """
    if reason := smollm2.missing():
        raise DataError(reason)
    language, tokenizer = smollm2.load()
    processor = build_processor(tokenizer)
    return assemble(language, processor, vision_config(), seed), processor


def name_embeddings(embedding: nn.Embedding, tokenizer: Any, names: Sequence[str]) -> Tensor:
    """Mean embedding of the tokens of each name as it stands in a sentence [names, width]."""
    rows = tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    weight = embedding.weight.detach()
    return torch.stack([weight[ids].mean(0) for ids in rows])


def save(model: Any, processor: Any, out: Path, *, overwrite: bool = False) -> None:
    """Write a model folder that transformers and `load_pruned` load.

    Raises:
        OutputExistsError: `out` exists, and `overwrite` is False.
    """
    from hipp_ext.files import new_folder
    from hipp_ext.testbed.model import use_hub_names

    with new_folder(out, overwrite) as folder:
        model.save_pretrained(folder)
        use_hub_names(folder / "model.safetensors")
        processor.save_pretrained(folder)
