"""A model of images and text: what it says is what transformers says, whatever it stands beside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from memtool.adapters.layout import Layout
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues
from memtool.backbones import pictured
from memtool.backbones.causal_lm import PAD, create_causal_lm
from memtool.backbones.footprint import footprint_of
from memtool.backbones.pictured import KEPT_ALBUMS, PicturedLM
from memtool.errors import ConfigError, DataError, NotFoundError
from memtool.learning.looks import FINAL, PromptLook
from memtool.memories.rank1 import AtomGate
from memtool.pictured import Prompt
from memtool.settings import BackboneSettings, TextSettings
from memtool.streams import with_pictures
from tests.backbones.tiny_lm import write_tiny
from tests.backbones.tiny_vlm import (
    MARK,
    PLACES,
    SIDE,
    picture,
    tiny_idefics3,
    tiny_llava,
    tiny_processor,
    write_tiny_llava,
)

ASKED = ["<image> what is it:", "abc", "is <image> like <image>:"]
IMAGES = [picture(1), None, [picture(2), picture(3, 30, 60)]]
ANSWERS = ["red", "green", "it is"]
LIMITS = TextSettings(prompt_tokens=100, answer_tokens=16)


def build(text: TextSettings = LIMITS) -> PicturedLM:
    return PicturedLM(tiny_llava(), tiny_processor(), "hf:tiny", text)


def build_idefics3() -> PicturedLM:
    model, processor = tiny_idefics3()
    return PicturedLM(model, processor, "hf:tiny", TextSettings(answer_tokens=16))


def asked() -> list[str]:
    return with_pictures(ASKED, IMAGES)


def theirs(model: Any, processor: Any, prompt: str, answer: str = "") -> Tensor:
    """Logits (n, words) by transformers' own processor and model, one prompt alone."""
    pictures = [one.rgb() for one in prompt.album.pictures] if isinstance(prompt, Prompt) else None
    given = processor(text=[str(prompt)], images=pictures and [pictures], return_tensors="pt")
    more = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
    if answer:
        given["input_ids"] = torch.cat([given["input_ids"], more], dim=1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    with torch.no_grad():
        found: Tensor = model(**given).logits[0]
    return found


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_answers_are_as_probable_as_by_transformers(kind: str) -> None:
    if kind == "llava":
        lm, model, processor = build(), tiny_llava(), tiny_processor()
    else:
        lm, (model, processor) = build_idefics3(), tiny_idefics3()
    prompts = asked()
    encoded = lm.encode(prompts, ANSWERS)
    with torch.no_grad():
        together = lm.answer_loss(encoded.tokens, encoded.answers)
    for row, (prompt, answer) in enumerate(zip(prompts, ANSWERS, strict=True)):
        logits = theirs(model, processor, prompt, answer)
        said = [*processor.tokenizer(answer, add_special_tokens=False).input_ids, lm.ends[0]]
        slow = F.cross_entropy(logits[-len(said) :], torch.tensor(said), reduction="sum")
        torch.testing.assert_close(together[row], slow, rtol=1e-5, atol=1e-4)


def test_a_picture_decides_the_answer_and_padding_does_not() -> None:
    lm = build()
    first, other = with_pictures([ASKED[0]] * 2, [picture(1), picture(9)])
    alone = lm.logits(lm.encode([first]).tokens)[0, -1]
    beside = lm.logits(lm.encode([first, asked()[2]]).tokens)[0, -1]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone, lm.logits(lm.encode([other]).tokens)[0, -1], atol=0.1)
    looked = [FINAL(lm, lm.encode([one]).tokens) for one in (first, other)]
    assert not torch.allclose(*looked, atol=1e-3)
    counts = PromptLook(("tokens",))
    assert torch.equal(counts(lm, lm.encode([first]).tokens), counts(lm, lm.encode([other]).tokens))


def test_text_alone_is_read_as_its_language_tower_reads_it() -> None:
    lm, model = build(), tiny_llava()
    tokens = lm.encode(["abc"]).tokens
    with torch.no_grad():
        tower = model.model.language_model(input_ids=tokens).last_hidden_state
    assert torch.equal(lm.hidden(tokens), tower)


