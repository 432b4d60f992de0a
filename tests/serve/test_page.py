# SPDX-License-Identifier: Apache-2.0
"""The chat page: what is sent, over plain HTTP. `test_page_browser.py` uses it."""

import html.parser
import http.client
import json
import pathlib
import re
import subprocess
import sys

import pytest

from qwen_jax.serve import page
from tests.serve import servers

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "qwen_jax" / "serve" / "page"
KEY = "right-key-1234"
VOID = ("meta", "link", "input")


@pytest.fixture(scope="module")
def locked():
    with servers.running(keys=[KEY]) as one:
        yield one


def fetched(server, path, method="GET"):
    """(status, headers with small names, body); the path goes out as it is."""
    one = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        one.request(method, path)
        answer = one.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read()
    finally:
        one.close()


@pytest.mark.parametrize(
    "path, name, kind",
    [
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/page.css", "page.css", "text/css; charset=utf-8"),
        ("/page.js", "page.js", "text/javascript; charset=utf-8"),
    ],
)
def test_the_files_need_no_key_and_are_bound_by_their_headers(locked, path, name, kind):
    status, headers, body = fetched(locked, path)
    assert status == 200 and body == (FOLDER / name).read_bytes()
    assert headers["content-type"] == kind
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in headers and "access-control-allow-origin" not in headers
    policy = dict(
        one.strip().partition(" ")[::2]
        for one in headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    status, short, body = fetched(locked, path, "HEAD")
    assert (status, body) == (200, b"")
    assert short["content-length"] == headers["content-length"]


def test_the_api_behind_the_page_still_wants_the_key(locked):
    for path in ("/v1/models", "/metrics", "/version", "/page", "/page.js/", "/x"):
        assert fetched(locked, path)[0] == 401, path
    status, headers, body = fetched(locked, "/", "POST")
    assert status == 405 and headers["allow"] == "GET, HEAD"
    assert json.loads(body)["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/page.py",
        "/page/",
        "/page/index.html",
        "/page.js/",
        "/page.js/..",
        "//page.js",
        "/./page.js",
        "/x/../page.js",
        "/../page.py",
        "/..%2fpage.py",
        "/%2e%2e/page.py",
        "/page/../page.py",
        "/page.js%00",
        "/page.js%00.html",
        "/PAGE.JS",
        "/..\\page.py",
        "/page.css;/../page.py",
        "/etc/passwd",
        "/favicon.ico",
    ],
)
def test_no_other_path_leads_to_a_file(hermes, path):
    status, headers, body = fetched(hermes, path)
    assert (status, headers["content-type"]) == (404, "application/json")
    assert json.loads(body)["error"]["code"] == "unknown_url"


def test_a_server_that_ends_gives_no_page():
    with servers.running() as one:
        one.app.draining = True
        assert fetched(one, "/")[0] == 503


class Marks(html.parser.HTMLParser):
    """All elements, what is open, and the text in scripts and styles."""

    def __init__(self):
        super().__init__()
        self.seen, self.open, self.inline = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["script"], ["style"]) and data.strip():
            self.inline.append(data)


def test_the_page_names_nothing_outside_and_has_no_inline_code():
    marks = Marks()
    marks.feed((FOLDER / "index.html").read_text())
    assert not marks.open and not marks.inline
    own = {path[1:] for path in page.FILES} - {""}
    loaded = [a[n] for _, a in marks.seen for n in ("src", "href") if n in a]
    assert own == {one for one in loaded if one != "data:,"}
    for tag, attributes in marks.seen:
        assert tag not in ("style", "iframe", "object", "embed", "base", "img"), tag
        assert not [n for n in attributes if n.startswith("on") or n == "style"], tag
    ids = [attributes["id"] for _, attributes in marks.seen if "id" in attributes]
    script = (FOLDER / "page.js").read_text()
    asked = set(re.findall(r'\bat\("([^"]+)"\)', script))
    assert len(ids) == len(set(ids)) and asked <= set(ids)


def test_no_asset_reaches_out_or_makes_markup_of_text():
    assert {one.name for one in FOLDER.iterdir()} == {n for n, _ in page.FILES.values()}
    for path in FOLDER.iterdir():
        text = path.read_text()
        assert not re.findall(r"(?i)\w+://|[\"'(]//|\burl\(|@import|wss?:", text), path
        sinks = r"(?i)innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b"
        sinks += r"|new Function|srcdoc|localStorage|document\.cookie|DOMParser"
        assert not re.findall(sinks, text), path
        assert len(text) < 20_000, path


def test_the_files_are_among_the_package_data():
    """By setuptools itself, in a process of its own."""
    program = (
        "from setuptools import Distribution; d = Distribution();"
        "d.parse_config_files(['setup.cfg']); b = d.get_command_obj('build_py');"
        "b.ensure_finalized();"
        "print(*[f'{p}:{n}' for p, _, _, names in b.data_files for n in names])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = done.stdout.split()
    for name, _ in page.FILES.values():
        assert f"qwen_jax.serve:page/{name}" in found
