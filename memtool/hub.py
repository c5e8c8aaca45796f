"""Memories on the Hugging Face Hub: pushed as one commit of a repository, and pulled byte for byte.

    pushed = push("memory", "user/name", private=True)
    pull("user/name", "copy")

A repository holds the files of the store below `memory/`, every whole LoRA adapter of the newest
version as a PEFT directory below `adapters/`, a model card, and of the records that were given a
table, a figure and entries of `.eval_results/`. `memtool_stores.hub` reads it as a store.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from memtool.errors import (
    ChangedMeanwhileError,
    ConfigError,
    MemtoolError,
    MismatchError,
    NotFoundError,
)
from memtool.outside import is_folder, parsed_json
from memtool.progress import Progress, ProgressEvent
from memtool_stores import IntegrityError, MemoryStore, StorageError, hub
from memtool_stores.move import Forwarded, files_of
from memtool_stores.objects import objects_at

if TYPE_CHECKING:
    from memtool.evaluation.record import Record
    from memtool_stores import AdapterRecord, MemoryView

ABOUT = "memtool.json"
"""Says which memory a repository holds, and up to which version."""
ADAPTERS = "adapters"
RESULTS = ".eval_results/memtool.yaml"
FIGURE = "figures/accuracy.png"
CARD = "README.md"
SCHEMA_VERSION = 1

_BEGIN, _END = "<!-- memtool: begin -->", "<!-- memtool: end -->"
_HOSTS_OWN = frozenset({".gitattributes", CARD, "LICENSE"})
"""What a repository may hold before a memory is pushed to it."""
_NEVER_CHANGE = tuple(f"{hub.FOLDER}/ice/{kind}/" for kind in ("chunks", "manifests"))
"""Files of a store whose name was drawn at random: under the same name they are the same."""
_VERSIONS = 20


@dataclass(frozen=True)
class Pushed:
    """What a push made. `commit` is the newest of the repository, made now unless `unchanged`."""

    repository: str
    url: str
    commit: str
    version: str
    adapters: tuple[str, ...]
    files: int
    nbytes: int
    results: int
    private: bool
    unchanged: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Pulled:
    """What a pull brought to `store`. `came` is None for a copy that was made anew."""

    store: MemoryStore
    came: Forwarded | None


def push(
    store: str | Path,
    repository: str,
    *,
    private: bool = False,
    records: Sequence[Record] = (),
    dataset: str | None = None,
    message: str | None = None,
    lock_timeout: float = 30.0,
    progress: Progress | None = None,
) -> Pushed:
    """Publish a memory with all its versions as one commit of `user/name` on the hub.

    The repository is made where there is none; with `private` nothing goes to a public one.
    `records` are measurements of one experiment of this memory. `dataset` is the data set of the
    hub that they measured on; one that the stream was read from is known. Nothing of a push that
    fails can be seen there, but for a repository that it made.

    Raises:
        ConfigError: no token at hand.
        MismatchError: the repository holds something else, or is public and `private` was asked
            for; or the records are of another memory.
        ChangedMeanwhileError: it has versions that this memory has not, or somebody pushed
            meanwhile.
        NotFoundError, StorageError: as of the store and of the hub.
    """
    repository = hub.repository_of(repository)
    tell = _Tell(progress)
    token_of_user(repository)
    opened = MemoryStore.open(store, lock_timeout=lock_timeout)
    for record in records:
        _require_of(opened, record)
    with tempfile.TemporaryDirectory(prefix="memtool-push-") as folder:
        # A copy: whole, checked, and still while it is sent.
        copied = opened.clone(Path(folder) / "memory", tell.of("push: copy"))
        view = copied.view()
        files = [
            (f"{hub.FOLDER}/{path}", Path(copied.url) / path)
            for path in sorted(files_of(objects_at(copied.url), checksums=True))
        ]
        made, notes = _adapters(copied, Path(folder) / ADAPTERS)
        for name, directory in made.items():
            inside = sorted(path for path in directory.rglob("*") if path.is_file())
            files += [
                (f"{ADAPTERS}/{name}/{path.relative_to(directory).as_posix()}", path)
                for path in inside
            ]
        texts: dict[str, bytes] = {ABOUT: _about(view)}
        entries: list[dict[str, Any]] = []
        if records:
            texts[FIGURE] = _figure(records)
            entries, why_none = _results(records, dataset)
            notes += why_none
        if entries:
            texts[RESULTS] = _yaml(entries)
        card = _section(copied, view, repository, made, records)
        sent = _commit(
            repository,
            private,
            files,
            texts,
            card,
            (_header(view), message or f"memtool push: version {view.version}"),
            copied,
            tell,
        )
    hub.forget(repository)
    return Pushed(
        repository=repository,
        url=f"{hub.endpoint()}/{repository}",
        commit=sent.commit,
        version=view.version,
        adapters=tuple(made),
        files=sent.files,
        nbytes=sent.nbytes,
        results=len(entries),
        private=sent.private,
        unchanged=sent.unchanged,
        notes=tuple(notes),
    )


def pull(
    repository: str,
    target: str | Path,
    *,
    lock_timeout: float = 30.0,
    progress: Progress | None = None,
) -> Pulled:
    """Bring the memory of `user/name` with all its versions to a directory or a bucket.

    Every byte of it is checked first, as `memtool verify` does. An older copy in a directory is
    brought up to date; a tag that was deleted in it stays so.

    Raises:
        NotFoundError: no such repository, or no memory in it.
        AlreadyExistsError: something else is at `target`, or a copy with versions of its own.
        IntegrityError: it is damaged; nothing is made.
        StorageError: no answer, no permission, no room.
    """
    address = hub.SCHEME + hub.repository_of(repository)
    opened = MemoryStore.open(address, lock_timeout=lock_timeout)
    report = opened.verify("full")
    for damage in report.damages:
        raise IntegrityError(
            what=damage.what,
            name=damage.name,
            expected=damage.expected,
            found=f"{damage.found} in {address}, of which nothing was kept",
            remedy=f"hf cache rm model/{hub.repository_of(repository)}, then the same again; else "
            "ask who pushed it",
        )
    for unread in report.unchecked:
        raise StorageError(f"{address} could not be checked: {unread.why}; nothing was kept")
    tell = _Tell(progress).of("pull")
    if not MemoryStore.exists(target):
        return Pulled(opened.clone(target, tell), None)
    there = MemoryStore.open(target, lock_timeout=lock_timeout)
    came = there.forward_to(opened, tell)
    return Pulled(MemoryStore.open(target, lock_timeout=lock_timeout), came)


def token_of_user(repository: str) -> str:
    """Whose token is at hand. Raises ConfigError where there is none, StorageError for a bad one.

    The token itself is never said.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(
            f"no token of {hub.endpoint()} is at hand, so {repository} cannot be written to",
            expected="a token that may write",
            remedy="hf auth login, or export HF_TOKEN",
        )
    with hub.answering("say who pushes", repository):
        return str(hub.api().whoami()["name"])


