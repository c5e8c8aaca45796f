"""A collection of LoRA over HTTP: unlike adapters in one pass, as OpenAI's clients ask."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from memtool.backbones.answering import Growing, Wish
from memtool.config import resolve
from memtool.methods.attached import AttachedTexts
from memtool.methods.mira.prompts import PromptMemory
from memtool.serving.models import Models
from tests.methods.facts import settings_of
from tests.methods.test_collection import PROMPTS, SHAPES, write_collection
from tests.serving.served import Served, served

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)
ASKED = [PROMPTS[name][1] for name in SHAPES]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = write_collection(tmp_path_factory.mktemp("collection"))
    settings = settings_of(folder, folder)
    del settings["text.epochs"]
    config = resolve(preset="mira-trace", overrides=settings, ambient=False).config
    method = PromptMemory.open(config, seed=0)
    method.collect([str(folder / "adapters")], folder / "prompts.jsonl")
    method.consolidate()
    return Models(str(folder / "memory"))


@pytest.fixture(scope="module")
def model(models: Models) -> AttachedTexts:
    assert isinstance(models.current.ready, AttachedTexts)
    return models.current.ready


@pytest.fixture(scope="module")
def at(models: Models) -> Iterator[Served]:
    """A service whose batches are of all that is asked within a fifth of a second."""
    with served(models, window=0.2, batch=16) as found:
        yield found


def events(at: Served, path: str, body: dict[str, Any]) -> list[Any]:
    """The documents of a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", at.port, timeout=30)
    connection.request(
        "POST", path, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"}
    )
    reply = connection.getresponse()
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.read()
    lines = [line for line in reply.read().decode().split("\n\n") if line]
    connection.close()
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_generate_says_what_the_attached_model_says(
    at: Served, models: Models, model: AttachedTexts
) -> None:
    texts, weights = model.answered(ASKED, most=4)
    reply = at.ask("/v1/generate", {"prompts": ASKED, "max_tokens": 4})
    assert reply.status == 200, reply.text
    assert reply.json["version"] == models.current.version
    answers = reply.json["answers"]
    assert [one["prompt"] for one in answers] == ASKED
    assert [one["text"] for one in answers] == texts
    assert [one["weights"][0]["adapter"] for one in answers] == list(SHAPES)
    told = at.ask("/v1/weights", {"prompts": ASKED}).json["weights"]
    for one, row in zip(told, weights.tolist(), strict=True):
        shares = {share["adapter"]: share["weight"] for share in one["weights"]}
        for name, weight in zip(model.names, row, strict=True):
            assert shares.get(name, 0.0) == pytest.approx(weight, abs=1e-3)


def test_unlike_models_answer_in_one_pass_as_alone(at: Served, models: Models) -> None:
    version = models.current.version
    wanted = ["auto", *SHAPES, f"memory@{version}:sums", "auto"]
    bodies = [
        {"model": name, "prompt": prompt, "max_tokens": 5, "temperature": 0.9, "seed": number}
        for number, (name, prompt) in enumerate(zip(wanted, ASKED * 2, strict=True))
    ]
    alone = [at.ask("/v1/completions", body).json["choices"][0] for body in bodies]
    before = at.metric("memtool_batch_size_count")
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: at.ask("/v1/completions", body), bodies))
    assert at.metric("memtool_batch_size_count") - before <= 2
    for body, reply, one in zip(bodies, replies, alone, strict=True):
        (choice,) = reply.json["choices"]
        assert choice["text"] == one["text"]
        assert reply.json["model"] == body["model"]
        if body["model"] != "auto":
            name = str(body["model"]).rpartition(":")[2]
            assert choice["weights"] == [{"adapter": name, "weight": 1.0}]
    assert len({one["text"] for one in alone}) > 1


