"""serve: a memory over HTTP."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from memtool.errors import ConfigError
from memtool_cli import records
from memtool_cli.commands import Verbs
from memtool_cli.on_ray import RAY, RayAddress, Resources
from memtool_cli.options import COMPUTE, CONFIGURATION, METHOD, STORE, Call, examples, verb
from memtool_cli.output import Table

if TYPE_CHECKING:
    from memtool.serving.limits import Limits
    from memtool.serving.models import Models
    from memtool.serving.replicas import Count

app = Verbs()

MS, MB = 1e-3, 1_000_000

SERVICE, ALLOWED = "Service", "What is allowed"


Host = Annotated[
    str,
    typer.Option("--host", metavar="HOST", help="Where to listen.", rich_help_panel=SERVICE),
]
Port = Annotated[
    int,
    typer.Option(
        "--port",
        metavar="PORT",
        min=0,
        max=65535,
        help="0 takes a free one.",
        rich_help_panel=SERVICE,
    ),
]
Watch = Annotated[
    bool,
    typer.Option(
        "--watch",
        help="Take new versions up by itself, of HEAD or of the branch that --store names.",
        rich_help_panel=SERVICE,
    ),
]
Window = Annotated[
    float,
    typer.Option(
        "--window",
        metavar="MS",
        min=0,
        max=10_000,
        help="How long the first of a batch waits for others.",
        rich_help_panel=SERVICE,
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        help="Images or prompts of one pass at most.",
        rich_help_panel=SERVICE,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="MEMTOOL_API_KEY",
        help="What clients must know, and what POST /reload needs.",
        rich_help_panel=ALLOWED,
    ),
]
Origins = Annotated[
    list[str] | None,
    typer.Option(
        "--cors",
        metavar="ORIGIN",
        help="A web page of another host that may ask; may be repeated.",
        rich_help_panel=ALLOWED,
    ),
]
Body = Annotated[
    float,
    typer.Option(
        "--max-body",
        metavar="MB",
        min=0.001,
        max=10_000,
        help="Size of a request.",
        rich_help_panel=ALLOWED,
    ),
]
Waiting = Annotated[
    int,
    typer.Option(
        "--queue",
        metavar="N",
        min=1,
        help="Images or prompts that may wait; beyond, the answer is 503.",
        rich_help_panel=ALLOWED,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0.1,
        max=86_400,
        help="Until a request is given up.",
        rich_help_panel=ALLOWED,
    ),
]
Replicas = Annotated[
    int | None,
    typer.Option(
        "--replicas",
        metavar="N",
        min=1,
        max=1000,
        help="How many serve it, each with its own models and batches; else 1.",
        rich_help_panel=RAY,
        show_default=False,
    ),
]
Autoscale = Annotated[
    str | None,
    typer.Option(
        "--autoscale",
        metavar="MIN:MAX",
        help="As many as there is work for: --batch requests at once for each.",
        rich_help_panel=RAY,
        show_default=False,
    ),
]


@app.command(
    "serve",
    epilog=examples(
        "memtool serve",
        "memtool serve --store memory@good --port 8080",
        "MEMTOOL_API_KEY=… memtool serve --host 0.0.0.0 --watch",
        "memtool serve --ray auto --replicas 4 --resources gpu=1",
    ),
)
@verb(STORE, METHOD, *COMPUTE, *CONFIGURATION, remembers=True)
def serve_memory(
    call: Call,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    watch: Watch = False,
    window: Window = 5.0,
    batch: Batch = 64,
    api_key: ApiKey = None,
    cors: Origins = None,
    max_body: Body = 32.0,
    queue: Waiting = 512,
    timeout: Timeout = 60.0,
    ray: RayAddress = None,
    replicas: Replicas = None,
    autoscale: Autoscale = None,
    resources: Resources = None,
) -> None:
    """Serve the memory over HTTP: predictions, answers of a language model, metrics and a page."""
    try:
        from memtool.serving.limits import Limits
    except ModuleNotFoundError as error:
        raise _needs(error) from error
    limits = Limits(
        window=window * MS,
        batch=batch,
        body=round(max_body * MB),
        queue=queue,
        timeout=timeout,
        key=api_key,
        origins=tuple(cors or ()),
        watch=watch,
    )
    try:
        if ray is None:
            _require_ray_for(replicas=replicas, autoscale=autoscale, resources=resources)
            _serve_here(call, limits, host, port)
        else:
            from memtool.cluster import resources as read
            from memtool.serving.replicas import Count

            count = Count.of(replicas, autoscale)
            _serve_on_ray(call, limits, host, port, ray, count, read(resources))
    except ModuleNotFoundError as error:
        raise _needs(error) from error
    call.out.note("stopped: what was asked is answered")


def _needs(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f"memtool serve needs a package that is not here: {error.name}",
        remedy="pip install 'memtool[serve]'",
    )


def _require_ray_for(**given: object) -> None:
    """Raise ConfigError for an option of replicas, where there are none."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"--{name} without --ray", remedy=f"--ray auto --{name} {value}")


