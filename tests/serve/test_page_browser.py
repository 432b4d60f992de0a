# SPDX-License-Identifier: Apache-2.0
"""The chat page in a real, headless Chromium, in front of a server with a fake engine.

Needs `pip install -e .[browser]` and a `chromium` on the PATH (Debian: apt-get install
chromium); without either the file is skipped. The browser is not downloaded by
playwright, and nothing but the test's own server is asked for anything.
"""

import base64
import io
import json
import os
import re
import shutil
import time

import pytest

from tests.data import chat_templates
from tests.serve import fake_engine, scripts, servers

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install -e .[browser]"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium on the PATH: apt-get install chromium"
)

KEY, DELAY_S = "right-key-1234", 0.03
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> <b>bold</b> &lt; "
HOSTILE += "<script>document.title='owned'</script>"
CODE = "Look:\n\n```html\n<i>1</i>\n\n  2\n```\nand ``` here.\n\n~~~\nopen </pre>"
SCRIPT = scripts.SCRIPT | {
    "count": " ".join(str(i) for i in range(40)),
    "attack me": HOSTILE,
    "code please": CODE,
    "my name is Ada": "Hello Ada.",
}
DONE = "article:last-of-type[aria-busy=false]"
WATCH = """() => {
  window.seen = [];
  const hidden = (id) => document.getElementById(id).hidden;
  new MutationObserver(() => {
    const text = document.querySelector(".content").textContent;
    seen.push([text, !hidden("stop"), !hidden("send")]);
  }).observe(document.getElementById("log"), {
    childList: true, characterData: true, subtree: true });
}"""
LAST = "article:last-of-type"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = play.chromium.launch(executable_path=CHROMIUM, args=root)
        yield made
        made.close()


@pytest.fixture(scope="module")
def server():
    model = fake_engine.model(chat_templates.THINKING)
    with servers.running(model, SCRIPT) as one:
        yield one


@pytest.fixture()
def opened(browser, server):
    """Opens the page; at the end nothing may have gone wrong or to others."""
    pages, odd = [], []

    def open_page(url=server.url, before=None, **how):
        page = browser.new_context(**how).new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: odd.append(str(error)))
        page.on("console", lambda line: odd.append(line.text) if bad(line) else None)
        page.on("request", lambda asked: asked.url.startswith(url) or odd.append(asked))
        if before is not None:
            before(page)
        page.goto(url)
        pages.append(page)
        return page

    def bad(line):
        # The browser itself writes a line for an answer such as 429.
        return line.type == "error" and "Failed to load resource" not in line.text

    engine = server.engine
    engine.seen.clear()
    engine.delay_s, engine.full, engine.fault = 0.0, False, None
    open_page.odd = odd
    yield open_page
    engine.delay_s, engine.full, engine.fault = 0.0, False, None
    for page in pages:
        page.context.close()
    assert not odd


def say(page, text, wait=True):
    page.wait_for_selector("#send:enabled")
    page.fill("#said", text)
    page.press("#said", "Enter")
    if wait:
        page.wait_for_selector(DONE)


def content(page):
    return page.locator(f"{LAST} .content").text_content()


def told(server, at=-1):
    """The prompt that the engine was asked, as text."""
    return server.engine.model.tokenizer.decode(server.engine.seen[at].prompt)


