"""A small LLaVA (CLIP, a projection, a language tower) and its processor, for trials and tests."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaProcessor

MARK = "<image>"
SIDE, PATCH = 24, 8
"""Pixels a side of a picture, and of what becomes one token."""


def small_processor(tokenizer: Any, *, side: int = SIDE, patch: int = PATCH) -> LlavaProcessor:
    """The processor over a tokenizer, which learns the mark of a picture as its last token."""
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(MARK)]})
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def small_config(text: Any, *, mark: int, width: int, **vision: int) -> LlavaConfig:
    """A configuration over that of a language tower; `mark` is the id of a picture's token.

    The vision tower is `width` wide; `vision` says what else of it is not so.
    """
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=width,
            **{**tower, **vision},
        ),
        text_config=text,
        image_token_index=mark,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
