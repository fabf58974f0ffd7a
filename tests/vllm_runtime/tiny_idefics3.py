"""Tiny models of the Idefics3 kind, with processors and questions about pictures; see `tiny`."""

from typing import Any

from tiny import questions, sizes, tokenizer
from tiny_llava import GREY, clip


def idefics3() -> tuple[Any, Any, list[Any]]:
    return _idefics3("Idefics3")


def smolvlm() -> tuple[Any, Any, list[Any]]:
    return _idefics3("SmolVLM")


def _idefics3(kind: str) -> tuple[Any, Any, list[Any]]:
    import transformers
    from transformers import LlamaConfig

    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    marks = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows)
    words = tokenizer(*marks)
    pictures = getattr(transformers, f"{kind}ImageProcessor")(
        **GREY, size={"longest_edge": 32}, max_image_size={"longest_edge": 32}
    )
    parts = dict(image_processor=pictures, tokenizer=words, image_seq_len=4)
    if kind == "SmolVLM":
        parts["video_processor"] = transformers.SmolVLMVideoProcessor(
            **GREY,
            size={"longest_edge": 32},
            max_image_size={"longest_edge": 32},
            fps=1,
            num_frames=4,
            video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 32}},
        )
    config = getattr(transformers, f"{kind}Config")(
        text_config=LlamaConfig(**sizes(vocab_size=120)).to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        vision_config=clip(f"{kind}VisionConfig").to_dict(),
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    processor = getattr(transformers, f"{kind}Processor")(**parts)
    return model, processor, questions("<image>", 32)