def test_a_prompt_is_looked_at_once_and_its_answer_told_with_the_weights(
    at: Served, model: AttachedTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    routing: Any = model.routing
    weighed = routing.weighed

    def counted(lm: Any, prompts: Any) -> Any:
        looks.append(len(prompts))
        return weighed(lm, prompts)

    monkeypatch.setattr(routing, "weighed", counted)
    before = at.metric("memtool_inputs_total")
    reply = at.ask("/v1/generate", {"prompts": ASKED, "max_tokens": 2})
    assert [one["weights"][0]["adapter"] for one in reply.json["answers"]] == list(SHAPES)
    assert looks == [len(ASKED)]
    assert at.metric("memtool_inputs_total") - before == len(ASKED)


def test_draws_follow_the_seed_and_the_temperature(at: Served) -> None:
    def said(**how: Any) -> str:
        body = {"prompt": ASKED[0], "max_tokens": 6, **how}
        reply = at.ask("/v1/completions", body)
        assert reply.status == 200, reply.text
        return str(reply.json["choices"][0]["text"])

    greedy = said(temperature=0)
    assert said(temperature=1.5, seed=3) == said(temperature=1.5, seed=3)
    assert len({said(temperature=1.5, seed=seed) for seed in range(4)}) > 1
    assert said(temperature=1.5, top_p=1e-9, seed=1) == greedy
    assert said(temperature=0, stop=[greedy[2:4], "nothing"]) == greedy[:2]


def test_a_stream_is_the_whole_in_pieces(at: Served) -> None:
    body = {"prompt": ASKED[:2], "max_tokens": 6, "temperature": 0}
    whole = at.ask("/v1/completions", body).json
    found = events(at, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    for index, choice in enumerate(whole["choices"]):
        own = [c for one in found for c in one["choices"] if c["index"] == index]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own][-1] == choice["finish_reason"] == "length"
        assert len(own) > 2
    assert found[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 12
    assert {one["id"] for one in found} == {found[0]["id"]}


def test_a_chat_needs_a_template(
    at: Served, model: AttachedTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": ASKED[0]}]}]
    body = {"model": "sums", "messages": messages, "temperature": 0, "max_tokens": 4}
    refused = at.ask("/v1/chat/completions", body)
    assert (refused.status, refused.json["error"]["code"]) == (400, "config")
    assert "no chat template" in refused.error
    monkeypatch.setattr(model.backbone.tokenizer, "chat_template", TEMPLATE)
    whole = at.ask("/v1/chat/completions", body).json
    same = {"model": "sums", "prompt": f"user: {ASKED[0]}\nassistant:"} | {
        key: body[key] for key in ("temperature", "max_tokens")
    }
    message = whole["choices"][0]["message"]
    found = at.ask("/v1/completions", same).json["choices"][0]
    assert message == {"role": "assistant", "content": found["text"]}
    pieces = events(at, "/v1/chat/completions", body)
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [one["choices"][0]["delta"].get("content", "") for one in pieces]
    assert "".join(deltas) == message["content"]
    long = [{"role": "user", "content": "a" * 500}]
    assert at.ask("/v1/chat/completions", body | {"messages": long}).status == 422
    monkeypatch.setattr(
        model.backbone.tokenizer, "chat_template", "{{ raise_exception('first the user') }}"
    )
    assert "first the user" in at.ask("/v1/chat/completions", body).error


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {"prompt": "x", "model": "poems"}, 404, "no model 'poems'"),
        ("/v1/completions", {"prompt": "x", "model": "memory@gone"}, 404, "'gone'"),
        ("/v1/completions", {"prompt": "x", "model": "memory@HEAD:poems"}, 404, "'poems'"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 999}, 400, "max_tokens of 999"),
        ("/v1/completions", {"prompt": "x", "n": 2}, 400, "n is not supported"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"prompt": "x", "top_p": 0}, 400, "top_p"),
        ("/v1/completions", {"prompt": "x", "stop": [""]}, 400, "stop"),
        ("/v1/completions", {"prompt": "x", "seed": 2**70}, 400, "seed"),
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"prompt": "\ud800"}, 400, "prompt"),
        ("/v1/completions", {"prompt": ["x"] * 600}, 413, "600 inputs"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "me", "content": ""}]}, 400, "role"),
        ("/v1/generate", {"prompt": "x", "prompts": ["x"]}, 400, "one of prompt and prompts"),
        ("/v1/weights", {"prompts": []}, 400, "prompts"),
        ("/v1/predict", {"images": ["QUJD"]}, 400, "reads texts, not images"),
    ],
    ids=range(17),
)
def test_what_cannot_be_is_refused(
    at: Served, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    reply = at.ask(path, body)
    assert reply.status == status, reply.text
    assert said in reply.error


def test_what_may_begin_a_stop_word_is_kept_back(model: AttachedTexts) -> None:
    lm = model.backbone
    ids = lm.tokenizer("ab abcab", add_special_tokens=False).input_ids

    def grown(stop: tuple[str, ...]) -> tuple[list[str], Growing]:
        growing, pieces = Growing(lm, Wish(most=8, stop=stop)), []
        for token in ids:
            scores = torch.zeros(lm.model.config.vocab_size)
            scores[token] = 1.0
            growing.grow(scores)
            pieces.append(growing.certain())
        return pieces, growing

    pieces, growing = grown(("abc",))
    assert "".join(pieces) == growing.text == "ab "
    assert (growing.ended, growing.tokens) == ("stop", 6)
    pieces, growing = grown(())
    assert "".join(pieces) == "ab abcab"
    assert (growing.ended, growing.tokens) == ("length", 8)
