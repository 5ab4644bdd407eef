"""The requests of huggingface_hub that pushing and loading weights need, answered on this machine.

Repositories are kept as a dictionary of files; large files arrive by the protocol of Git LFS.
"""

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

import yaml

TOKEN = "hf_thisIsTheSecret"
OWNER = "ann"  # whose token it is


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)  # name -> files

    def commit(self) -> str:
        name = hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()
        self.revisions[name] = self.revisions["main"] = dict(self.files)
        return name

    def sha(self, revision: str = "main") -> str:
        files = self.revisions[revision]
        return next(
            name for name, each in self.revisions.items() if each == files and name != "main"
        )


@dataclass
class Hub:
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    requests: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)
    corrupt: bool = False  # whether files arrive with their last byte changed
    status: int | None = None  # of every reply

    def add(self, name: str, private: bool = False, **files: bytes) -> Repository:
        """A model; `model_safetensors=` is the file model.safetensors."""
        named = {key.replace("_", "."): content for key, content in files.items()}
        repository = self.repositories[name] = Repository(private, named)
        repository.commit()
        return repository


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", content: Any = None) -> None:
        self.status, self.code, self.content = status, code, json.dumps(content or {}).encode()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else b""
        try:
            if self.hub.status:
                raise Refusal(self.hub.status)
            reply, headers = self.answer(body)
        except Refusal as refusal:
            self.reply(refusal.status, refusal.content, {"X-Error-Code": refusal.code})
            return
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.reply(200, content, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass

    def known(self) -> bool:
        """Whether the request has the token. A wrong one is refused."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401)
        return given is not None

    def repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.known()):
            raise Refusal(404 if self.known() else 401, "RepoNotFound")
        return found

    def answer(self, body: bytes) -> tuple[Any, dict[str, str]]:
        path = self.path.partition("?")[0]
        for pattern, handle in HANDLERS.items():
            found = re.fullmatch(pattern, path)
            if found:
                return handle(self, body, **found.groupdict())
        raise Refusal(404)

    def create(self, body: bytes) -> tuple[Any, dict[str, str]]:
        asked = json.loads(body)
        if not self.known():
            raise Refusal(401)
        if asked["organization"] != OWNER:
            raise Refusal(403)
        name = f"{OWNER}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            raise Refusal(409, content=url)
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.hub.add(name, private)
        return url, {}

    def facts(self, body: bytes, name: str, revision: str = "main") -> tuple[Any, dict[str, str]]:
        found = self.repository(name)
        files = [{"rfilename": each} for each in found.files]
        facts = {"id": name, "private": found.private, "sha": found.sha(), "siblings": files}
        return facts, {}

    def check_card(self, body: bytes) -> tuple[Any, dict[str, str]]:
        _, front, _ = json.loads(body)["content"].split("---\n", 2)
        assert isinstance(yaml.safe_load(front), dict)
        return {"errors": [], "warnings": []}, {}

    def preupload(self, body: bytes, name: str) -> tuple[Any, dict[str, str]]:
        self.repository(name)
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        return {"files": files}, {}

    def batch(self, body: bytes, name: str) -> tuple[Any, dict[str, str]]:
        self.repository(name)
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}, {}

    def store(self, body: bytes, oid: str) -> tuple[Any, dict[str, str]]:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        return {}, {}

    def commit(self, body: bytes, name: str) -> tuple[Any, dict[str, str]]:
        found = self.repository(name)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                found.files[value["path"]] = self.hub.stored[value["oid"]]
        oid = found.commit()
        return {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid}, {}

    def resolve(
        self, body: bytes, name: str, revision: str, file: str
    ) -> tuple[Any, dict[str, str]]:
        found = self.repository(name)
        if revision not in found.revisions:
            raise Refusal(404, "RevisionNotFound")
        if file not in found.revisions[revision]:
            raise Refusal(404, "EntryNotFound")
        content = found.revisions[revision][file]
        etag = hashlib.sha256(content).hexdigest()
        if self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return content, {"ETag": f'"{etag}"', "X-Repo-Commit": found.sha(revision)}


NAME = r"(?P<name>[\w.-]+/[\w.-]+?)"
HANDLERS = {
    "/api/repos/create": Handler.create,
    f"/api/models/{NAME}(/revision/(?P<revision>[^/]+))?": Handler.facts,
    "/api/validate-yaml": Handler.check_card,
    f"/api/models/{NAME}/preupload/main": Handler.preupload,
    rf"/{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    "/lfs/(?P<oid>[0-9a-f]{64})": Handler.store,
    f"/api/models/{NAME}/commit/main": Handler.commit,
    f"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": Handler.resolve,
}


@contextmanager
def simulated_hub() -> Iterator[Hub]:
    hub = Hub()
    bound = type("Bound", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), bound) as running:
        hub.endpoint = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            running.shutdown()
            thread.join()