# What is sent


@dataclass(frozen=True)
class _Sent:
    commit: str
    files: int
    nbytes: int
    private: bool
    unchanged: bool


def _commit(
    repository: str,
    private: bool,
    files: list[tuple[str, Path]],
    texts: dict[str, bytes],
    card: str,
    said: tuple[dict[str, Any], str],
    store: MemoryStore,
    tell: _Tell,
) -> _Sent:
    """Make one commit of the files and take away what it replaces."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = hub.api()
    header, message = said
    with hub.answering(f"push to {repository}", repository), hub.quiet():
        api.create_repo(repository, private=private, exist_ok=True)
        info = api.model_info(repository)
        if private and not info.private:
            raise MismatchError(
                f"{repository} was there before, and is public; nothing was published",
                expected="a private repository, or a new one",
                remedy="another name; or its settings on the hub; or without --private",
            )
        there = {
            entry.path: entry.size
            for entry in api.list_repo_tree(repository, recursive=True, revision=info.sha)
            if hasattr(entry, "size")
        }
        _require_ours(api, repository, info.sha, there, store)
        texts[CARD] = _card(api, repository, info.sha, there, header, card)
        contents: list[tuple[str, Path | bytes]] = [*files, *texts.items()]
        added = [
            CommitOperationAdd(path, content)
            for path, content in contents
            if not (path.startswith(_NEVER_CHANGE) and there.get(path) == _nbytes(content))
        ]
        kept = {path for path, _ in files} | texts.keys()
        gone = [
            CommitOperationDelete(path)
            for path in sorted(there.keys() - kept)
            if path.startswith((f"{hub.FOLDER}/", f"{ADAPTERS}/")) or path in (FIGURE, RESULTS)
        ]
        tell("push: send", 0, len(added))
        commit = _made(api, repository, [*added, *gone], message, info.sha)
        tell("push: send", len(added), len(added))
    nbytes = sum(_nbytes(content) for _, content in contents)
    unchanged = commit == info.sha
    return _Sent(commit, len(kept), nbytes, bool(info.private), unchanged)


def _nbytes(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _made(api: Any, repository: str, operations: list[Any], message: str, parent: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # The client makes no commit where nothing is new.
        made = api.create_commit(
            repository, operations, commit_message=message, parent_commit=parent
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (409, 412):
            raise ChangedMeanwhileError(
                f"somebody else pushed to {repository} meanwhile; nothing was published",
                remedy="the same command again",
            ) from error
        raise
    return str(made.oid)


def _require_ours(
    api: Any, repository: str, commit: str, there: dict[str, Any], store: MemoryStore
) -> None:
    """Raise unless the repository is new, or holds this memory at one of its versions."""
    if ABOUT not in there:
        others = sorted(there.keys() - _HOSTS_OWN)
        if others:
            raise MismatchError(
                f"{repository} holds something else ({others[0]}); nothing was published",
                expected="a repository that memtool push made, or a new one",
                remedy="another name",
            )
        return
    about = parsed_json(_read(api, repository, commit, ABOUT), f"{ABOUT} in {repository}")
    if about.get("store_id") != store.view().store_id:
        raise MismatchError(
            f"{repository} holds another memory; nothing was published",
            expected="the memory that was pushed there first, or a clone of it",
            remedy="another name; or memtool merge to join the two",
        )
    if about.get("version") not in {version.id for version in store.log()}:
        raise ChangedMeanwhileError(
            f"{repository} is at version {about.get('version')}, which this memory has not; "
            "nothing was published",
            remedy=f"memtool pull {repository} --store theirs, and memtool merge of what is new",
        )


def _read(api: Any, repository: str, commit: str, path: str) -> bytes:
    return Path(api.hf_hub_download(repository, path, revision=commit)).read_bytes()


def _about(view: MemoryView) -> bytes:
    said = {
        "schema": "memtool.hub",
        "schema_version": SCHEMA_VERSION,
        "store_id": view.store_id,
        "version": view.version,
        "backbone": view.space.backbone.name,
        "backbone_sha256": view.space.backbone.sha256,
        "adapters": len(view.live),
    }
    return (json.dumps(said, indent=2) + "\n").encode()


def _adapters(store: MemoryStore, out: Path) -> tuple[dict[str, Path], list[str]]:
    """The whole adapters of a memory as PEFT directories, by name; and why some are none."""
    from memtool.memory import load
    from memtool.methods import open_method
    from memtool.methods.export import export_peft
    from memtool.methods.home import stored_home

    view = store.view()
    whole = [record.name for record in view.live if record.kind == "adapter"]
    notes = []
    if len(whole) < len(view.live):
        left = len(view.live) - len(whole)
        notes.append(f"{left} rows of atoms are in the memory alone: PEFT has no such adapters")
    if not whole:
        return {}, notes
    try:
        config = load(store.url).config.model_copy(update={"store": store.url})
    except NotFoundError:
        return {}, [*notes, "no PEFT directories: the memory does not say what it was made with"]
    seed = config.seed[0]
    home = stored_home(config, seed=seed) or open_method(config, seed=seed).workspace
    made = export_peft(home, whole, out=out, version=view.version)
    return dict(zip(whole, made, strict=True)), notes


# What the page says


def _header(view: MemoryView) -> dict[str, Any]:
    """The metadata of the card that is ours to say."""
    backbone = view.space.backbone.name
    family, _, name = backbone.partition(":")
    base = None
    if family == "timm":
        base = f"timm/{name}"
    elif family == "hf" and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not is_folder(Path(name)):
        base = name
    return {
        "library_name": "memtool",
        "tags": ["memtool", "peft", "lora", "continual-learning"],
        **({"base_model": base} if base else {}),
    }


def _card(
    api: Any,
    repository: str,
    commit: str,
    there: dict[str, Any],
    header: dict[str, Any],
    section: str,
) -> bytes:
    """The card: what somebody wrote in it stays, our section is written anew."""
    from huggingface_hub import ModelCard

    old = ""
    if CARD in there:
        old = _read(api, repository, commit, CARD).decode(errors="replace")
    card = ModelCard(old, ignore_metadata_errors=True)
    data = card.data.to_dict()
    tags = dict.fromkeys([*(data.get("tags") or ()), *header["tags"]])
    for name, value in ({**header, **data, "tags": list(tags)}).items():
        setattr(card.data, name, value)
    text = card.text.strip()
    ours = f"{_BEGIN}\n{section.strip()}\n{_END}"
    if _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        text = before + ours + rest.partition(_END)[2]
    else:
        text = "\n\n".join(part for part in (text, ours) if part)
    return f"---\n{card.data.to_yaml()}\n---\n\n{text.strip()}\n".encode()


def _section(
    store: MemoryStore,
    view: MemoryView,
    repository: str,
    made: dict[str, Path],
    records: Sequence[Record],
) -> str:
    from memtool.reports.card import code, markdown_table, measured

    name = repository.partition("/")[2]
    backbone = view.space.backbone
    adapters = [
        (code(one.name), _task(one), code(f"{ADAPTERS}/{one.name}") if one.name in made else "-")
        for one in sorted(view.live, key=lambda record: record.row)
    ]
    line = store.log()
    versions = [
        (code(one.id), f"{one.time:%Y-%m-%d %H:%M} UTC", code(one.message))
        for one in line[:_VERSIONS]
    ]
    parts = [
        f"# {name}",
        f"A memory of memtool: adapters of the frozen model {code(backbone.name)} in a versioned "
        f"associative memory, with its history. Adapters: {len(view.live)}; versions: {len(line)}.",
        "```python\nimport memtool\n\n"
        f'memory = memtool.load("hf://{repository}")\nmodel = memory.attach()\n```',
    ]
    if made:
        first = next(iter(made))
        parts.append(
            "One adapter alone, with PEFT, on the model that it was trained on:\n\n"
            "```python\nfrom peft import PeftModel\n\n"
            f'PeftModel.from_pretrained(model, "{repository}", '
            f"subfolder={json.dumps(f'{ADAPTERS}/{first}', ensure_ascii=False)})\n```"
        )
    if records:
        parts += [
            "## Measured",
            measured(records),
            f"![accuracy on every task after each task]({quote(FIGURE)})",
        ]
    parts += [
        "## Adapters",
        markdown_table(("adapter", "task", "PEFT directory"), adapters),
        "## Versions",
        markdown_table(("version", "time", "what"), versions),
    ]
    if len(line) > _VERSIONS:
        parts.append(f"and {len(line) - _VERSIONS} before them: `memtool log`.")
    parts.append(f"sha256 of the tensors of the frozen model: {code(backbone.sha256)}")
    return "\n\n".join(parts)


def _task(record: AdapterRecord) -> str:
    named = record.meta.get("task_name")
    return str(named if named is not None else "-" if record.task is None else record.task)


def _figure(records: Sequence[Record]) -> bytes:
    from memtool.reports.card import accuracy_png

    return accuracy_png(records)


def _results(
    records: Sequence[Record], dataset: str | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Entries for `.eval_results/`, one a metric that was measured over all seeds; or why none."""
    from memtool.evaluation.summary import summarise_rows

    run = records[0].run
    revision = None
    if dataset is None:
        dataset, revision = _dataset_of(run.configuration)
    if dataset is None:
        return [], [
            "no entries of .eval_results: the stream was not read from a data set of the hub; "
            "--dataset user/name names one"
        ]
    rows = [row for row in summarise_rows(records) if row.kind == "method"]
    of_setting = {"dg": "dg.heldout", "dgcl": "dgcl.heldout", "trace": "op.trace"}
    metric = of_setting.get(run.setting, "faa")
    date = max(record.run.created for record in records).isoformat(timespec="seconds")
    about = {"id": dataset, "task_id": run.setting}
    if revision is not None:
        about["revision"] = revision
    entries: list[dict[str, Any]] = []
    for row in rows:
        if metric in row.metrics:
            found = row.metrics[metric]
            entries.append(
                {
                    "dataset": about,
                    "value": round(100 * found.mean, 4),
                    "date": date,
                    "notes": f"{row.label}; {metric}, per cent; mean of {found.n} seeds",
                }
            )
    return entries, []


