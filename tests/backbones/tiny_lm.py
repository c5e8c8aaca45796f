"""A small random language model with a tokenizer of single characters, as a folder on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz .:0123456789\n"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "vocab_size": len(LETTERS) + 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

WINDOW = 6
OWN: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 4},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_inner": 24},
}
"""What a family has of its own: windows that short prompts already exceed."""
NOT_OF_GPT2 = ("num_key_value_heads", "head_dim", "intermediate_size")


def tiny_config(family: str = "llama", **changes: object) -> PreTrainedConfig:
    """A configuration of about 5,000 parameters."""
    kinds = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "gemma": GemmaConfig,
        "gemma2": Gemma2Config,
        "gemma3_text": Gemma3TextConfig,
        "phi3": Phi3Config,
        "gpt2": GPT2Config,
    }
    said = {**SIZES, **OWN.get(family, {}), **changes}
    if family == "gpt2":  # which has no such settings
        said = {name: one for name, one in said.items() if name not in NOT_OF_GPT2}
    return kinds[family](**said)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; `<s>` before every text."""
    words = ["<unk>", "<s>", "</s>", *LETTERS]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: object) -> torch.nn.Module:
    """Random weights, large enough for answers that differ; no generator of anybody is touched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def write_tiny(folder: Path, **changes: object) -> Path:
    """The model and its tokenizer as `save_pretrained` writes them."""
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
