"""The HTTP app over a service: images, texts, reloads, metrics, and the page."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Coroutine
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from memtool import __version__
from memtool.errors import ConfigError, DataError, MemtoolError
from memtool.inference.predictor import Predicted
from memtool.serving import openai
from memtool.serving.errors import invalid, of_error, refusal, status_of
from memtool.serving.forms import parsed
from memtool.serving.guard import GONE, Guard, busy
from memtool.serving.images import Pictures
from memtool.serving.models import AUTO, Model
from memtool.serving.service import Service
from memtool.serving.texts import Prompt
from memtool_stores.printable import printable

MOST_CLASSES = 1000
ADAPTERS_TOLD = 5
"""Adapters of a prediction that are named."""

PAGE = {
    "index.html": "text/html; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}

Text = Annotated[str, StringConstraints(min_length=1)]


class Image(BaseModel):
    """One picture: the bytes of its file, as base64."""

    image: str = Field(description="the bytes of an image file, in base64")
    file: str = Field("", description="what it is called in the answer")


class Images(BaseModel):
    """Pictures to be predicted."""

    model_config = ConfigDict(extra="forbid")

    images: list[Image | str] = Field(min_length=1, description="base64, or {image, file}")
    model: Text = AUTO
    topk: int = Field(1, ge=1, le=MOST_CLASSES, description="classes that are named of each")


class Prompts(BaseModel):
    """Prompts whose weights are asked for."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[Text] = Field(min_length=1)
    model: Text = AUTO


class _Form(BaseModel):
    """The fields of a form beside its files."""

    model_config = ConfigDict(extra="forbid")

    model: Text = AUTO
    topk: int = Field(1, ge=1, le=MOST_CLASSES)


def create_app(service: Service) -> FastAPI:
    """The app of a service, which starts and stops with it."""
    app = FastAPI(
        title="memtool serve",
        version=__version__,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=service.running,
    )
    hidden = service.models.hidden

    async def of_library(_: Request, error: Exception) -> Response:
        assert isinstance(error, MemtoolError)
        status = status_of(error)
        headers = dict(busy("").headers or {}) if status == 503 else None
        return JSONResponse(of_error(error, hidden), status, headers)

    async def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return Response(status_code=GONE) if error.status_code == GONE else refusal(error)

    async def of_values(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError | ValidationError)
        return invalid(error.errors())

    app.add_exception_handler(MemtoolError, of_library)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_values)
    app.add_exception_handler(ValidationError, of_values)
    app.add_middleware(Guard, limits=service.limits, measured=service.metrics.request)
    if service.limits.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.limits.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
        )
    _add_images(app, service)
    _add_texts(app, service)
    _add_care(app, service)
    openai.add(app, service)
    return app


# Images -----------------------------------------------------------------------------------------


def _add_images(app: FastAPI, service: Service) -> None:
    body = {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {
                            "file": {
                                "type": "array",
                                "items": {"type": "string", "format": "binary"},
                            },
                            "topk": {"type": "integer", "default": 1},
                            "model": {"type": "string", "default": AUTO},
                        },
                    }
                },
                "application/json": {"schema": Images.model_json_schema()},
            },
        }
    }

    router = APIRouter(route_class=Bare)

    @router.post("/v1/predict", openapi_extra=body)
    async def predict(request: Request) -> Response:
        """Predictions for pictures: files of a form (field `file`), or base64 in JSON.

        A file that cannot be read has an error in the place of its prediction; where none can be
        read, the answer is 422.
        """
        service.require("images")
        asked, named = await _pictures(request, service)
        model = await service.models.named(asked.model)
        return await _predicted(request, service, model, asked.topk, named)

    app.include_router(router)


class Bare(APIRoute):
    """A route whose endpoint takes the request and nothing else, and is asked without a detour."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint itself."""
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


