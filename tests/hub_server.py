"""A small Hub on loopback: repositories, commits, branches, tokens and large files, as the real client asks for them.

It keeps everything in memory and speaks the part of the Hub's HTTP interface that ``huggingface_hub`` needs to create a
repository, commit to it and read it back. Large files take the LFS way (the client's other way, xet, is switched off by
``HF_HUB_DISABLE_XET``), and are read from a "CDN": another host name that must never see a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def blob_id(data: bytes) -> str:
    """As git names a file."""
    return sha1(b"blob %d\0" % len(data) + data)


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  #: branch -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  #: commit -> its files
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        ids = {path: blob_id(data) for path, data in sorted(files.items())}
        sha = sha1(json.dumps([len(self.commits), branch, ids, message]).encode())
        self.refs[branch], self.commits[sha] = sha, dict(files)
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class Error(Exception):
    """An answer other than 200, in the words that the client understands."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Hub:
    """``with Hub() as hub``: ``hub.url`` is its endpoint, ``hub.repos`` what it holds, ``hub.log`` what was asked."""

    def __init__(self, tokens: dict[str, str] | None = None) -> None:
        self.tokens = tokens or {"hf_good": "acme"}  #: token -> user
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  #: sha256 -> file
        self.log: list[str] = []
        self.cut: dict[str, int] = {}  #: path -> how many bytes of it are really sent
        self.raced: Any = None  #: called once before the next commit: what another person does meanwhile
        self.leaked: list[str] = []  #: tokens that were shown to the CDN

    def __enter__(self) -> Hub:
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo_id: str, files: dict[str, bytes], branch: str = "main", **options: bool) -> str:
        """What a person does on the site: add files to a repository, making it where there is none."""
        repo = self.repos.setdefault(repo_id, Repo(**options))
        before = repo.commits.get(repo.refs.get(branch, ""), {})
        return repo.commit(branch, {**before, **files}, "edit on the site")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def env(self, home: Any) -> dict[str, str]:
        """What another process needs to talk to this Hub and keep its cache in ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    # -------- plumbing

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        try:
            self.route(path.strip("/").split("/"), body)
        except Error as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.send(
                json.dumps({"error": error.message}).encode(), error.status, {k: v for k, v in headers.items() if v}
            )

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def send(
        self, data: bytes, status: int = 200, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def say(self, value: Any, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Error(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def writer(self, namespace: str) -> None:
        if self.user() is None:
            raise Error(401, message="Invalid username or password.")
        if self.user() != namespace:
            raise Error(403, message=f"You don't have the rights to create a model under the namespace {namespace!r}")

    def repo(self, repo_id: str) -> Repo:
        """A repository that the asker may see; a private one does not exist for others."""
        repo, user = self.hub.repos.get(repo_id), self.user()
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            raise Error(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise Error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # -------- routes

    def route(self, parts: list[str], body: bytes) -> None:
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                self.create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                self.validate(json.loads(body)["content"])
            case "POST", ["api", "models", org, name, "branch", branch]:
                self.branch(f"{org}/{name}", branch, json.loads(body or b"{}"))
            case "POST", ["api", "models", org, name, "preupload", *revision]:
                self.preupload(f"{org}/{name}", "/".join(revision), json.loads(body))
            case "POST", ["api", "models", org, name, "commit", *revision]:
                self.commit(f"{org}/{name}", "/".join(revision), body)
            case "POST", [org, name, "info", "lfs", "objects", "batch"]:
                self.batch(f"{org}/{name.removesuffix('.git')}", json.loads(body))
            case "PUT", ["upload", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    raise Error(400, message="the content does not have this sha256")
                self.hub.large[oid] = body
                self.send(b"", headers={"ETag": oid})
            case "POST", ["verify"]:
                wanted = json.loads(body)
                if len(self.hub.large.get(wanted["oid"], b"")) != wanted["size"]:
                    raise Error(404, message="not uploaded")
                self.say({})
            case "GET" | "HEAD", ["api", "models", org, name, *rest]:
                self.info(f"{org}/{name}", rest)
            case "GET" | "HEAD", ["cdn", oid]:
                self.leak()
                self.file(self.hub.large[oid], {"ETag": f'"{oid}"'}, oid)
            case "GET" | "HEAD", [org, name, "resolve", revision, *path]:
                self.resolve(f"{org}/{name}", revision, "/".join(path))
            case _:
                raise Error(404, message=f"this Hub has no {self.command} {self.path}")

    def create(self, asked: dict[str, Any]) -> None:
        namespace = asked.get("organization") or self.user() or ""
        self.writer(namespace)
        repo_id = f"{namespace}/{asked['name']}"
        if repo_id in self.hub.repos:
            return self.say({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
        private = asked.get("private") is True or asked.get("visibility") == "private"
        repo = self.hub.repos[repo_id] = Repo(private=private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.say({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def validate(self, card: str) -> None:
        try:
            front = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
        except (yaml.YAMLError, IndexError) as error:
            return self.say({"errors": [{"message": str(error)}], "warnings": []}, 400)
        link = front.get("license_name") or front.get("license") != "other"
        errors = [] if link else [{"message": '"license_name" is required where "license" is "other"'}]
        self.say({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, repo_id: str, branch: str, asked: dict[str, Any]) -> None:
        self.writer(repo_id.split("/")[0])
        repo = self.repo(repo_id)
        if branch in repo.refs:
            return self.say({"error": "Reference already exists"}, 409)
        repo.refs[branch] = self.commit_of(repo, asked.get("startingPoint") or "main")
        self.say({})

    def preupload(self, repo_id: str, revision: str, asked: dict[str, Any]) -> None:
        self.writer(repo_id.split("/")[0])
        repo = self.repo(repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        said = []
        for f in asked["files"]:
            path = f["path"]
            oid = None
            if path in files:
                oid = hashlib.sha256(files[path]).hexdigest() if is_large(path) else blob_id(files[path])
            said.append(
                {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.say({"files": said})

    def batch(self, repo_id: str, asked: dict[str, Any]) -> None:
        self.writer(repo_id.split("/")[0])
        said = []
        for o in asked["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.cdn}/upload/{o['oid']}"},
                "verify": {"href": f"{self.hub.url}/verify"},
            }
            said.append({**o, **({} if o["oid"] in self.hub.large else {"actions": actions})})
        self.say({"transfer": "basic", "objects": said})

    def commit(self, repo_id: str, branch: str, body: bytes) -> None:
        self.writer(repo_id.split("/")[0])
        repo = self.repo(repo_id)
        if self.hub.raced is not None:
            meanwhile, self.hub.raced = self.hub.raced, None
            meanwhile()
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        head = self.commit_of(repo, branch)
        if header.get("parentCommit") not in (None, head):
            raise Error(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise Error(400, message=f"this Hub does not know {other}")
        sha = repo.commit(branch, files, header["summary"])
        self.say({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def info(self, repo_id: str, rest: list[str]) -> None:
        repo = self.repo(repo_id)
        match rest:
            case []:
                sha = self.commit_of(repo, "main")
            case ["revision", *revision]:
                sha = self.commit_of(repo, "/".join(revision))
            case ["tree", revision, *_]:
                files = repo.commits[self.commit_of(repo, revision)]
                return self.say([self.entry(path, data) for path, data in files.items()])
            case ["refs"]:
                heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.refs.items()]
                return self.say({"branches": heads, "tags": [], "converts": []})
            case _:
                raise Error(404, message="no such thing")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self.say({"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "gated": repo.gated, "siblings": siblings,
                  "tags": []})  # fmt: skip

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        found = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return {**found, "lfs": lfs} if is_large(path) else found

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id)
        if repo.gated and self.user() != repo_id.split("/")[0]:
            raise Error(401 if self.user() is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted.")
        sha = self.commit_of(repo, revision)
        if path not in repo.commits[sha]:
            self.send_entry_not_found(sha)
            return
        data = repo.commits[sha][path]
        headers = {"X-Repo-Commit": sha}
        if not is_large(path):
            return self.file(data, {**headers, "ETag": f'"{blob_id(data)}"'}, path)
        oid = hashlib.sha256(data).hexdigest()
        self.hub.large[oid] = data
        self.hub.cut.update({oid: n for p, n in self.hub.cut.items() if p == path})
        headers |= {
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.cdn}/cdn/{oid}",
        }
        self.send(b"", 302, headers)

    def send_entry_not_found(self, sha: str) -> None:
        headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
        self.send(b"Entry not found", 404, headers)

    def leak(self) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaked.append(self.headers["Authorization"])

    def file(self, data: bytes, headers: dict[str, str], name: str) -> None:
        start = self.headers.get("Range", "").removeprefix("bytes=").rstrip("-")
        if start.isdigit():
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.send(data[int(start) :], 206, headers)
        self.send(data[: self.hub.cut.get(name, len(data))], 200, headers)
