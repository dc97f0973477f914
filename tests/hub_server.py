"""A small Hub on loopback: resolve, redirect to a second server, ranges, errors, broken transfers.

It speaks as much of the Hub's protocol as `huggingface_hub` uses to download a file: the Hub
answers /org/name/resolve/revision/file with the commit, the ETag and a redirect; the store behind
it, another origin as in reality, holds the bytes.
"""

import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants


@pytest.fixture
def loopback_hub(tmp_path, monkeypatch):
    """A Hub on loopback which this process asks, with a fresh cache in tmp_path.

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
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


class HubServer:
    """Repositories to publish into, and a list of what was asked of it.

    Usage: `with HubServer() as hub: hub.publish("org/name", "file", b"..."); hub.endpoint`.
    """

    def __init__(self):
        self.commits = {}  # repository -> {commit: {file: content}}, the last is main
        self.tokens = {}  # repository -> the token that it wants
        self.moved = {}  # old name -> new name
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
        history = self.commits.setdefault(repo_id, {})
        files = dict(history[list(history)[-1]]) if history else {}
        files[filename] = content
        commit = hashlib.sha1(f"{repo_id}{len(history)}{filename}".encode()).hexdigest()
        history[commit] = files
        return commit

    def asked(self, server, method):
        """Headers of the requests of one method that one of the two servers got."""
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
        if "/resolve/" not in self.path:
            return self.answer(404)
        repo_id, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, filename = rest.partition("/")
        return self.resolve(repo_id, revision, filename)

    do_GET = do_HEAD

    def resolve(self, repo_id, revision, filename):
        hub = self.server.hub
        if repo_id in hub.moved:
            there = f"/{hub.moved[repo_id]}/resolve/{revision}/{filename}"
            return self.answer(307, {"Location": there})
        given = self.headers.get("Authorization")
        if repo_id not in hub.commits:  # the Hub hides from strangers whether it is private
            return self.answer(404 if given else 401, {"X-Error-Code": "RepoNotFound"})
        wanted = hub.tokens.get(repo_id)
        if wanted and given is None:
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if wanted and given != f"Bearer {wanted}":
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self.answer(401, said)
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

    def do_GET(self):
        self.note()
        hub = self.server.hub
        content = hub.find(self.path.strip("/"))
        if content is None:
            return self.answer(404)
        first, headers, status = 0, {"ETag": f'"{self.path.strip("/")}"'}, 200
        if "Range" in self.headers:
            first = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            status = 206
        body = content[first:]
        if not hub.cuts:
            return self.answer(status, headers, body)
        # Promise everything, send a part, hang up.
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: hub.cuts.pop(0)])
        self.close_connection = True
        return None
