"""A stand-in for the Hugging Face Hub on loopback: repositories in memory, as the real client talks to them.

Faults are queued with `StandIn.fail` and hit the next requests that fit; every request is logged in ``requests``.
"""

import base64
import fnmatch
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import yaml

Files = dict[str, bytes]


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: every commit with all its files, and branches."""

    name: str
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        parent = self.branches.get(branch, "")
        oid = hashlib.sha1(f"{self.name}{parent}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    @property
    def head(self) -> Files:
        return self.commits[self.branches["main"]]

    def front_matter(self) -> dict[str, Any]:
        match = re.match(r"---\n(.*?)\n---\n", self.head.get("README.md", b"").decode(), re.DOTALL)
        return (yaml.safe_load(match[1]) or {}) if match else {}

    def tags(self) -> list[str]:
        """Those that the Hub makes of the front matter."""
        data = self.front_matter()
        bases = data.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        tags = [*(data.get("tags") or []), *filter(None, [data.get("library_name")])]
        tags += [f"base_model:{base}" for base in bases]
        tags += [f"base_model:{data['base_model_relation']}:{base}" for base in bases if "base_model_relation" in data]
        return tags + ([f"license:{data['license']}"] if "license" in data else [])


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose ``METHOD path`` fits ``pattern``."""

    pattern: str
    kind: str  # status, cut, wrong bytes, no etag, hang, drip, endless, huge, garbage
    times: int
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = "the server is unwell"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of what went wrong, but of a client that hung up, as some tests have it do."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class StandIn:
    """The server's state; ``url`` is its endpoint, ``tokens`` who may write where and read what is private."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs_patterns: list[str] = []
        self.lfs_objects: dict[str, bytes] = {}
        self.tokens = {"hf_standInTokenOfOrg": "org"}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.sent = 0  # bytes of answers that never end
        self.stopped = threading.Event()
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, pattern: str, kind: str = "status", times: int = 1, **details: Any) -> None:
        self.faults.append(Fault(pattern, kind, times, **details))

    def fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fnmatch.fnmatch(request, fault.pattern):
                fault.times -= 1
                return fault
        return None

    def is_lfs(self, path: str) -> bool:
        return any(fnmatch.fnmatch(path, pattern) for pattern in self.lfs_patterns)

    def put(self, name: str, files: Files, private: bool = False) -> Repo:
        """A repository with these files, made without the client."""
        repo = self.repos.setdefault(name, Repo(name, private))
        repo.commit("main", dict(files))
        return repo

    def stop(self) -> None:
        """Nobody listens any more, and the client has no connection left."""
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()
        huggingface_hub.close_session()


@contextmanager
def serve() -> Iterator[StandIn]:
    hub = StandIn()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stop()
        thread.join()


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._serve()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        # -- one request ----------------------------------------------------------------------------------------------

        def _serve(self) -> None:
            parts = urlsplit(self.path)
            self.route, self.query = unquote(parts.path), parse_qs(parts.query)
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                self.body = self._chunks()
            request = f"{self.command} {self.route}"
            hub.requests.append(request)
            self.fault = hub.fault(request)
            if self.fault and self.fault.kind == "status":
                self._send(self.fault.status, self.fault.body.encode(), self.fault.headers)
            elif self.fault and self.fault.kind == "hang":
                time.sleep(1.5)
                self.close_connection = True
            elif self.fault and self.fault.kind == "drip":
                self._drip()
            elif self.fault and self.fault.kind == "endless":
                self._drip(b" " * 65536, pause=0)
            elif self.fault and self.fault.kind == "garbage":
                self._send(200, b"<html>a proxy's login page</html>")
            else:
                self._dispatch()

        def _drip(self, piece: bytes = b" ", pause: float = 0.1) -> None:
            """An answer that begins well and never ends: no single read times out."""
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.close_connection = True
            while not hub.stopped.wait(pause):
                self.wfile.write(piece)
                hub.sent += len(piece)

        def _chunks(self) -> bytes:
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def _dispatch(self) -> None:
            for pattern, method in (
                (r"/api/repos/create", self._create),
                (r"/api/validate-yaml", self._validate),
                (r"/api/whoami-v2", self._whoami),
                (r"/api/models", self._list),
                (r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<rev>.+)", self._preupload),
                (r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<rev>.+)", self._commit),
                (r"/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<rev>.+)", self._branch),
                (r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)", self._tree),
                (r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<rev>.+))?", self._info),
                (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
                (r"/lfs/(?P<oid>[0-9a-f]{64})", self._lfs_put),
                (r"/lfs/verify", self._verify),
                (r"/cdn/(?P<oid>[0-9a-f]{64})", self._cdn),
                (r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", self._resolve),
            ):
                if match := re.fullmatch(pattern, self.route):
                    return method(**{key: value or "main" for key, value in match.groupdict().items()})
            return self._error(404, "EntryNotFound")

        # -- who asks -------------------------------------------------------------------------------------------------

        @property
        def _user(self) -> str | None:
            return hub.tokens.get((self.headers.get("authorization") or "").removeprefix("Bearer "))

        def _repo(self, name: str) -> Repo | None:
            repo = hub.repos.get(name)
            if repo is None or (repo.private and self._user != name.split("/")[0]):
                self._error(401 if self._user is None else 404, "RepoNotFound")
                return None
            return repo

        def _may_write(self, name: str) -> bool:
            if self._user == name.split("/")[0]:
                return True
            self._error(401 if self._user is None else 403, None)
            return False

        # -- the API --------------------------------------------------------------------------------------------------

        def _create(self) -> None:
            wanted = json.loads(self.body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if not self._may_write(name):
                return
            if name in hub.repos:
                self._json({"url": f"{hub.url}/{name}", "error": "You already created this model repo"}, 409)
                return
            hub.put(name, {".gitattributes": b"*.bin lfs\n"}, private=wanted.get("visibility") == "private")
            self._json({"url": f"{hub.url}/{name}"})

        def _validate(self) -> None:
            json.loads(self.body)["content"].encode()
            self._json({"errors": [], "warnings": []})

        def _whoami(self) -> None:
            self._json({"type": "user", "name": self._user}) if self._user else self._error(401, None)

        def _list(self) -> None:
            wanted, text = self.query.get("filter", []), self.query.get("search", [""])[0]
            author = self.query.get("author", [""])[0]
            found = [
                self._describe(repo, "main")
                for repo in hub.repos.values()
                if set(wanted) <= set(repo.tags()) and text.lower() in repo.name.lower()
                if not repo.private or self._user == repo.name.split("/")[0]
                if author in ("", repo.name.split("/")[0])
            ]
            self._json(found[: int(self.query.get("limit", ["1000"])[0])])

        def _info(self, name: str, rev: str) -> None:
            if (repo := self._repo(name)) is None:
                return
            self._json(self._describe(repo, rev)) if repo.resolve(rev) else self._error(404, "RevisionNotFound")

        def _describe(self, repo: Repo, rev: str) -> dict[str, Any]:
            files = repo.commits[repo.resolve(rev)]
            blobs = "blobs" in self.query
            return {
                "_id": "0" * 24,
                "id": repo.name,
                "modelId": repo.name,
                "sha": repo.resolve(rev),
                "private": repo.private,
                "downloads": 0,
                "likes": 0,
                "tags": repo.tags(),
                "library_name": repo.front_matter().get("library_name"),
                "cardData": repo.front_matter(),
                "siblings": [
                    {"rfilename": path} | (self._blob(path, content) if blobs else {})
                    for path, content in files.items()
                ],
            }

        def _blob(self, path: str, content: bytes) -> dict[str, Any]:
            row: dict[str, Any] = {"size": len(content), "blobId": git_sha1(content)}
            if hub.is_lfs(path):
                digest = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            return row

        def _tree(self, name: str, rev: str) -> None:
            if (repo := self._repo(name)) is None:
                return
            files = repo.commits[repo.resolve(rev)]
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
                | ({"lfs": {"oid": self._etag(path, content), "size": len(content), "pointerSize": 130}}
                   if hub.is_lfs(path) else {})
                for path, content in files.items()
            ]  # fmt: skip
            self._json(rows)

        def _preupload(self, name: str, rev: str) -> None:
            if (repo := self._repo(name)) is None or not self._may_write(name):
                return
            now = repo.commits.get(repo.resolve(rev) or "", {})
            self._json({"files": [self._mode(one["path"], now) for one in json.loads(self.body)["files"]]})

        def _mode(self, path: str, now: Files) -> dict[str, Any]:
            oid = self._etag(path, now[path]) if path in now else None
            return {
                "path": path,
                "uploadMode": "lfs" if hub.is_lfs(path) else "regular",
                "shouldIgnore": False,
                "oid": oid,
            }

        def _commit(self, name: str, rev: str) -> None:
            if (repo := self._repo(name)) is None or not self._may_write(name):
                return
            header, *rows = [json.loads(line) for line in self.body.splitlines()]
            if header["value"].get("parentCommit") not in (None, repo.resolve(rev)):
                self._json({"error": "The parent commit is not the head of the branch"}, 412)
                return
            files = dict(repo.commits.get(repo.resolve(rev) or "", {}))
            for row in rows:
                value = row["value"]
                if row["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif row["key"] == "lfsFile":
                    files[value["path"]] = hub.lfs_objects[value["oid"]]
                else:
                    del files[value["path"]]
            oid = repo.commit(rev, files)
            self._json({"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

        def _branch(self, name: str, rev: str) -> None:
            if (repo := self._repo(name)) is None or not self._may_write(name):
                return
            if rev in repo.branches:
                self._json({"error": "the branch exists"}, 409)
                return
            repo.branches[rev] = repo.branches["main"]
            self._json({})

        # -- large files ----------------------------------------------------------------------------------------------

        def _batch(self, name: str) -> None:
            if not self._may_write(name):
                return
            objects = [
                {
                    **one,
                    "actions": {
                        "upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}},
                        "verify": {"href": f"{hub.url}/lfs/verify", "header": {}},
                    },
                }
                for one in json.loads(self.body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})

        def _lfs_put(self, oid: str) -> None:
            assert hashlib.sha256(self.body).hexdigest() == oid
            hub.lfs_objects[oid] = self.body
            self._json({})

        def _verify(self) -> None:
            assert json.loads(self.body)["oid"] in hub.lfs_objects
            self._json({})

        # -- downloads ------------------------------------------------------------------------------------------------

        def _etag(self, path: str, content: bytes) -> str:
            return hashlib.sha256(content).hexdigest() if hub.is_lfs(path) else git_sha1(content)

        def _resolve(self, name: str, rev: str, path: str) -> None:
            if (repo := self._repo(name)) is None:
                return
            commit = repo.resolve(rev)
            if commit is None:
                self._error(404, "RevisionNotFound")
                return
            if path not in repo.commits[commit]:
                self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
                return
            content = repo.commits[commit][path]
            etag = {"ETag": f'"{self._etag(path, content)}"'}
            if self.fault and self.fault.kind == "no etag":
                etag = {}
            if not hub.is_lfs(path):
                self._content(content, {"X-Repo-Commit": commit, **etag})
                return
            digest = hashlib.sha256(content).hexdigest()
            hub.lfs_objects[digest] = content
            self._send(
                302,
                b"",
                {
                    "Location": f"http://localhost:{hub.server.server_port}/cdn/{digest}",  # another origin: no token
                    "X-Repo-Commit": commit,
                    "X-Linked-Size": str(len(content)),
                    **{f"X-Linked-{key}": value for key, value in etag.items()},
                },
            )

        def _cdn(self, oid: str) -> None:
            assert "authorization" not in self.headers, "the token left the Hub"
            self._content(hub.lfs_objects[oid], {})

        def _content(self, content: bytes, headers: dict[str, str]) -> None:
            kind = self.fault.kind if self.fault else ""
            if kind == "wrong bytes":
                content = bytes([*content[:-1], content[-1] ^ 1])
            elif kind == "huge":
                headers = headers | {"Content-Length": str(1 << 40)}
            start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if start:
                whole, content = len(content), content[int(start[1]) :]
                headers = headers | {"Content-Range": f"bytes {start[1]}-{whole - 1}/{whole}"}
            self._send(206 if start else 200, content, headers, cut=kind == "cut")

        # -- answers --------------------------------------------------------------------------------------------------

        def _json(self, value: Any, status: int = 200) -> None:
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _error(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
            coded = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
            self._send(status, b'{"error": "refused"}', {**coded, **(headers or {})})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection |= cut

    return Handler