def until(holds, most_s=5.0):
    end_s = time.monotonic() + most_s
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_an_answer_is_shown_as_it_comes_with_its_figures(opened, server):
    server.engine.delay_s = DELAY_S
    page = opened()
    page.evaluate(WATCH)
    say(page, "count")
    seen = page.evaluate("seen")
    texts = [text for text, *_ in seen if text]
    assert len(set(texts)) > 9 and all(SCRIPT["count"].startswith(x) for x in texts)
    assert {tuple(rest) for text, *rest in seen if text and text != texts[-1]} == {
        (True, False)
    }
    assert content(page) == SCRIPT["count"]
    assert page.is_visible("#send") and not page.is_visible("#stop")
    figures = page.locator(".figures").text_content()
    found = re.fullmatch(
        r"(\d+) tokens in ([\d.]+) s, ([\d.]+) tokens/s · first token after (\d+) ms"
        r" · prompt of (\d+) tokens",
        figures,
    )
    words = server.engine.model.tokenizer
    count, took_s = len(words.encode(SCRIPT["count"])) + 1, float(found[2])
    assert int(found[1]) == count
    assert (count - 1) * DELAY_S < took_s < 30  # it waits so long between two
    assert abs(float(found[3]) - count / took_s) < 0.3
    assert 0 < float(found[4]) / 1000 < took_s
    assert int(found[5]) == len(server.engine.seen[-1].prompt)


def test_a_conversation_goes_on_and_can_be_cleared(opened, server):
    page = opened()
    say(page, "my name is Ada")
    say(page, "count")
    user, end = "<|im_start|>user\n", "<|im_end|>\n"
    before = f"{user}my name is Ada{end}<|im_start|>assistant\nHello Ada.{end}"
    assert told(server).startswith(f"{before}{user}count{end}")
    page.click("#clear")
    assert page.locator("article").count() == 0 and page.is_visible("#empty")
    assert page.is_disabled("#again") and page.is_disabled("#clear")
    say(page, "count")
    assert told(server).startswith(f"{user}count{end}")


def test_thinking_is_folded_and_not_told_again(opened, server):
    page = opened()
    say(page, "think hard")
    assert content(page) == "The answer."
    assert page.locator("details.thinking").get_attribute("open") is None
    assert not page.is_visible("text=First 1.")
    page.locator("details.thinking summary").press("Enter")
    assert page.inner_text("details.thinking .text") == "First 1.\n\nThen 2."
    assert "of thinking)" in page.locator(".figures").text_content()
    say(page, "count")
    assert "The answer." in told(server) and "First 1." not in told(server)
    assert not page.is_visible(f"{LAST} details.thinking")


@pytest.mark.parametrize("how", ["Escape", "#stop"])
def test_stop_ends_the_request_and_keeps_what_came(opened, server, how):
    server.engine.delay_s = 5 * DELAY_S
    page = opened()
    say(page, "count", wait=False)
    until(lambda: len(content(page)) > 9)
    page.keyboard.press(how) if how == "Escape" else page.click(how)
    page.wait_for_selector(DONE)
    request = server.engine.seen[-1]
    until(lambda: request.id in server.engine.cancelled)
    kept = content(page)
    assert 9 < len(kept) < len(SCRIPT["count"]) and SCRIPT["count"].startswith(kept)
    figures = page.locator(".figures").text_content()
    assert figures.endswith(" · stopped")
    words = server.engine.model.tokenizer
    count = int(re.match(r"(\d+) tokens? in [\d.]+ s, ", figures)[1])
    assert 0 <= count - len(words.encode(kept)) <= 1  # one may be half a code point
    assert page.locator(".error").text_content() == ""
    assert page.evaluate("document.activeElement.id") == "said"
    server.engine.delay_s = 0.0
    page.click("#again")
    sync_api.expect(page.locator(".figures")).to_contain_text("tokens/s")
    assert content(page) == SCRIPT["count"]
    assert server.engine.seen[-1].prompt == request.prompt


def test_what_a_model_says_stays_text(opened, server):
    page = opened()
    say(page, "attack me " + HOSTILE + " attack me")
    assert content(page) == HOSTILE
    assert page.locator(".asked").text_content() == f"attack me {HOSTILE} attack me"
    assert page.locator("#log img, #log script, #log b").count() == 0
    assert page.title() == "qwen_jax"
    say(page, "code please")
    parts = page.locator(f"{LAST} .content > *")
    assert parts.evaluate_all("all => all.map(x => [x.localName, x.textContent])") == [
        ["p", "Look:"],
        ["pre", "<i>1</i>\n\n  2"],
        ["p", "and ``` here."],
        ["pre", "open </pre>"],
    ]


