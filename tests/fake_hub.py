"""The part of the Hugging Face Hub's HTTP API that push and pull use, on 127.0.0.1."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

OWNER, TOKEN, REVISION = "me", "hf_good", "0123456789" * 4


@dataclass
class Hub:
    """One owner's repositories: the files of each by name, and which are private.

    `sizes` overrides the reported sizes of files, by file name.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    address: str = ""
    sizes: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def running(patch, folder, token=TOKEN):
    """Serve a fake Hub, and make `huggingface_hub` use it alone.

    Args:
      patch: A MonkeyPatch.
      folder: The folder for the cache; it contains no login token.
      token: The value of HF_TOKEN; None for a user who is not logged in.
    """
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    point_at(patch, hub.address)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(patch, address):
    """Set the endpoint as HF_ENDPOINT does when a process starts."""
    patch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

        def _send(self, status, body=b"", **headers):
            self.send_response(status)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            for name, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _lacks(self, what):
            words = {"RepoNotFound": "Repository not found"}.get(what, what)
            status = 401 if what == "RepoNotFound" and not self._known() else 404
            self._send(status, X_Error_Code=what, X_Error_Message=words)

        def _known(self):
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def _files(self, repository):
            if repository in hub.private and not self._known():
                return None
            return hub.files.get(repository)

        def _body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers["Content-Length"]))

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            if found := re.match(r"/api/models/(\w+/[\w.-]+)", self.path):
                files = self._files(found[1])
                if files is None:
                    return self._lacks("RepoNotFound")
                siblings = [
                    {"rfilename": name, "size": hub.sizes.get(name, len(data))}
                    for name, data in files.items()
                ]
                answer = {"id": found[1], "sha": REVISION, "siblings": siblings}
                return self._send(200, answer)
            place = rf"/(\w+/[\w.-]+)/resolve/{REVISION}/(.+)"
            if found := re.fullmatch(place, self.path):
                files = self._files(found[1])
                if files is None:
                    return self._lacks("RepoNotFound")
                if found[2] not in files:
                    return self._lacks("EntryNotFound")
                data = files[found[2]]
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                return self._send(200, data, ETag=etag, X_Repo_Commit=REVISION)
            return self._lacks("RepoNotFound")

        def do_POST(self):
            body = self._body()
            if not self._known():
                words = "Invalid credentials in Authorization header"
                return self._send(401, {"error": words}, X_Error_Message=words)
            if self.path == "/api/repos/create":
                return self._create(json.loads(body))
            if self.path == "/api/validate-yaml":
                wrong = b"license: none of the hub" in body
                errors = [{"message": '"license" must be one of …'}] * wrong
                return self._send(400 if wrong else 200, {"errors": errors})
            found = re.fullmatch(r"/api/models/(\w+/[\w.-]+)/(\w+)/main", self.path)
            if not found or found[1] not in hub.files:
                return self._lacks("RepoNotFound")
            if found[2] == "preupload":
                plain = {"uploadMode": "regular", "shouldIgnore": False}
                files = [
                    {"path": f["path"], **plain} for f in json.loads(body)["files"]
                ]
                return self._send(200, {"files": files})
            for value in map(json.loads, body.splitlines()):
                if value["key"] == "header":
                    hub.commits.append(value["value"]["summary"])
                else:
                    path, content = value["value"]["path"], value["value"]["content"]
                    hub.files[found[1]][path] = base64.b64decode(content)
            url = f"{constants.ENDPOINT}/{found[1]}"
            url = f"{url}/commit/{REVISION}"
            self._send(200, {"commitUrl": url, "commitOid": REVISION})

        def _create(self, wanted):
            name = f"{wanted['organization']}/{wanted['name']}"
            answer = {"url": f"{constants.ENDPOINT}/{name}"}
            if wanted["organization"] != OWNER:
                return self._send(403, {"error": "You have no right to create a model"})
            if name in hub.files:
                return self._send(409, {"error": "it is there already", **answer})
            hub.files[name] = {}
            if wanted.get("visibility") == "private" or wanted.get("private"):
                hub.private.add(name)
            self._send(200, answer)

    return Handler
