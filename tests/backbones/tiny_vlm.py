"""A small random LLaVA (CLIP, a projection, Llama) with its processor, as a folder on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from benchmarks.small_llava import MARK, PATCH, SIDE, small_config, small_processor
from tests.backbones.tiny_lm import tiny_config, tiny_tokenizer

PLACES = (SIDE // PATCH) ** 2


def tiny_processor(side: int = SIDE, patch: int = PATCH) -> LlavaProcessor:
    """Pictures of `side` pixels; one token a character, and one for the places of a picture."""
    return small_processor(tiny_tokenizer(), side=side, patch=patch)


def tiny_llava(*, seed: int = 0, **changes: object) -> LlavaForConditionalGeneration:
    """Random weights, large enough for answers that differ; no generator of anybody is touched."""
    text = tiny_config("llama", **{"max_position_embeddings": 128, **changes})
    token = text.vocab_size
    text.vocab_size += 1
    config = small_config(text, mark=token, width=16, intermediate_size=24)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.3 if "vision" in name else 0.5)
    return model.eval()


def write_tiny_llava(folder: Path, **changes: Any) -> Path:
    """The model and its processor as `save_pretrained` writes them."""
    tiny_llava(**changes).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """A random picture, unlike any other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def tiny_idefics3(*, seed: int = 0) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """A random Idefics3, as SmolVLM is one: a picture is cut into tiles, as many as it is large."""
    tokenizer = tiny_tokenizer()
    marks = ["<fake_token_around_image>", MARK, "<end_of_utterance>", "<global-img>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(one) for one in marks]})
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    config = Idefics3Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config=tiny_config("llama", max_position_embeddings=256, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids(MARK),
        scale_factor=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.3 if "vision" in name else 0.5)
    return model.eval(), processor