def test_the_policy_holds_in_the_browser(opened, server):
    page = opened()
    other = f"http://localhost:{server.port}/health"
    blocked = page.evaluate(
        """async (other) => {
          const found = [];
          const seen = (event) => found.push(event.effectiveDirective);
          document.addEventListener("securitypolicyviolation", seen);
          const tries = [
            () => (document.body.innerHTML = "<b>markup</b>"),
            () => import("data:text/javascript,document.title='owned'"),
            () => fetch(other),
            () => document.body.setAttribute("style", "color: red"),
            () => (new Image().src = other),
            () => document.body.append(
              Object.assign(document.createElement("iframe"), { src: other })),
          ];
          for (const one of tries) await (async () => one())().catch(() => null);
          await new Promise((done) => setTimeout(done, 200));
          return found;
        }""",
        other,
    )
    wanted = ["require-trusted-types-for", "script-src-elem", "connect-src"]
    assert blocked == [*wanted, "style-src-attr", "img-src", "frame-src"]
    assert page.title() == "qwen_jax" and page.locator("b").count() == 0
    opened.odd.clear()  # the browser names each in its console


def test_the_key_is_asked_for_used_and_kept_in_the_tab_alone(opened, browser):
    model = fake_engine.model(chat_templates.THINKING)
    with servers.running(model, SCRIPT, keys=[KEY]) as locked:
        page = opened(locked.url, viewport={"width": 390, "height": 844})
        sync_api.expect(page.locator("#key")).to_be_focused()
        assert "No API key provided" in page.locator("#status").text_content()
        for wrong in ("wrong-key-1234", "schlüssel-1234"):
            page.fill("#key", wrong)
            page.press("#key", "Enter")
            words = "Incorrect API key provided." if wrong.isascii() else "no key has"
            sync_api.expect(page.locator("#status")).to_contain_text(words)
            assert page.is_disabled("#send") and page.is_disabled("#model")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        say(page, "my name is Ada")
        assert content(page) == "Hello Ada."
        assert page.locator("#status").text_content() == ""
        kept = "[JSON.stringify(localStorage), document.cookie, location.href]"
        assert KEY not in "".join(page.evaluate(kept))
        page.reload()
        page.wait_for_selector("#send:enabled")
        assert page.input_value("#key") == KEY
        locked.app._keys._digests = [b"x" * 32]  # another key from now on
        say(page, "count")
        assert page.inner_text(f"{LAST} .error") == "Incorrect API key provided."
        assert page.evaluate("document.activeElement.id") == "key"


def test_errors_are_shown_in_words_and_a_failed_turn_is_not_told(opened, server):
    server.engine.full = True
    page = opened()
    say(page, "think hard")
    assert "more requests than it can take" in page.inner_text(".error")
    server.engine.full = False
    say(page, "count")
    assert "think hard" not in told(server)
    server.engine.fault = "piece"
    say(page, "count")
    assert content(page) and "The server had an error" in page.inner_text(
        f"{LAST} .error"
    )
    server.engine.fault = None
    page.click("#again")
    sync_api.expect(page.locator(f"{LAST} .figures")).to_contain_text("tokens/s")
    assert page.locator(f"{LAST} .error").text_content() == ""
    assert content(page) == SCRIPT["count"]


def test_a_stream_that_breaks_or_is_no_stream_is_told(opened):
    bodies = [
        'data: {"choices":[{"index":0,"delta":{"content":"Half"}}]}\n\n',
        "data: {what}\n\n",
        'data: {"error":{"message":"The guard is down."}}\n\ndata: [DONE]\n\n',
    ]

    def before(page):
        kind = "text/event-stream"
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=bodies.pop(0), content_type=kind),
        )

    page = opened(before=before)
    say(page, "a")
    assert content(page) == "Half"
    assert "connection broke" in page.inner_text(f"{LAST} .error")
    say(page, "b")
    assert "The answer is odd" in page.inner_text(f"{LAST} .error")
    say(page, "c")
    assert page.inner_text(f"{LAST} .error") == "The guard is down."


