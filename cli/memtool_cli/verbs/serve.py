"""serve: a memory over HTTP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from memtool.errors import ConfigError
from memtool_cli import records
from memtool_cli.commands import Verbs
from memtool_cli.options import COMPUTE, CONFIGURATION, METHOD, STORE, Call, examples, verb
from memtool_cli.output import Table

if TYPE_CHECKING:
    from memtool.serving.models import Models

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


@app.command(
    "serve",
    epilog=examples(
        "memtool serve",
        "memtool serve --store memory@good --port 8080",
        "MEMTOOL_API_KEY=… memtool serve --host 0.0.0.0 --watch",
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
) -> None:
    """Serve the memory over HTTP: predictions, answers of a language model, metrics and a page."""
    try:
        from memtool.serving.limits import Limits
        from memtool.serving.run import address_of, bound, hosts_of, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"memtool serve needs a package that is not here: {error.name}",
            remedy="pip install 'memtool[serve]'",
        ) from error
    view = call.view()
    with bound(host, port) as listening:
        url = address_of(listening)
        limits = Limits(
            window=window * MS,
            batch=batch,
            body=round(max_body * MB),
            queue=queue,
            timeout=timeout,
            key=api_key,
            origins=tuple(cors or ()),
            hosts=hosts_of(host, listening),
            watch=watch,
        )
        if limits.hosts is None and api_key is None:
            call.out.note(f"note: whoever reaches {url} is answered; --api-key asks for a key")
        call.out.note(f"loading {call.config.store}, version {view.version}")
        models = _models(call)

        def ready() -> None:
            record = records.Serving(version=models.current.version, memory=models.name, url=url)
            rows = [(record.url, record.memory, record.version)]
            call.out.data(record, Table(("url", "memory", "version"), rows), ids=[url])
            call.out.note("Ctrl-C stops it")

        serve(models, limits, listening, ready)
        call.out.note("stopped: what was asked is answered")


def _models(call: Call) -> Models:
    """The memory as this command line opens it, each version with what it remembers."""
    from memtool.engine import Engine
    from memtool.memory import Memory
    from memtool.serving.models import Models

    store, small = call.store_path, call.config.backbone.name == "nano"
    engine = Engine(call.config.engine, threads=1 if small else None)

    def opened(version: str) -> Memory:
        here = replace(call, given={**call.given, "store": f"{store}@{version}"})
        return Memory(here.store(), here.view(), here.config)

    return Models(
        call.config.store, opened=opened, precision=engine.precision, device=str(engine.device)
    )
