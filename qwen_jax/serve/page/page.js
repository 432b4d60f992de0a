// SPDX-License-Identifier: Apache-2.0
// A chat over /v1/chat/completions, streamed.
//
// What a model says is only ever text of text nodes: nothing here makes markup of it.
// The key is in its field and in this tab's sessionStorage, nowhere else; all addresses
// are relative, so the page also works behind a proxy that adds a prefix.

const KEY = "qwen_jax.key";
const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const ENDS = {
  length: "cut off: no more tokens were allowed",
  content_filter: "ended by the server's guard",
};
const at = (id) => document.getElementById(id);
const turns = []; // {asked, content, thinking, failed, view}
let running = null; // {abort, stopped} of the answer that is coming

/** An error whose message is for the person at the page. */
class Told extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Server-sent events out of text in pieces, wherever it was cut: the data of each. */
export class Events {
  #rest = "";
  #data = [];

  *push(text) {
    this.#rest += text;
    const line = /([^\r\n]*)(?:\r\n|\n|\r(?!$))/y; // a \r at the end may go on with \n
    let end = 0;
    for (let found; (found = line.exec(this.#rest)); end = line.lastIndex) {
      const [name, value] = split(found[1]);
      if (found[1] === "") {
        if (this.#data.length) yield this.#data.join("\n");
        this.#data = [];
      } else if (name === "data") {
        this.#data.push(value);
      }
    }
    this.#rest = this.#rest.slice(end);
  }
}

function split(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return [line, ""];
  return [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, "")];
}

/** A text as paragraphs and fenced blocks of code, the last of which may be open. */
export function segments(text) {
  const found = [];
  let part = { code: false, lines: [] };
  const close = () => {
    const joined = part.lines.join("\n");
    const said = part.code ? joined : joined.replace(/^\n+|\s+$/g, "");
    if (part.code || said) found.push({ code: part.code, text: said });
  };
  for (const line of text.split("\n")) {
    const fence = /^\s*(`{3,}|~{3,})(.*)$/.exec(line);
    const ends = fence && part.code && fence[1].startsWith(part.fence) && !fence[2].trim();
    const opens = fence && !part.code && !fence[2].includes("`");
    if (!ends && !opens) {
      part.lines.push(line);
      continue;
    }
    close();
    part = { code: !part.code, fence: fence[1], lines: [] };
  }
  close();
  return found;
}

/** Show a text in a box; what stands there already stays, with its selection. */
function show(box, text) {
  const parts = segments(text);
  parts.forEach((part, i) => {
    const tag = part.code ? "pre" : "p";
    let node = box.children[i];
    if (node?.localName !== tag) {
      const made = element(tag);
      made.append(document.createTextNode(""));
      if (part.code) made.tabIndex = 0; // so that keys can scroll it
      node ? node.replaceWith(made) : box.append(made);
      node = made;
    }
    const before = node.firstChild;
    if (part.text.startsWith(before.data)) before.appendData(part.text.slice(before.length));
    else before.data = part.text;
  });
  while (box.children.length > parts.length) box.lastElementChild.remove();
}

function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

/** The elements of a turn, at the end of the log. */
function viewOf(asked) {
  const view = {
    box: element("article"),
    thought: element("details", "thinking"),
    summary: element("summary", "", "Thinking"),
    thinking: element("div", "text"),
    content: element("div", "text content"),
    error: element("p", "error"),
    figures: element("p", "figures"),
  };
  view.thought.append(view.summary, view.thinking);
  view.error.setAttribute("role", "alert");
  const question = element("div", "asked", asked);
  view.box.append(question, view.thought, view.content, view.error, view.figures);
  at("log").append(view.box);
  return view;
}

function draw(turn) {
  const log = at("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
  const view = turn.view;
  view.thought.hidden = !turn.thinking;
  const thinks = turn.thinking && !turn.content && view.box.ariaBusy === "true";
  view.summary.textContent = thinks ? "Thinking…" : "Thought";
  show(view.thinking, turn.thinking);
  show(view.content, turn.content);
  if (follows) log.scrollTop = log.scrollHeight;
}

/** A request of the API. Raises Told in words, or what an abort raises. */
async function call(path, options = {}) {
  const headers = { ...options.headers };
  const key = at("key").value.trim();
  if (/[^\x21-\x7e]/.test(key)) throw new Told("The API key has letters that no key has.", 401);
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Told("The server cannot be reached.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  let words = said?.error?.message || `The server answered with status ${response.status}.`;
  const wait = response.headers.get("retry-after");
  if (wait) words += ` Try again in ${wait} s.`;
  throw new Told(words, response.status);
}

/** The chunks of a streamed answer, up to its end. */
async function* chunks(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const events = new Events();
  const broken = () => new Told("The connection broke before the answer was over.");
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : broken();
      });
      if (done) throw broken();
      for (const data of events.push(decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Told(chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => null);
  }
}

/** The body of the request for a turn: a failed turn before it is not told. */
function bodyOf(turn) {
  const messages = [];
  if (at("system").value.trim()) messages.push({ role: "system", content: at("system").value });
  for (const one of turns) {
    if (one.failed && one !== turn) continue;
    messages.push({ role: "user", content: one.asked });
    if (one === turn) break;
    messages.push({ role: "assistant", content: one.content });
  }
  const body = { model: at("model").value, messages, stream: true };
  body.stream_options = { include_usage: true };
  for (const name of SAMPLING) {
    if (at(name).value !== "") body[name] = Number(at(name).value);
  }
  const thinking = at("thinking").value;
  if (thinking) body.chat_template_kwargs = { enable_thinking: thinking === "on" };
  return JSON.stringify(body);
}

/** Have a turn answered, and show the answer as it comes. */
async function answer(turn) {
  const mine = (running = { abort: new AbortController(), stopped: false });
  const times = { sent: performance.now(), first: 0, last: 0 };
  const view = turn.view;
  let usage = null;
  let end = "";
  let frame = 0;
  Object.assign(turn, { content: "", thinking: "", failed: false });
  view.box.ariaBusy = "true";
  view.error.textContent = view.figures.textContent = "";
  buttons();
  draw(turn);
  at("log").scrollTop = at("log").scrollHeight;
  try {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: bodyOf(turn),
      signal: mine.abort.signal,
    });
    for await (const chunk of chunks(response)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      const thinking = choice?.delta.reasoning_content ?? "";
      const content = choice?.delta.content ?? "";
      end = choice?.finish_reason ?? end;
      if (!thinking && !content) continue;
      times.last = performance.now();
      times.first ||= times.last;
      turn.thinking += thinking;
      turn.content += content;
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        draw(turn);
      });
    }
  } catch (error) {
    if (!mine.stopped) fail(turn, error);
  }
  cancelAnimationFrame(frame);
  view.box.ariaBusy = "false";
  view.figures.textContent = figures(times, usage, mine.stopped ? "stopped" : ENDS[end]);
  if (running === mine) running = null;
  draw(turn);
  buttons();
}

