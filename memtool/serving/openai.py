"""Completions and chats as clients of OpenAI's API ask for them, streamed or at once."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from memtool.backbones.answering import Wish
from memtool.errors import ConfigError, MemtoolError
from memtool.methods.attached import AttachedTexts
from memtool.serving.errors import document, of_error
from memtool.serving.models import AUTO, Model
from memtool.serving.service import Service
from memtool.serving.texts import Prompt, Said

Text = Annotated[str, StringConstraints(min_length=1)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
"""What is not done here, with the values under which nobody misses it."""


class Sampled(BaseModel):
    """How answers are drawn."""

    model: Text = AUTO
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, neutral in NEUTRAL.items():
                value = given.get(name)
                if value is not None and value not in neutral:
                    raise ValueError(f"{name} is not supported")
        return given

    @property
    def stops(self) -> tuple[str, ...]:
        """The words that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Generate(Sampled):
    """Prompts to be answered greedily, where `temperature` says nothing else."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text | None = None
    prompts: Annotated[list[Text], Field(min_length=1)] | None = None
    temperature: float = Field(0.0, ge=0, le=10, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_of_both(self) -> Generate:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("one of prompt and prompts")
        return self

    def all_prompts(self) -> list[str]:
        """The prompts, one or several."""
        return self.prompts or [self.prompt or ""]


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool = False


class Streamed(Sampled):
    """Answers that may be streamed."""

    stream: bool = False
    stream_options: StreamOptions | None = None


class Completion(Streamed):
    """Prompts to be completed."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)]


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template reads it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class Chat(Streamed):
    """A conversation to be continued."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


async def prompt_of(
    service: Service,
    model: Model,
    asked: str | Sequence[dict[str, str]],
    how: Sampled,
    told: Callable[[str], None] | None = None,
) -> Prompt:
    """A prompt or a conversation, ready to be answered.

    Raises DataError for one that cannot be read, ConfigError for more tokens than the context has.
    """
    assert isinstance(model.ready, AttachedTexts)
    lm = model.ready.backbone
    tokens = await service.encode(model, asked)
    most = how.max_tokens
    if isinstance(how, Chat):
        most = how.max_completion_tokens or most
    left = lm.context - tokens.shape[1]
    if most is not None and most > left:
        raise ConfigError(
            f"max_tokens of {most} behind a prompt of {tokens.shape[1]} tokens",
            expected=f"at most {left}: the context of the model is {lm.context}",
        )
    wish = Wish(
        most=most or min(lm.answer_tokens, left),
        temperature=how.temperature,
        top_p=how.top_p,
        seed=how.seed,
        stop=how.stops,
    )
    return Prompt(model, asked if isinstance(asked, str) else None, tokens, wish, told)


def add(app: FastAPI, service: Service) -> None:
    """The routes."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What `model` may be; also NAME@VERSION and NAME@VERSION:ADAPTER of the memory."""
        version = service.models.current.version
        one = {"object": "model", "created": 0, "owned_by": "memtool", "version": version}
        return {"object": "list", "data": [{"id": id, **one} for id in service.models.names()]}

    @app.post("/v1/completions")
    async def completions(request: Request, asked: Completion) -> Response:
        """Completions of prompts, as OpenAI's."""
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        return await _Answer("cmpl", service, asked, prompts).respond(request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: Chat) -> Response:
        """The next message of a conversation, by the tokenizer's chat template."""
        said = [message.plain for message in asked.messages]
        return await _Answer("chatcmpl", service, asked, [said]).respond(request)


def named(weights: dict[str, float]) -> list[dict[str, Any]]:
    """Weights of adapters as they are told."""
    return [{"adapter": name, "weight": weight} for name, weight in weights.items()]


Parts = asyncio.Queue[tuple[int, str | None]]
"""Pieces of the answers to several prompts, each with the index of its prompt; None ends one."""