def test_a_server_that_is_gone_is_told(opened, server):
    page = opened()
    page.wait_for_selector("#send:enabled")
    page.context.set_offline(True)
    say(page, "a")
    assert page.inner_text(".error") == "The server cannot be reached."


def test_models_are_waited_for_and_picked(opened, server):
    asked, lists = [], [[], [{"id": "tiny"}, {"id": "tiny:<b>poet</b>"}]]

    def before(page):
        page.route(
            "**/v1/models",
            lambda route: route.fulfill(json={"object": "list", "data": lists.pop(0)}),
        )

        def answer(route):
            asked.append(json.loads(route.request.post_data))
            route.fulfill(body="data: [DONE]\n\n", content_type="text/event-stream")

        page.route("**/v1/chat/completions", answer)

    page = opened(before=before)
    sync_api.expect(page.locator("#status")).to_contain_text("being loaded")
    assert page.is_disabled("#send")
    page.wait_for_selector("#model:enabled")
    assert page.locator("#model option").all_text_contents()[1] == "tiny:<b>poet</b>"
    page.select_option("#model", index=1)
    say(page, "hello")
    assert asked == [
        {
            "model": "tiny:<b>poet</b>",
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ]


def test_images_go_with_their_message(opened):
    """Where the model takes some; large ones are made smaller, and one taken out."""
    asked, Image = [], pytest.importorskip("PIL.Image")
    cards = [{"id": "blind", "max_images": 0}, {"id": "sees", "max_images": 3}]

    def before(page):
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": cards}))

        def answer(route):
            asked.append(json.loads(route.request.post_data)["messages"])
            chunk = {"choices": [{"delta": {"content": "a square"}}]}
            body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
            route.fulfill(body=body, content_type="text/event-stream")

        page.route("**/v1/chat/completions", answer)

    def file(name, size, kind="PNG"):
        made = io.BytesIO()
        Image.new("RGB", size, (255, 0, 0)).save(made, kind)
        return {"name": name, "mimeType": "image/png", "buffer": made.getvalue()}

    page = opened(before=before)
    page.wait_for_selector("#send:enabled")
    assert page.is_hidden("#attach")
    page.select_option("#model", "sees")
    assert page.is_visible("#attach")
    page.set_input_files("#picture", [file("a", (40, 20)), file("b", (3000, 1500))])
    page.wait_for_selector("#pictures button:nth-child(2)")
    page.set_input_files("#picture", file("c", (9, 9)) | {"buffer": b"no image"})
    sync_api.expect(page.locator("#status")).to_contain_text("no image")
    page.click("#pictures button:first-child")
    say(page, "what is it?")
    (only,) = asked[0]
    image, text = only["content"]
    assert text == {"type": "text", "text": "what is it?"}
    kind, _, data = image["image_url"]["url"].partition(",")
    assert (image["type"], kind) == ("image_url", "data:image/jpeg;base64")
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert sent.size == (1024, 512) and sent.getpixel((9, 9))[0] > 250
    assert page.locator("#pictures img").count() == 0
    assert page.locator(f"{LAST} .asked img").count() == 1
    say(page, "and now?")  # the image is in the history, not in what is asked now
    assert asked[1][0] == only and asked[1][2] == {
        "role": "user",
        "content": "and now?",
    }


def test_settings_reach_the_engine(opened, server):
    page = opened()
    page.wait_for_selector("#send:enabled")
    given = {"temperature": "0.7", "top_p": "0.9", "top_k": "5", "max_tokens": "7"}
    for name, value in (given | {"seed": "-42", "system": "Be brief."}).items():
        page.fill(f"#{name}", value)
    page.select_option("#thinking", "off")
    say(page, "count")
    request = server.engine.seen[-1]
    drawn = request.sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.7, 0.9, 5)
    assert (request.max_tokens, drawn.seed) == (7, -42 % 2**63)
    assert told(server).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert told(server).endswith("<think>\n\n</think>\n\n")
    assert page.inner_text(".figures").endswith("no more tokens were allowed")
    page.fill("#temperature", "3")
    page.fill("#said", "count")
    page.press("#said", "Enter")
    assert page.evaluate("document.activeElement.id") == "temperature"
    assert page.input_value("#said") == "count" and len(server.engine.seen) == 1