function fail(turn, error) {
  turn.failed = true;
  turn.view.error.textContent =
    error instanceof Told ? error.message : `The answer cannot be read (${error.message}).`;
  if (error.status === 401) askForKey();
}

/** What an answer took. Tokens/s are those after the first, without the wait for it. */
function figures(times, usage, end) {
  const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
  const said = [];
  if (usage) {
    const thought = usage.completion_tokens_details?.reasoning_tokens;
    const more = thought ? ` (${thought.toLocaleString("en")} of thinking)` : "";
    said.push(count(usage.completion_tokens, "token") + more);
    const rate = (1000 * (usage.completion_tokens - 1)) / (times.last - times.first);
    if (Number.isFinite(rate) && rate > 0) said.push(`${rate.toFixed(1)} tokens/s`);
  }
  if (times.first) said.push(`first token after ${Math.round(times.first - times.sent)} ms`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    const more = cached ? `, ${cached.toLocaleString("en")} of them cached` : "";
    said.push(`prompt of ${count(usage.prompt_tokens, "token")}${more}`);
  }
  if (end) said.push(end);
  return said.join(" · ");
}

/** Fill the list of models; while there are none yet, ask again. */
async function listModels() {
  clearTimeout(listModels.again);
  const select = at("model");
  try {
    const cards = (await (await call("v1/models")).json()).data;
    const chosen = select.value;
    select.replaceChildren(...cards.map((card) => new Option(card.id, card.id)));
    if (cards.some((card) => card.id === chosen)) select.value = chosen;
    at("status").textContent = cards.length ? "" : "The model is being loaded…";
    if (!cards.length) listModels.again = setTimeout(listModels, 2000);
  } catch (error) {
    select.replaceChildren();
    at("status").textContent = error.message;
    if (error.status === 401) askForKey();
    else listModels.again = setTimeout(listModels, 5000);
  }
  select.disabled = !select.options.length;
  buttons();
}

function askForKey() {
  at("settings").open = true;
  at("key").focus();
}

function buttons() {
  at("send").hidden = Boolean(running);
  at("stop").hidden = !running;
  at("send").disabled = at("model").disabled;
  at("clear").disabled = !turns.length;
  at("again").disabled = !turns.length || Boolean(running) || at("model").disabled;
  at("empty").hidden = turns.length > 0;
}

function stop() {
  if (!running) return;
  running.stopped = true;
  running.abort.abort();
}

/** Whether a request may be made now; a wrong setting is shown where it is. */
function may() {
  if (running || at("model").disabled) return false;
  if (!at("sampling").checkValidity()) at("settings").open = true;
  return at("sampling").reportValidity();
}

function send() {
  const asked = at("said").value;
  if (!asked.trim() || !may()) return;
  at("said").value = "";
  turns.push({ asked, view: viewOf(asked) });
  answer(turns.at(-1));
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("sampling").addEventListener("submit", (event) => event.preventDefault());
at("said").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
at("stop").addEventListener("click", () => {
  stop();
  at("said").focus();
});
at("again").addEventListener("click", () => {
  if (turns.length && may()) answer(turns.at(-1));
});
at("clear").addEventListener("click", () => {
  stop();
  for (const turn of turns.splice(0)) turn.view.box.remove();
  buttons();
  at("said").focus();
});
at("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, at("key").value.trim());
  listModels();
});

at("key").value = sessionStorage.getItem(KEY) ?? "";
at("settings").open = matchMedia("(min-width: 56rem)").matches;
listModels();
