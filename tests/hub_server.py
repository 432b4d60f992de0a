# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face hub: the few requests that its client makes."""

import contextlib
import hashlib
import http.server
import json
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Files of one repository, and what goes wrong with them."""

    daemon_threads = True

    def __init__(self, repo, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.files = repo, dict(files)
        self.error = None  # (status, X-Error-Code)
        self.corrupt: dict[str, int] = {}  # name -> times it comes otherwise
        self.broken: dict[str, int] = {}  # name -> times the connection ends midway
        self.asked: list[tuple[str, str, str]] = []  # (method, path, range)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Connections end midway on purpose."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Says nothing."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        server = self.server
        path = self.path.partition("?")[0]
        server.asked.append((self.command, path, self.headers.get("Range", "")))
        if server.error:
            self._send(server.error[0], b"{}", {"X-Error-Code": server.error[1]}, body)
            return
        api = f"/api/models/{server.repo}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self._send(200, json.dumps(self._info()).encode(), {}, body)
        elif path.startswith(api + "/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        elif path.startswith(f"/{server.repo}/resolve/{COMMIT}/"):
            self._file(path.split(COMMIT + "/")[1], body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _info(self):
        siblings = []
        for name, data in self.server.files.items():
            one = {"rfilename": name, "size": len(data), "blobId": git_id(data)}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(data).hexdigest()
                one["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(one)
        return {"id": self.server.repo, "sha": COMMIT, "siblings": siblings}

    def _file(self, name, body):
        server, data = self.server, self.server.files[name]
        etag = git_id(data)
        if name.endswith(".safetensors"):
            etag = hashlib.sha256(data).hexdigest()
        if body and server.corrupt.get(name, 0) > 0:
            server.corrupt[name] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, start = 200, 0
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        if self.headers.get("Range"):
            status, start = 206, int(self.headers["Range"][6:].partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["X-Linked-Size"] = str(len(data))
        rest = data[start:]
        if body and server.broken.get(name, 0) > 0:
            server.broken[name] -= 1
            self._send(status, rest, headers, body, stop=len(rest) // 2)
            return
        self._send(status, rest, headers, body)

    def _send(self, status, data, headers, body, stop=None):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:stop])
        if stop is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


@contextlib.contextmanager
def serving(repo, files):
    """A server of a repository, in a thread."""
    server = Server(repo, files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