def test_events_are_read_wherever_they_are_cut(opened):
    """Every cut of every line ending, and cuts of a character's bytes."""
    page = opened()
    text = (
        ': ping\n\ndata: {"a": "é🙂"}\n\nevent: x\ndata:1\r\ndata:  2\r\n\r\ndata\r\r'
    )
    text += "id: 1\n\ndata: [DONE]\n\ndata: cut off"
    wanted = ['{"a": "é🙂"}', "1\n 2", "", "[DONE]"]
    found = page.evaluate(
        """async (text) => {
          const { Events } = await import("/page.js");
          const bytes = new TextEncoder().encode(text);
          const read = (cuts) => {
            const events = new Events(), decoder = new TextDecoder(), found = [];
            cuts = [...cuts, bytes.length];
            let from = 0;
            for (const to of cuts) {
              const piece = bytes.subarray(from, to);
              found.push(...events.push(decoder.decode(piece, { stream: true })));
              from = to;
            }
            return JSON.stringify(found);
          };
          const all = new Set([read([]), read([...bytes.keys()])]);
          for (let i = 0; i < bytes.length; i++)
            for (let j = i; j < bytes.length; j++) all.add(read([i, j]));
          return [...all];
        }""",
        text,
    )
    assert [json.loads(one) for one in found] == [wanted]


def test_it_fits_a_phone_and_both_schemes(opened):
    backs = []
    phone = {"width": 360, "height": 640}
    for scheme in ("light", "dark"):
        page = opened(
            viewport=phone, color_scheme=scheme, has_touch=True, is_mobile=True
        )
        say(page, "code please", wait=False)
        assert page.input_value("#said") == "code please\n"  # a phone's Enter
        page.tap("#send")
        page.wait_for_selector(DONE)
        size = "[document.documentElement.scrollWidth, document.body.scrollHeight]"
        assert page.evaluate(size) == [360, 640]
        for name in ("#model", "#said", "#send", "#settings summary"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360, name
            assert box["y"] >= 0 and box["y"] + box["height"] <= 640, name
        backs.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backs == ["rgb(255, 255, 255)", "rgb(22, 22, 26)"]


def test_the_keyboard_reaches_everything(opened):
    page = opened(viewport={"width": 1280, "height": 800})
    page.wait_for_selector("#send:enabled")
    say(page, "think hard")
    page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(20):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.localName"
            )
        )
    wanted = ["model", "summary", "key", "system", "thinking", "temperature", "top_p"]
    wanted += ["top_k", "max_tokens", "seed", "log", "summary", "said", "clear"]
    wanted += ["again", "send"]
    at = seen.index("model")
    assert seen[at : at + len(wanted)] == wanted


def test_chunks_are_read_a_byte_at_a_time(opened):
    found = opened().evaluate(
        """async (text) => {
          const { chunks } = await import("/page.js");
          const bytes = new TextEncoder().encode(text);
          let i = 0;
          const body = new ReadableStream({
            pull(to) {
              if (i < bytes.length) to.enqueue(bytes.slice(i, ++i));
              else to.close();
            },
          });
          const found = [];
          for await (const chunk of chunks(new Response(body))) found.push(chunk);
          return found;
        }""",
        'data: {"a": "é🙂世"}\r\n\r\n: ping\n\ndata: {"b":\ndata: 1}\n\n'
        "data: [DONE]\n\n",
    )
    assert found == [{"a": "é🙂世"}, {"b": 1}]
