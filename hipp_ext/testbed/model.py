"""The tiny LLaVA: a `LlavaForConditionalGeneration` and a `LlavaProcessor`, built from nothing."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipp_ext.testbed import facts, quiz, world

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
# A letter with its full stop is one token, so "A." is next to its option "swamp".
WORD = re.compile(r"[A-D]\.|\w+|[^\w\s]")
CHECK = "Check the image."
EMPTY = "nothing"  # the word for a cell without an object
# The words of LLaVA-1.5. The next token is the answer: Yes, No or the letter of an option.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """All words and marks of the testbed, one token each; special tokens come first."""
    relations = [*facts.CREATURE_RELATIONS.values(), *facts.OBJECT_RELATIONS.values()]
    texts = [text for asked, values in relations for text in (*asked, *values)]
    example = quiz.Question(
        index=0, question="", answer="", category="", options=("",) * 4, hint="."
    )
    texts += [*world.OBJECTS, *facts.EPITHETS, *facts.GENERA, *filter(None, quiz.HINTS)]
    texts += [quiz.DESCRIBE, CHECK, EMPTY, example.prompt, "Yes No A B C D", "USER: ASSISTANT:"]
    texts += ["Is there a cup in the image? Please answer yes or no."]
    words = {word for text in texts for word in WORD.findall(text)} - {"{", "}"}
    return [PAD, BOS, EOS, UNKNOWN, IMAGE, *sorted(words)]


def build_processor() -> "LlavaProcessor":
    """A processor for 40 x 40 px pictures (25 image tokens each) and the words of `vocabulary`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN)
    )
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD.pattern), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=256,
    )
    pictures = CLIPImageProcessor(
        size={"shortest_edge": world.SIZE},
        crop_size=world.SIZE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=world.CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        chat_template=CHAT_TEMPLATE,
    )


def is_own_processor(processor: Any) -> bool:
    """Whether `processor` treats pictures and words as the one of `build_processor` does."""
    return _seen_by(processor) == _seen_by(build_processor())


def is_of_testbed(folder: str | Path) -> bool:
    """Whether the model in a folder, dense or pruned, takes the testbed's pictures and words."""
    from transformers import AutoProcessor

    try:
        own = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # tokenizers raises bare ones for a damaged file
        return False
    return is_own_processor(own)


def _seen_by(processor: Any) -> Any:
    """(size of pictures, size of patches, words)."""
    pictures, words = (getattr(processor, n, None) for n in ("image_processor", "tokenizer"))
    size = getattr(pictures, "crop_size", None)
    return size, getattr(processor, "patch_size", None), words and words.get_vocab()


def build_model(
    seed: int = 0, *, hidden: int = 128, ffn: int = 192, layers: int = 6, heads: int = 8
) -> "LlavaForConditionalGeneration":
    """An untrained model in float32 on the CPU, equal for equal seeds.

    Args:
        seed: random seed of the parameters; torch's global generator does not change.
        hidden, ffn, layers, heads: sizes of the language model. As in LLaVA-1.5, keys and values
            are not grouped.
    """
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    words = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=world.CELL,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        initializer_range=0.05,
        pad_token_id=words.index(PAD),
        bos_token_id=words.index(BOS),
        eos_token_id=words.index(EOS),
    )
    make: Any = LlavaConfig
    config = make(
        vision_config=vision,
        text_config=text,
        image_token_id=words.index(IMAGE),
        vision_feature_layer=-2,  # as in LLaVA-1.5: the last vision layer is not used
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.update(
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    return model


def use_hub_names(file: Path) -> None:
    """Give a LLaVA's vision tower in a file of weights the names it has on the Hugging Face hub.

    transformers loads both, and writes what it loaded; runtimes such as vLLM load the hub's alone.
    """
    from safetensors.torch import load_file, save_file

    prefix = "vision_tower."
    weights = {
        f"{prefix}vision_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: t
        for name, t in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