def _serve_here(call: Call, limits: Limits, host: str, port: int) -> None:
    from memtool.serving.run import address_of, bound, hosts_of, serve

    view = call.view()
    with bound(host, port) as listening:
        limits = replace(limits, hosts=hosts_of(host, listening.getsockname()[0]))
        url = address_of(listening)
        _say_who_may_ask(call, limits, url)
        call.out.note(f"loading {call.config.store}, version {view.version}")
        models = _models(call)
        serve(
            models,
            limits,
            listening,
            lambda: _say_ready(call, models.current.version, models.name, url),
        )


def _serve_on_ray(
    call: Call,
    limits: Limits,
    host: str,
    port: int,
    address: str,
    count: Count,
    resources: dict[str, float],
) -> None:
    from memtool.serving.models import name_of
    from memtool.serving.replicas import Fleet, serve_on_ray

    version = call.view().version
    name = name_of(call.store_path)
    opened = partial(_models, replace(call))  # a fresh one: what it found out stays here
    fleet = Fleet(opened, call.config, limits, count, resources)
    stdout = sys.stdout

    def ready(limits: Limits, url: str) -> None:
        _say_who_may_ask(call, limits, url)
        with redirect_stdout(stdout):
            _say_ready(call, version, name, url)

    call.out.note(f"{count.text} of {call.config.store}, version {version}, begin at {address}")
    serve_on_ray(fleet, address, version, host, port, say=call.out.note, ready=ready)


def _say_who_may_ask(call: Call, limits: Limits, url: str) -> None:
    if limits.hosts is None and limits.key is None:
        call.out.note(f"note: whoever reaches {url} is answered; --api-key asks for a key")


def _say_ready(call: Call, version: str, memory: str, url: str) -> None:
    record = records.Serving(version=version, memory=memory, url=url)
    rows = [(record.url, record.memory, record.version)]
    call.out.data(record, Table(("url", "memory", "version"), rows), ids=[url])
    call.out.note("Ctrl-C stops it")


def _models(call: Call, version: str | None = None) -> Models:
    """The memory as this command line opens it, each version with what it remembers.

    `version` is the first, where it is not the one that the store is named with.
    """
    from memtool.engine import Engine
    from memtool.memory import Memory
    from memtool.serving.models import Models

    store, small = call.store_path, call.config.backbone.name == "nano"
    engine = Engine(call.config.engine, threads=1 if small else None)

    def opened(version: str) -> Memory:
        here = replace(call, given={**call.given, "store": f"{store}@{version}"})
        return Memory(here.store(), here.view(), here.config)

    return Models(
        call.config.store,
        opened=opened,
        version=version,
        precision=engine.precision,
        device=str(engine.device),
    )
