"""Batches of token ids, and the answers of a language model: greedy ones, and drawn ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.causal_lm import PAD, CausalLM, require_unicode
from memtool.errors import ConfigError, DataError


@dataclass(frozen=True)
class RecallOf:
    """The recall of a batch of prompts (b, n), padded on the left; it stays while answering."""

    choose: Callable[[Tensor], Recall | None]

    def __call__(self, prompts: Tensor) -> Recall | None:
        """What is recalled for them."""
        return self.choose(prompts)


def without_answers(tokens: Tensor, answers: Tensor) -> Tensor:
    """Tokens (b, n) with padding in the place of the last `answers` (b,) of each sample."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.masked_fill(places >= tokens.shape[1] - answers.unsqueeze(1), PAD)


def trimmed(tokens: Tensor) -> Tensor:
    """Tokens (b, n) without the columns on the left where all are padding."""
    return tokens[:, int((tokens != PAD).any(dim=0).int().argmax()) :]


def by_length(tokens: Tensor, batch: int) -> Sequence[Tensor]:
    """Indices of samples by batches, those of like lengths together, so that little is padded."""
    return (tokens != PAD).sum(dim=1).argsort(stable=True).split(batch)


@torch.no_grad()
def answers(
    lm: CausalLM,
    prompts: Sequence[str],
    recall: Recall | RecallOf | None = None,
    *,
    batch: int = 16,
    most: int | None = None,
    beams: int = 1,
) -> list[str]:
    """The most probable answers of a language model to prompts, without white space around them.

    `recall` is one for all, or a `RecallOf`; `most` and `beams` as in `CausalLM.generate`.
    """
    if not prompts:
        return []
    tokens = lm.encode(prompts).tokens
    found = [""] * len(prompts)
    for rows in by_length(tokens, batch):
        asked = trimmed(tokens[rows]).to(lm.device)
        rows_of = asked.repeat_interleave(beams, dim=0)
        chosen = recall(rows_of) if isinstance(recall, RecallOf) else recall
        generated = lm.generate(asked, chosen, most=most, beams=beams)
        for row, ids in zip(rows.tolist(), generated, strict=True):
            found[row] = lm.decode(ids).strip()
    return found


@dataclass(frozen=True)
class Wish:
    """How one prompt is to be answered.

    `most` tokens at most. `temperature` 0 takes the most probable token; above, tokens are drawn
    from the most probable ones that have `top_p` of the probability together, by a generator of
    `seed`. The answer ends before the first of `stop`.
    """

    most: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Growing:
    """One answer while it grows; its draws are its own, whatever is answered beside it.

    `ended` says why it has: "stop" at the end of the text or a word of `stop`, "length" at the most
    tokens; None before. `tokens` counts those of the answer.
    """

    def __init__(self, lm: CausalLM, wish: Wish) -> None:
        self.wish = wish
        self.ended: str | None = None
        self.text = ""
        self._ids: list[int] = []
        self._said = ""
        self._lm = lm
        self._generator = torch.Generator()
        if wish.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(wish.seed)

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return len(self._ids)

    def grow(self, scores: Tensor) -> int:
        """The token that follows, by logits (vocabulary,) on the CPU; an end where it has ended."""
        if self.ended is None:
            token = self._draw(scores)
            if token in self._lm.ends:
                self.ended = "stop"
            else:
                self._take(token)
        return self._lm.ends[0] if self.ended is not None else self._ids[-1]

    def certain(self) -> str:
        """The text that has become certain since this was asked last; all of the rest at the end.

        What may be the beginning of a word of `stop`, of a character of several tokens, or of
        white space that is not printed, is kept back.
        """
        text = self.text if self.ended is not None else self._sure()
        new = text[len(self._said) :]
        self._said += new
        return new

    def _take(self, token: int) -> None:
        self._ids.append(token)
        self.text = self._lm.decode(self._ids)
        found = [place for word in self.wish.stop if (place := self.text.find(word)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], "stop"
        elif len(self._ids) >= self.wish.most:
            self.ended = "length"

    def _sure(self) -> str:
        sure = self.text.rstrip("\ufffd").rstrip()
        most = max((len(word) for word in self.wish.stop), default=1) - 1
        for size in range(min(most, len(self.text)), 0, -1):
            if any(word.startswith(self.text[-size:]) for word in self.wish.stop):
                return sure[: len(self.text) - size]
        return sure

    def _draw(self, scores: Tensor) -> int:
        if self.wish.temperature == 0:
            return int(scores.argmax())
        probabilities = (scores.double() / self.wish.temperature).softmax(dim=0)
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(dim=0) - ordered
        kept = ordered[before < self.wish.top_p]
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * kept.sum()
        place = int(torch.searchsorted(kept.cumsum(dim=0), point, right=True))
        return int(tokens[min(place, len(kept) - 1)])


@torch.no_grad()
def grow(
    lm: CausalLM,
    tokens: Tensor,
    recall: Recall | None,
    answers: Sequence[Growing],
    told: Callable[[], None],
) -> None:
    """Let the answers to prompts (b, n) grow together, until all have ended.

    `told` is called after every token of theirs; an answer that it ends grows no more.
    """
    cache = lm.new_cache()
    while any(answer.ended is None for answer in answers):
        scores = lm.head(lm.hidden(tokens, recall, cache)[:, -1]).float().cpu()
        following = [answer.grow(row) for answer, row in zip(answers, scores, strict=True)]
        told()
        tokens = torch.cat([tokens, tokens.new_tensor(following).unsqueeze(1)], dim=1)


def chat_tokens(lm: CausalLM, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """Token ids (1, n) of a conversation by the tokenizer's chat template, ready to be answered.

    Raises ConfigError for a tokenizer without one, DataError for a conversation that the template
    refuses, and for one that is too long.
    """
    if not getattr(lm.tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer of {lm.name} has no chat template",
            expected="a model that was trained to chat",
            remedy="/v1/completions, which takes a prompt as it is",
        )
    from jinja2.exceptions import TemplateError

    for message in messages:
        require_unicode(message["content"], "a message")
    try:
        asked = lm.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template of {lm.name} refuses this: {error}") from error
    # The template has the special tokens in it.
    ids = list(lm.tokenizer(asked, add_special_tokens=False, verbose=False).input_ids)
    if not 0 < len(ids) <= lm.prompt_tokens:
        raise DataError(
            f"a conversation of {len(ids)} tokens",
            expected=f"1 to {lm.prompt_tokens} (text.prompt_tokens)",
            remedy="fewer messages, or shorter ones",
        )
    return torch.tensor([ids])