class _Answer:
    """The answer to one request: whole, or as a stream of server-sent events."""

    def __init__(
        self,
        kind: Literal["cmpl", "chatcmpl"],
        service: Service,
        asked: Streamed,
        prompts: Sequence[str | Sequence[dict[str, str]]],
    ) -> None:
        self._service, self._asked, self._prompts = service, asked, prompts
        self._chat = kind == "chatcmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time())}

    async def respond(self, request: Request) -> Response:
        """The response."""
        service, asked = self._service, self._asked
        service.require("texts")
        if not asked.stream:
            async with service.room_for(len(self._prompts)):
                works = await self._works(None)
                found = await service.answered(request, works)
            choices = [self._whole(index, said) for index, said in enumerate(found)]
            return JSONResponse({**self._head, "choices": choices, "usage": _usage(found)})
        parts: Parts = asyncio.Queue()
        async with service.room_for(len(self._prompts)):
            works = await self._works(parts)
        service.start(works)  # nothing runs between: the room is still there
        return StreamingResponse(self._events(works, parts), media_type="text/event-stream")

    async def _works(self, parts: Parts | None) -> list[Prompt]:
        service, asked = self._service, self._asked
        model = await service.models.named(asked.model)
        self._head |= {
            "object": "chat.completion" if self._chat else "text_completion",
            "model": asked.model,
            "version": model.version,
        }
        return [
            await prompt_of(
                service, model, one, asked, None if parts is None else _teller(parts, index)
            )
            for index, one in enumerate(self._prompts)
        ]

    def _whole(self, index: int, said: Said) -> dict[str, Any]:
        words: dict[str, Any] = (
            {"message": {"role": "assistant", "content": said.text}}
            if self._chat
            else {"text": said.text}
        )
        more = {"finish_reason": said.ended, "logprobs": None, "weights": named(said.weights)}
        return {"index": index, **words, **more}

    async def _events(self, works: Sequence[Prompt], parts: Parts) -> AsyncIterator[str]:
        """One event for every piece of text, one for every end, and `[DONE]`."""
        if self._chat:
            self._head["object"] = "chat.completion.chunk"
            yield self._event(0, {"role": "assistant", "content": ""})
        for index, work in enumerate(works):
            work.future.add_done_callback(_end(parts, index))
        found: list[Said] = []
        try:
            async with asyncio.timeout(self._service.limits.timeout):
                while len(found) < len(works):
                    index, text = await parts.get()
                    if text is not None:
                        yield self._event(index, {"content": text} if self._chat else text)
                        continue
                    said = works[index].future.result()
                    found.append(said)
                    yield self._event(index, {} if self._chat else "", said.ended)
            options = self._asked.stream_options
            if options is not None and options.include_usage:
                yield _line({**self._head, "choices": [], "usage": _usage(found)})
        except TimeoutError:
            limit = self._service.limits.timeout
            yield _line(document(f"no whole answer in {limit:g} s", 504, code="timeout"))
        except MemtoolError as error:
            yield _line(of_error(error, self._service.models.hidden))
        finally:
            for work in works:
                if not work.future.done():
                    work.drop()
        yield "data: [DONE]\n\n"

    def _event(self, index: int, piece: Any, ended: str | None = None) -> str:
        words = {"delta": piece} if self._chat else {"text": piece}
        choice = {"index": index, **words, "finish_reason": ended, "logprobs": None}
        return _line({**self._head, "choices": [choice]})


def _teller(parts: Parts, index: int) -> Callable[[str], None]:
    return lambda text: parts.put_nowait((index, text))


def _end(parts: Parts, index: int) -> Callable[[object], None]:
    return lambda _: parts.put_nowait((index, None))


def _line(found: dict[str, Any]) -> str:
    return f"data: {json.dumps(found)}\n\n"


def _usage(found: Sequence[Said]) -> dict[str, int]:
    asked = sum(said.asked_tokens for said in found)
    answered = sum(said.said_tokens for said in found)
    return {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
    }