def test_greedy_answers_are_those_of_transformers_one_by_one() -> None:
    lm, model, processor = build(), tiny_llava(), tiny_processor()
    prompts = asked()
    answers = lm.generate(lm.encode(prompts).tokens, most=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        slow: list[int] = []
        for _ in range(6):
            text = processor.tokenizer.decode(slow) if slow else ""
            following = int(theirs(model, processor, prompt, text)[-1].argmax())
            if following in (*lm.ends, lm.picture_id):
                break
            slow.append(following)
        assert answer[: len(slow)] == slow


def test_adapters_change_the_language_tower_as_merged_weights_do() -> None:
    lm, merged = build().double(), tiny_llava().double()
    layout = Layout(lm.sites(("q", "down")), rank=2)
    flat = 0.3 * torch.randn(1, layout.numel, dtype=torch.float64)
    values = AdapterValues.from_flat(flat, layout, 2.0)
    parts = {
        one.name: flat[0, one.offset : one.offset + one.numel].view(one.shape)
        for one in layout.segments
    }
    for site in layout.sites:
        a, b = parts[f"{site.name}.lora_A"], parts[f"{site.name}.lora_B"]
        merged.get_submodule(site.name).weight.data += 2.0 * b @ a
    (prompt,) = with_pictures([ASKED[0]], [picture(1)])
    tokens = lm.encode([prompt]).tokens
    expected = theirs(merged, _double(tiny_processor()), prompt)
    torch.testing.assert_close(lm.logits(tokens, every(values))[0], expected)
    zero = AdapterValues.from_flat(0 * flat, layout, 2.0)
    assert torch.equal(lm.logits(tokens, every(zero)), lm.logits(tokens))
    assert all(site.name.startswith("model.language_model.layers.") for site in layout.sites)


def _double(processor: Any) -> Any:
    def made(**given: Any) -> Any:
        found = processor(**given)
        found["pixel_values"] = found["pixel_values"].double()
        return found

    made.tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    return made


def test_a_chat_has_its_pictures_where_the_marks_were() -> None:
    processor = tiny_processor()
    processor.chat_template = (
        "u:{% for one in messages[0].content %}{% if one.type == 'image' %}<image>{% else %}"
        "{{ one.text }}{% endif %}{% endfor %}."
    )
    chat = LIMITS.model_copy(update={"chat": True})
    lm = PicturedLM(tiny_llava(), processor, "hf:tiny", chat)
    prompts = with_pictures(["is <image> it:", "abc"], [picture(1), None])
    said = lm.encode(prompts).tokens
    plain = tiny_processor()
    beside = plain(
        text=["u:is <image> it:."],
        images=[[picture(1)]],
        add_special_tokens=False,
        return_tensors="pt",
    )
    assert torch.equal(lm.ids(said[:1]), beside["input_ids"])
    assert lm.decode(said[1][said[1] != PAD].tolist()) == "u:abc."
    with pytest.raises(ConfigError, match="no chat template"):
        PicturedLM(tiny_llava(), tiny_processor(), "hf:tiny", chat)


def test_a_long_prompt_loses_text_and_never_a_picture() -> None:
    lm = build(TextSettings(prompt_tokens=PLACES + 8, answer_tokens=16))
    (prompt,) = with_pictures([f"a{MARK}bcdefghijkl"], [picture(1)])
    encoded = lm.encode([prompt])
    row = encoded.tokens[0]
    assert (encoded.cut_prompts, len(row), int((row < PAD).sum())) == (1, PLACES + 8, PLACES)
    assert lm.decode(row[row >= 0].tolist()) == "aghijkl"
    (behind,) = with_pictures([f"abcdefghij{MARK}k"], [picture(1)])
    with pytest.raises(DataError, match="20 tokens up to the end of its last picture") as refused:
        lm.encode([behind])
    wider = str(refused.value.remedy).split("=")[1].split(",")[0]
    assert build(TextSettings(prompt_tokens=int(wider), answer_tokens=16)).encode([behind])


def test_a_folder_is_found_to_be_one_of_images_and_text(tmp_path: Path) -> None:
    write_tiny_llava(tmp_path)
    name = f"hf:{tmp_path}"
    lm = create_causal_lm(BackboneSettings(name=name), LIMITS)
    assert isinstance(lm, PicturedLM)
    assert len(lm.sha256) == 64
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    (prompt,) = with_pictures([ASKED[0]], [picture(1)])
    ours = lm.logits(lm.encode([prompt]).tokens)[0]
    torch.testing.assert_close(ours, theirs(model, processor, prompt), rtol=1e-5, atol=1e-4)
    counted = footprint_of(
        BackboneSettings(name=name, targets=("q", "k", "v", "o")),
        rank=1,
        tasks=1,
        gate=AtomGate(topk=2),
        text=LIMITS,
    )
    assert counted.parameters == model.num_parameters()
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(NotFoundError, match="no processor of images and text"):
        create_causal_lm(BackboneSettings(name=name), LIMITS)


def test_models_that_are_not_expressed_are_refused_by_name() -> None:
    model = tiny_llava()
    model.config.text_config.model_type = "opt"
    with pytest.raises(ConfigError, match=r"LlavaForConditionalGeneration.*\(opt\)") as refused:
        PicturedLM(model, tiny_processor(), "hf:other", LIMITS)
    assert "LLaVA" in str(refused.value.expected)

    class WithTypes:
        """A processor that says of every token what it is, as Gemma 3 is told."""

        tokenizer = tiny_processor().tokenizer
        image_token = MARK

        def __call__(self, **given: Any) -> Any:
            made = tiny_processor()(**given)
            return {**made, "token_type_ids": made["input_ids"]}

    with pytest.raises(ConfigError, match="told of pictures by token_type_ids"):
        PicturedLM(tiny_llava(), WithTypes(), "hf:other", LIMITS)


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ("what is it:", picture(1), "1 pictures .* and 0 marks <image>"),
        (f"{MARK} what:", None, "0 pictures and 1 marks"),
        (f"{MARK}{MARK}", picture(1), "1 pictures .* and 2 marks"),
    ],
)
def test_every_picture_has_its_mark(prompt: str, images: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        build().encode(with_pictures([prompt], [images]))


def test_what_cannot_be_seen_is_refused(tmp_path: Path) -> None:
    lm = build()
    with pytest.raises(DataError, match="answer 1 has the mark of a picture"):
        lm.encode(["abc"], [MARK])
    with pytest.raises(NotFoundError, match=r"no image .*gone\.png"):
        lm.encode(with_pictures([MARK], [tmp_path / "gone.png"]))
    picture(1).save(tmp_path / "whole.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    with pytest.raises(DataError, match=r"broken\.png"):
        lm.encode(with_pictures([MARK], [broken]))
    with pytest.raises(DataError, match="images for 2 prompts, and 1 prompts"):
        with_pictures([MARK], [picture(1), picture(2)])
    with pytest.raises(DataError, match="float64"):
        with_pictures([MARK], [torch.zeros(4, 4, 3, dtype=torch.float64)])
    tokens = lm.encode(with_pictures([MARK], [picture(1)])).tokens
    assert lm.logits(tokens).isfinite().all()
    lm.encode(with_pictures([MARK] * KEPT_ALBUMS, [picture(2)] * KEPT_ALBUMS))
    with pytest.raises(DataError, match="the pictures of these tokens are gone"):
        lm.logits(tokens)
    several = with_pictures([MARK * 2], [[picture(1), picture(2)]])
    with pytest.raises(ConfigError, match="beams"):
        lm.generate(lm.encode(several).tokens, most=2, beams=2)


class Counted:
    """A picture that tells `read` when it is decoded."""

    def __init__(self, seed: int, read: list[int]) -> None:
        self.name = self.sha256 = f"picture {seed}"
        self.seed, self.read = seed, read

    def rgb(self) -> Image.Image:
        self.read.append(self.seed)
        return picture(self.seed)


@pytest.mark.parametrize(("room", "ready"), [(0, [4]), (2, [1, 4]), (3, [3, 1, 4])])
def test_pictures_that_there_is_no_room_for_are_made_ready_again(
    room: int, ready: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    texts = [MARK, MARK, MARK, f"{MARK}a", MARK]
    pictures = [Counted(seed, read) for seed in (1, 2, 3, 1, 4)]
    prompts = [Prompt(text, [one]) for text, one in zip(texts, pictures, strict=True)]
    whole = build()
    plain = whole.logits(whole.encode(prompts).tokens)
    monkeypatch.setattr(pictured, "KEPT_BYTES", room * SIDE * SIDE * 3 * 4)
    lm = build()
    tokens = lm.encode(prompts).tokens
    assert torch.equal(lm.logits(tokens), plain)
    read.clear()
    lm.logits(tokens[-len(ready) :])
    assert not read
    lm.logits(tokens[1:2])
    assert read == [2]


def test_a_model_of_text_alone_refuses_pictures(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    lm = create_causal_lm(BackboneSettings(name=f"hf:{tmp_path}"), TextSettings())
    assert not isinstance(lm, PicturedLM)
    with pytest.raises(DataError, match="is a model of text alone"):
        lm.encode(with_pictures(["abc"], [picture(1)]))


def test_a_prompt_is_its_text_and_its_pictures() -> None:
    one, same, other = with_pictures(["a"] * 3, [picture(1), picture(1), picture(2)])
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != "a"
    assert one not in ("a", other)
    assert copy.deepcopy(one) == one
    assert isinstance(one.upper(), str)
    assert with_pictures(["a"], [Image.new("L", (8, 8))]) != ["a"]
