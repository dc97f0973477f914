"""A small Hub on loopback: resolve, redirect to a second server, errors, broken transfers.

It speaks as much of the Hub's protocol as `huggingface_hub` uses to download and upload a file: the
Hub answers /org/name/resolve/revision/file with the commit, the ETag and a redirect; the store
behind it, another origin as in reality, holds the bytes. An upload makes the repository, asks which
files are large, puts those into the store, and commits all of them at once.
"""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants


@pytest.fixture
def loopback_hub(tmp_path, monkeypatch):
    """A Hub on loopback for this process, with a fresh cache in tmp_path.

    huggingface_hub reads its environment when it is imported, hence its constants.
    """
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with HubServer() as hub:
        form = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", form)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go by LFS
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


class HubServer:
    """Repositories to publish into, and a log of requests.

    Usage: `with HubServer() as hub: hub.publish("org/name", "file", b"..."); hub.endpoint`.
    """

    def __init__(self):
        self.commits = {}  # repository -> {commit: {file: content}}, the last is main
        self.gated = set()  # repositories that nobody may read
        self.owners = {}  # token that may write -> whose it is
        self.private = set()  # repositories that were made private
        self.uploaded = {}  # hash -> content in the store that no commit names yet
        self.cuts = []  # numbers of bytes after which the next transfers break off
        self.requests = []  # (server, method, path, headers)
        self._hub = _Server(self, _HubHandler)
        self._store = _Server(self, _StoreHandler)

    def __enter__(self):
        for server in (self._hub, self._store):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self):
        """For HF_ENDPOINT."""
        return self._hub.address

    @property
    def store(self):
        """Where the Hub redirects to."""
        return self._store.address

    def publish(self, repo_id, filename, content):
        """Add or replace a file; returns the new commit."""
        return self.commit(repo_id, {filename: content})

    def commit(self, repo_id, changed):
        """Add or replace files, name -> content; returns the new commit."""
        history = self.commits.setdefault(repo_id, {})
        commit = hashlib.sha1(f"{repo_id}{len(history)}{sorted(changed)}".encode()).hexdigest()
        history[commit] = self.files(repo_id) | changed
        return commit

    def files(self, repo_id):
        """The files of the newest commit, name -> content."""
        history = self.commits[repo_id]
        return dict(history[list(history)[-1]]) if history else {}

    def headers_of(self, server, method):
        """Headers of the requests with one method to one of the two servers."""
        return [headers for s, m, _, headers in self.requests if (s, m) == (server, method)]

    def find(self, digest):
        """Published content by its hash."""
        for history in self.commits.values():
            for files in history.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == digest:
                        return content
        return None


class _Server(ThreadingHTTPServer):
    def __init__(self, hub, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    name = ""

    def log_message(self, *_):
        pass

    def note(self):
        self.server.hub.requests.append((self.name, self.command, self.path, dict(self.headers)))

    def answer(self, status, headers=None, body=b""):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _HubHandler(_Handler):
    name = "hub"

    def do_HEAD(self):
        self.note()
        if self.path.startswith("/api/models/") and "/tree/" in self.path:
            return self.tree(*self.path.partition("?")[0][len("/api/models/") :].split("/tree/"))
        if "/resolve/" not in self.path:
            return self.answer(404)
        repo_id, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, filename = rest.partition("/")
        return self.resolve(repo_id, revision, filename)

    do_GET = do_HEAD

    def do_POST(self):
        self.note()
        hub, path = self.server.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            is_page = json.loads(body)["content"].startswith("---\n")
            return self.reply(200 if is_page else 400, {"errors": [{"message": "no metadata"}]})
        owner = hub.owners.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if owner is None:
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(owner, json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self.offer_store(json.loads(body)["objects"])
        repo_id, what = path.removeprefix("/api/models/").removesuffix("/main").rsplit("/", 1)
        if what == "preupload":
            return self.sort_by_size(json.loads(body)["files"])
        return self.commit(repo_id, [json.loads(line) for line in body.splitlines()])

    def create(self, owner, wanted):
        hub = self.server.hub
        repo_id = f"{wanted.get('organization') or owner}/{wanted['name']}"
        if not repo_id.startswith(f"{owner}/"):
            return self.reply(403, {"error": "You don't have the rights"})
        is_new = repo_id not in hub.commits
        if is_new:
            hub.commits[repo_id] = {}
            is_hidden = wanted.get("private") or wanted.get("visibility") == "private"
            hub.private |= {repo_id} if is_hidden else set()
        return self.reply(200 if is_new else 409, {"url": f"{hub.endpoint}/{repo_id}"})

    def offer_store(self, objects):
        store = self.server.hub.store
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{store}/{entry['oid']}"}}
        return self.reply(200, {"objects": objects, "transfer": "basic"})

    def sort_by_size(self, files):
        is_large = {file["path"]: file["path"].endswith(".safetensors") for file in files}
        modes = [
            {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            for path, large in is_large.items()
        ]
        return self.reply(200, {"files": modes})

    def commit(self, repo_id, lines):
        hub, changed = self.server.hub, {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = hub.uploaded[value["oid"]]
        commit = hub.commit(repo_id, changed)
        url = f"{hub.endpoint}/{repo_id}/commit/{commit}"
        return self.reply(200, {"commitUrl": url, "commitOid": commit})

    def reply(self, status, content):
        """An answer in JSON."""
        body = json.dumps(content).encode()
        self.answer(status, {"Content-Type": "application/json", "Content-Length": len(body)}, body)

    def tree(self, repo_id, revision):
        """The list of a revision's files."""
        history = self.server.hub.commits.get(repo_id, {})
        commit = list(history)[-1] if history and revision == "main" else revision
        if commit not in history:
            return self.reply(404, {"error": "no such repository or revision"})
        files = history[commit].items()
        entries = [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
            }
            for path, content in files
        ]
        return self.reply(200, entries)

    def resolve(self, repo_id, revision, filename):
        hub = self.server.hub
        given = self.headers.get("Authorization")
        if repo_id not in hub.commits:  # the Hub hides from strangers whether it is private
            return self.answer(404 if given else 401, {"X-Error-Code": "RepoNotFound"})
        if repo_id in hub.gated:
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        history = hub.commits[repo_id]
        commit = list(history)[-1] if revision == "main" else revision
        if commit not in history:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if filename not in history[commit]:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = history[commit][filename]
        digest = hashlib.sha256(content).hexdigest()
        return self.answer(
            302,
            {
                "Location": f"{hub.store}/{digest}",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "ETag": f'"{commit}"',
            },
        )


class _StoreHandler(_Handler):
    name = "store"

    def do_PUT(self):
        self.note()
        if self.server.hub.cuts:
            self.server.hub.cuts.pop(0)
            self.close_connection = True
            return None
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.strip("/")
        self.server.hub.uploaded[self.path.strip("/")] = content
        return self.answer(200)

    def do_GET(self):
        self.note()
        hub = self.server.hub
        content = hub.find(self.path.strip("/"))
        if content is None:
            return self.answer(404)
        if not hub.cuts:
            return self.answer(200, {"ETag": f'"{self.path.strip("/")}"'}, content)
        # Promise everything, send a part, hang up.
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: hub.cuts.pop(0)])
        self.close_connection = True
        return None