def _dataset_of(configuration: Any) -> tuple[str | None, str | None]:
    """Id and revision of the data set of the hub that a stream was read from; None of another."""
    from memtool.streams import description

    source = str(configuration.get("stream", {}).get("source", ""))
    file = Path(description.__file__).parent / "descriptions" / f"{source}.yaml"
    file = file if re.fullmatch(r"[\w-]+", source) else Path(source)
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        return None, None
    try:
        found = description.read_description(file)
    except MemtoolError:
        return None, None
    return (found.path, found.revision) if found.kind == "hub" else (None, None)


def _yaml(entries: list[dict[str, Any]]) -> bytes:
    import yaml

    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).encode()


def _require_of(store: MemoryStore, record: Record) -> None:
    """Raise MismatchError for a record of another model or memory."""
    backbone = store.space.backbone
    run = record.run
    if run.backbone.sha256 != backbone.sha256:
        raise MismatchError(
            f"a record of the model {run.backbone.name} ({run.backbone.sha256[:12]})",
            expected=f"{backbone.name} ({backbone.sha256[:12]}), the model of {store.address}",
        )
    if run.store_version is not None and run.store_version not in _ids(store):
        raise MismatchError(
            f"a record of version {run.store_version}, which {store.address} has not",
            expected="a record of this memory",
            remedy="memtool run or memtool eval writes one",
        )


def _ids(store: MemoryStore) -> set[str]:
    return {version.id for ref in ("main", *store.branches()) for version in store.log(ref)}


class _Tell:
    """Progress that may be wanted by nobody."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def __call__(self, stage: str, step: int, total: int) -> None:
        if self._progress is not None and total:
            self._progress(ProgressEvent(stage=stage, step=step, total=total))

    def of(self, stage: str) -> Any:
        return lambda step, total: self(stage, step, total)