async def _pictures(
    request: Request, service: Service
) -> tuple[_Form | Images, list[tuple[str, bytes]]]:
    """What is wanted, and the name and bytes of every picture."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await service.parsed(_of_json, await request.body())
    if kind != "multipart/form-data":
        raise HTTPException(415, "expected multipart/form-data with files, or application/json")
    line, most = request.headers["content-type"], service.limits.queue
    return await service.parsed(lambda body: _of_form(body, line, most), await request.body())


def _of_json(body: bytes) -> tuple[Images, list[tuple[str, bytes]]]:
    asked = Images.model_validate_json(body)
    return asked, [_decoded(number, one) for number, one in enumerate(asked.images, start=1)]


def _of_form(body: bytes, content_type: str, most: int) -> tuple[_Form, list[tuple[str, bytes]]]:
    form = parsed(body, content_type, most=most)
    if not form.files:
        raise HTTPException(400, "no file in the form: pictures go in the field `file`")
    return _Form.model_validate(form.fields), form.files


def _decoded(number: int, given: Image | str) -> tuple[str, bytes]:
    """The name and bytes of a picture in JSON. Raises HTTPException for what is no base64."""
    one = Image(image=given) if isinstance(given, str) else given
    name = one.file or f"image {number}"
    _, _, text = one.image.rpartition(",") if one.image.startswith("data:") else ("", "", one.image)
    try:
        return name, base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, f"{printable(name)} is no base64") from error


async def _predicted(
    request: Request,
    service: Service,
    model: Model,
    topk: int,
    named: list[tuple[str, bytes]],
    adapters: int = ADAPTERS_TOLD,
) -> Response:
    async with service.room_for(len(named)):
        decoded = await _decoded_all(service, model, named)
        pixels = [one for one in decoded if not isinstance(one, BaseException)]
        for one in decoded:
            if isinstance(one, BaseException) and (not pixels or not isinstance(one, DataError)):
                raise one
        work = Pictures(model, pixels, topk=topk, adapters=adapters)
        (found,) = await service.answered(request, [work])
    answers = iter(found)
    predictions = [
        {"file": printable(name), **of_error(one, service.models.hidden)}
        if isinstance(one, MemtoolError)
        else _prediction(name, next(answers))
        for (name, _), one in zip(named, decoded, strict=True)
    ]
    return JSONResponse({"version": model.version, "predictions": predictions})


async def _decoded_all(service: Service, model: Model, named: list[tuple[str, bytes]]) -> list[Any]:
    """The pixels of every picture, or the error of one that has none."""
    if len(named) > 1:
        tasks = [service.decode(model, data, name) for name, data in named]
        return await asyncio.gather(*tasks, return_exceptions=True)
    ((name, data),) = named
    try:
        return [await service.decode(model, data, name)]
    except DataError as error:
        return [error]


def _prediction(name: str, found: Predicted) -> dict[str, Any]:
    classes = [{"label": label, "probability": p} for label, p in found.classes]
    return {
        "file": printable(name),
        **classes[0],
        "classes": classes,
        "task": found.task,
        "weights": [
            {"adapter": one.adapter, "task": one.task, "weight": one.weight}
            for one in found.weights
        ],
        "novelty": found.novelty,
        "unlike": found.unlike,
    }


# Texts, and weights of both ---------------------------------------------------------------------


def _add_texts(app: FastAPI, service: Service) -> None:
    @app.post("/v1/generate")
    async def generate(request: Request, asked: openai.Generate) -> Response:
        """Answers to prompts, each with the adapters that it recalled; greedy, unless told."""
        service.require("texts")
        prompts = asked.all_prompts()
        async with service.room_for(len(prompts)):
            model = await service.models.named(asked.model)
            works = [await openai.prompt_of(service, model, one, asked) for one in prompts]
            found = await service.answered(request, works)
        answers = [
            {
                "prompt": prompt,
                "text": said.text.strip(),
                "finish_reason": said.ended,
                "weights": openai.named(said.weights),
            }
            for prompt, said in zip(prompts, found, strict=True)
        ]
        return JSONResponse({"version": model.version, "answers": answers})

    @app.post("/v1/weights")
    async def weights(request: Request) -> Response:
        """The adapters that inputs recall, all of them: pictures as of /v1/predict, or prompts."""
        if service.models.reads == "images":
            wanted, named = await _pictures(request, service)
            model = await service.models.named(wanted.model)
            every = len(model.memory.adapters)
            return await _predicted(request, service, model, wanted.topk, named, adapters=every)
        asked = Prompts.model_validate_json(await request.body())
        async with service.room_for(len(asked.prompts)):
            model = await service.models.named(asked.model)
            works = [
                Prompt(model, one, await service.encode(model, one), None) for one in asked.prompts
            ]
            found = await service.answered(request, works)
        rows = [
            {"prompt": prompt, "weights": openai.named(said.weights)}
            for prompt, said in zip(asked.prompts, found, strict=True)
        ]
        return JSONResponse({"version": model.version, "weights": rows})


# The service itself -----------------------------------------------------------------------------


def _add_care(app: FastAPI, service: Service) -> None:
    models, limits = service.models, service.limits

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """That it answers, with what version, of what; and why a newer one is not taken up."""
        return {
            "status": "ok",
            "version": models.current.version,
            "memory": models.name,
            "reads": models.reads,
            "key": limits.key is not None,
            "queue": service.admitted,
            "watch": service.watching,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(await service.measured(), media_type="text/plain; version=0.0.4")

    @app.post("/reload")
    async def reload() -> Response:
        """Take up the newest version; the one before answers until it is ready.

        Where it cannot be served, the answer says why, and the version before goes on.
        """
        if limits.key is None:
            raise HTTPException(403, "only a service with an API key reloads when asked to")
        try:
            before, now = await service.reload()
        except (MemtoolError, OSError) as error:
            known = error if isinstance(error, MemtoolError) else ConfigError(str(error))
            said = of_error(known, models.hidden)
            return JSONResponse({**said, "version": models.current.version}, 409)
        return JSONResponse({"version": now, "before": before, "changed": now != before})

    def add_file(path: str, name: str) -> None:
        @app.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(_page(name), media_type=PAGE[name])

    add_file("/", "index.html")
    for name in PAGE:
        add_file(f"/page/{name}", name)


@cache
def _page(name: str) -> bytes:
    return files("memtool.serving").joinpath("page", name).read_bytes()
