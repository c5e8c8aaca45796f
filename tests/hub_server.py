"""The HTTP API of the Hugging Face Hub on 127.0.0.1, as far as huggingface_hub asks it.

Repositories of models with commits, git blobs, LFS objects, tokens and private repositories. What
is committed is what was uploaded, and a commit is taken whole or not at all, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REGULAR_BYTES = 256
"""A file above is kept by LFS."""


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        data = self.data
        if self.lfs:
            data = f"version lfs\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, str, dict[str, File]]] = field(default_factory=list)
    """Oldest first: id, message, files by path."""

    def at(self, revision: str) -> dict[str, File] | None:
        for commit, _, files in reversed(self.commits):
            if revision in ("main", commit):
                return files
        return None

    def add(self, message: str, files: dict[str, File]) -> str:
        listed = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        commit = hashlib.sha1(f"{len(self.commits)} {message}\n{listed}".encode()).hexdigest()
        self.commits.append((commit, message, files))
        return commit


@dataclass
class Hub:
    """The state of the server, and how it is to misbehave."""

    url: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    """Users by token; a token that may only read begins with `hf_read`."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""
    fail_uploads_after: int | None = None
    before_commit: Any = None
    """Called without arguments before a commit is looked at."""

    def files(self, repository: str) -> dict[str, bytes]:
        at = self.repositories[repository].at("main")
        return {path: file.data for path, file in (at or {}).items()}


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        path = unquote(address.path)
        self.hub.asked.append((self.command, path))
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                try:
                    action(self, *found.groups())
                except _Refused as refused:
                    self._send(
                        refused.status,
                        {"error": str(refused)},
                        {"X-Error-Code": refused.code, "X-Error-Message": str(refused)},
                    )
                return
        self._send(404, {"error": f"no route {self.command} {path}"})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and what may be seen

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    @property
    def user(self) -> str | None:
        return self.hub.tokens.get(self.token or "")

    def seen(self, name: str) -> Repository:
        """A repository that whoever asks may see: of others nobody says that they are there."""
        found = self.hub.repositories.get(name)
        mine = self.user is not None and name.startswith(f"{self.user}/")
        if found is None or (found.private and not mine):
            raise _Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        return found

    def mine(self, name: str) -> Repository:
        found = self.seen(name)
        if self.user is None:
            raise _Refused(401, "", "Invalid username or password.")
        if not name.startswith(f"{self.user}/") or (self.token or "").startswith("hf_read"):
            raise _Refused(403, "", "you must use a write token")
        return found

    def files(self, name: str, revision: str) -> tuple[str, dict[str, File]]:
        repository = self.seen(name)
        at = repository.at(revision)
        if at is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return next(c for c, _, files in reversed(repository.commits) if files is at), at

    # Routes

    def whoami(self) -> None:
        if self.user is None:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        role = "read" if (self.token or "").startswith("hf_read") else "write"
        said = {"accessToken": {"role": role}}
        self._send(200, {"type": "user", "name": self.user, "orgs": [], "auth": said})

    def create(self) -> None:
        asked = json.loads(self.body)
        if self.user is None:
            raise _Refused(401, "", "Invalid username or password.")
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if not name.startswith(f"{self.user}/") or (self.token or "").startswith("hf_read"):
            raise _Refused(403, "", f"You don't have the rights to create a model under {name}")
        address = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", **address})
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        made = self.hub.repositories[name] = Repository(private)
        attributes = File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
        made.add("initial commit", {".gitattributes": attributes})
        self._send(200, address)

    def info(self, name: str, revision: str | None = None) -> None:
        commit, files = self.files(name, revision or "main")
        self._send(
            200,
            {
                "_id": "1",
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": self.hub.repositories[name].private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
            },
        )

    def refs(self, name: str) -> None:
        commit, _ = self.files(name, "main")
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
        self._send(200, {"branches": [main], "tags": [], "converts": []})

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.oid}
        entry["size"] = len(file.data)
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 100}
        return entry

    def tree(self, name: str, revision: str, below: str | None = None) -> None:
        _, files = self.files(name, revision)
        prefix = f"{below.strip('/')}/" if below and below.strip("/") else ""
        found = [(path, file) for path, file in files.items() if path.startswith(prefix)]
        if prefix and not found:
            raise _Refused(404, "EntryNotFound", f"{below} does not exist on {revision}")
        # Two pages, so that the client must follow the link to the second.
        page = int(self.query.get("cursor", ["0"])[0])
        half = -(-len(found) // 2)
        headers = {}
        if page == 0 and len(found) > half:
            again = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor=1"
            headers["Link"] = f'<{again}>; rel="next"'
        chosen = found[:half] if page == 0 else found[half:]
        self._send(200, [self._entry(*one) for one in chosen], headers)

    def paths(self, name: str, revision: str) -> None:
        _, files = self.files(name, revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode())["paths"]
        self._send(200, [self._entry(path, files[path]) for path in wanted if path in files])

    def preupload(self, name: str, revision: str) -> None:
        self.mine(name)
        _, there = self.files(name, revision)
        answers = []
        for one in json.loads(self.body)["files"]:
            path, large = one["path"], one["size"] > REGULAR_BYTES
            large = large or path.endswith(".safetensors")
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            answer |= {"shouldIgnore": False}
            if path in there:
                answer["oid"] = there[path].sha256 if there[path].lfs else there[path].oid
            answers.append(answer)
        self._send(200, {"files": answers})

    def batch(self, name: str) -> None:
        self.mine(name)
        asked = json.loads(self.body)
        assert asked["operation"] == "upload"
        answers = []
        for one in asked["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{one['oid']}"}
                verify = {"href": f"{self.hub.url}/lfs/{one['oid']}/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self._send(200, {"transfer": "basic", "objects": answers})

    def upload(self, oid: str) -> None:
        left = self.hub.fail_uploads_after
        if left is not None:
            if left <= 0:
                raise _Refused(403, "", "the upload was cut")
            self.hub.fail_uploads_after = left - 1
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "", "these are not the bytes that were announced")
        self.hub.objects[oid] = self.body
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise _Refused(404, "", f"no object {oid}")
        self._send(200, {"message": "ok"})

    def commit(self, name: str, revision: str) -> None:
        repository = self.mine(name)
        if self.hub.before_commit is not None:
            self.hub.before_commit()
        files, header = dict(self.files(name, revision)[1]), {}
        for line in self.body.splitlines():
            one = json.loads(line)
            value = one["value"]
            match one["key"]:
                case "header":
                    header = value
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise _Refused(400, "", f"no LFS object {value['oid']}")
                    files[value["path"]] = File(self.hub.objects[value["oid"]], True)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
                case "deletedFolder":
                    kept = {p: f for p, f in files.items() if not p.startswith(value["path"])}
                    files = kept
                case other:
                    raise _Refused(400, "", f"what is {other}?")
        parent = header.get("parentCommit")
        if parent is not None and parent != repository.commits[-1][0]:
            raise _Refused(412, "", "A commit has happened since. Please refresh and try again.")
        made = repository.add(header["summary"], files)
        self._send(200, {"success": True, "commitOid": made, "commitUrl": f"{name}/commit/{made}"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self.files(name, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound", f"Entry not found: {path}")
        file = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
        if file.lfs:
            linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
            headers |= linked
        self._send(200, file.data, headers)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})


_NAME = r"([^/]+/[^/]+)"
_ROUTES: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("GET",), f"/api/models/{_NAME}", _Handler.info),
    (("GET",), f"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    (("GET",), f"/api/models/{_NAME}/refs", _Handler.refs),
    (("GET",), f"/api/models/{_NAME}/tree/([^/]+)(/.*)?", _Handler.tree),
    (("POST",), f"/api/models/{_NAME}/paths-info/(.+)", _Handler.paths),
    (("POST",), f"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (("POST",), f"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", _Handler.upload),
    (("POST",), "/lfs/([0-9a-f]{64})/verify", _Handler.verify),
    (("GET", "HEAD"), f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub without repositories, on a port of its own."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
