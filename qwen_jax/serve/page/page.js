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
const SIDE = 1024; // pixels: what is larger is made smaller before it is sent
const turns = []; // {asked, pictures, thinking, content, view}
let pictures = []; // data URIs of the images that go with the next message
let models = {}; // id: what the server says of it
let running = null; // {abort, stopped} of the answer that is coming

/** An error in words for the person at the page. */
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
    const line = /([^\r\n]*)(?:\r\n|\n|\r(?!$))/y; // after a \r at the end, \n may come
    let end = 0;
    for (let found; (found = line.exec(this.#rest)); end = line.lastIndex) {
      const [, name, value] = /^([^:]*):? ?([^]*)$/.exec(found[1]);
      if (name === "data") this.#data.push(value);
      if (found[1] || !this.#data.length) continue;
      yield this.#data.join("\n");
      this.#data = [];
    }
    this.#rest = this.#rest.slice(end);
  }
}

/** A text as paragraphs and fenced blocks of code, the last of which may be open. */
export function segments(text) {
  const found = [];
  let part = { code: false, fence: "", lines: [] };
  const close = () => {
    const joined = part.lines.join("\n");
    const said = part.code ? joined : joined.replace(/^\n+/, "").trimEnd();
    if (part.code || said) found.push({ code: part.code, text: said });
  };
  for (const line of text.split("\n")) {
    const [, fence, info] = /^\s*(`{3,}|~{3,})(.*)$/.exec(line) ?? [];
    const turnsOver = part.code
      ? fence?.startsWith(part.fence) && !info.trim()
      : fence && !info.includes("`");
    if (turnsOver) {
      close();
      part = { code: !part.code, fence, lines: [] };
    } else {
      part.lines.push(line);
    }
  }
  close();
  return found;
}

/** Show a text in a box; what stands there already stays, with its selection. */
function show(box, text) {
  const parts = segments(text);
  parts.forEach((part, i) => {
    const tag = part.code ? "pre" : "p";
    if (box.children[i]?.localName !== tag) {
      box.children[i]?.remove();
      const made = element(tag);
      made.append(document.createTextNode(""));
      if (part.code) made.tabIndex = 0; // so that keys can scroll it
      box.insertBefore(made, box.children[i] ?? null);
    }
    const said = box.children[i].firstChild;
    if (part.text.startsWith(said.data)) said.appendData(part.text.slice(said.length));
    else said.data = part.text;
  });
  while (box.children.length > parts.length) box.lastElementChild.remove();
}

function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

/** An image of a data URI that was made here. */
function shown(url) {
  const made = new Image();
  made.src = url;
  made.alt = "An image of the message";
  return made;
}

/** The elements of a turn, at the end of the log. */
function viewOf(asked, pictures) {
  const view = {
    box: element("article"),
    thought: element("details", "thinking"),
    summary: element("summary"),
    thinking: element("div", "text"),
    content: element("div", "text content"),
    error: element("p", "error"),
    figures: element("p", "figures"),
  };
  view.thought.append(view.summary, view.thinking);
  view.error.setAttribute("role", "alert");
  const said = element("div", "asked", asked);
  if (pictures.length) {
    said.append(element("div", "pictures"));
    said.lastElementChild.append(...pictures.map(shown));
  }
  view.box.append(said, view.thought);
  view.box.append(view.content, view.error, view.figures);
  at("log").append(view.box);
  return view;
}

function draw({ view, thinking, content }) {
  const log = at("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
  const thinks = view.box.ariaBusy === "true" && !content;
  view.thought.hidden = !thinking;
  view.summary.textContent = thinks ? "Thinking…" : "Thought";
  show(view.thinking, thinking);
  show(view.content, content);
  if (follows) log.scrollTop = log.scrollHeight;
}

/** A request of the API. Raises Told, or what an abort raises. */
async function call(path, options = {}) {
  const headers = { ...options.headers };
  const key = at("key").value.trim();
  if (/[^\x21-\x7e]/.test(key)) throw new Told("The API key has letters no key has.", 401);
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Told("The server cannot be reached.");
  });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const words = said?.error?.message ?? `The server answered with status ${response.status}.`;
  throw new Told(words, response.status);
}

/** The chunks of a streamed answer, up to its end. */
export async function* chunks(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const events = new Events();
  const broken = new Told("The connection broke before the answer was over.");
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : broken;
    });
    if (done) throw broken;
    for (const data of events.push(decoder.decode(value, { stream: true }))) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Told(chunk.error.message);
      yield chunk;
    }
  }
}

/** What a turn's user says, as messages have it. */
function saidIn({ asked, pictures }) {
  if (!pictures.length) return asked;
  const images = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return [...images, { type: "text", text: asked }];
}

/** The body of the request for a turn; turns that got no answer are left out. */
function bodyOf(turn) {
  const messages = [];
  if (at("system").value.trim()) messages.push({ role: "system", content: at("system").value });
  for (const one of turns.slice(0, turns.indexOf(turn))) {
    if (!one.content && !one.thinking) continue;
    messages.push({ role: "user", content: saidIn(one) });
    messages.push({ role: "assistant", content: one.content });
  }
  messages.push({ role: "user", content: saidIn(turn) });
  const body = { model: at("model").value, messages, stream: true };
  body.stream_options = { include_usage: true, continuous_usage_stats: true };
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
  const told = { sent: performance.now(), first: 0, last: 0, usage: null, end: "" };
  const view = turn.view;
  let frame = 0;
  turn.content = turn.thinking = view.error.textContent = view.figures.textContent = "";
  view.box.ariaBusy = "true";
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
      told.usage = chunk.usage ?? told.usage;
      const { delta = {}, finish_reason = null } = chunk.choices[0] ?? {};
      told.end = ENDS[finish_reason] ?? told.end;
      if (!delta.reasoning_content && !delta.content && !finish_reason) continue;
      told.last = performance.now();
      told.first ||= told.last;
      turn.thinking += delta.reasoning_content ?? "";
      turn.content += delta.content ?? "";
      frame ||= requestAnimationFrame(() => draw(turn, (frame = 0)));
    }
  } catch (error) {
    const words = error instanceof Told ? error.message : `The answer is odd: ${error.message}.`;
    if (mine.stopped) told.end = "stopped";
    else view.error.textContent = words;
    if (error.status === 401) askForKey();
    mine.abort.abort(); // of an answer that is not read to its end
  }
  cancelAnimationFrame(frame);
  view.box.ariaBusy = "false";
  view.figures.textContent = figures(told);
  running = null;
  draw(turn);
  buttons();
}

/** What an answer took. The rate is over all of the time since the question was sent:
 * how many tokens a piece of the stream holds, which a rate without the wait for the
 * first would need, is not told. */
function figures({ sent, first, last, usage, end }) {
  const count = (n) => `${n.toLocaleString("en")} token${n === 1 ? "" : "s"}`;
  const said = [];
  if (usage && first) {
    const thought = usage.completion_tokens_details?.reasoning_tokens;
    const took_s = (last - sent) / 1000;
    const rate = (usage.completion_tokens / took_s).toFixed(1);
    said.push(count(usage.completion_tokens) + (thought ? ` (${thought} of thinking)` : ""));
    said[0] += ` in ${took_s.toFixed(2)} s, ${rate} tokens/s`;
  }
  if (first) said.push(`first token after ${Math.round(first - sent)} ms`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    said.push(`prompt of ${count(usage.prompt_tokens)}` + (cached ? `, ${cached} cached` : ""));
  }
  return [...said, ...(end ? [end] : [])].join(" · ");
}

/** Fill the list of models; while there are none, ask again. */
async function listModels() {
  clearTimeout(listModels.again);
  const select = at("model");
  let cards = [];
  let words = "The model is being loaded…";
  let locked = false;
  try {
    cards = (await (await call("v1/models")).json()).data;
  } catch (error) {
    words = error.message;
    locked = error.status === 401;
  }
  models = Object.fromEntries(cards.map((card) => [card.id, card]));
  const chosen = select.value;
  select.replaceChildren(...cards.map(({ id }) => new Option(id, id, false, id === chosen)));
  select.disabled = !cards.length;
  at("status").textContent = cards.length ? "" : words;
  if (locked) askForKey();
  else if (!cards.length) listModels.again = setTimeout(listModels, 2000);
  buttons();
}

function askForKey() {
  at("settings").open = true;
  at("key").focus();
}

function buttons() {
  const ready = !running && !at("model").disabled;
  at("send").hidden = Boolean(running);
  at("stop").hidden = !running;
  at("send").disabled = !ready;
  at("clear").disabled = !turns.length;
  at("again").disabled = !turns.length || !ready;
  at("empty").hidden = turns.length > 0;
  at("attach").hidden = !models[at("model").value]?.max_images;
}

/** Files as images of the next message, on white and no larger than SIDE. */
async function attach(files) {
  for (const file of files) {
    const bitmap = await createImageBitmap(file).catch(() => null);
    at("status").textContent = bitmap ? "" : "That is no image this browser can read.";
    if (!bitmap) continue;
    const share = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * share));
    canvas.height = Math.max(1, Math.round(bitmap.height * share));
    const drawn = canvas.getContext("2d");
    drawn.fillStyle = "white";
    drawn.fillRect(0, 0, canvas.width, canvas.height);
    drawn.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    pictures.push(canvas.toDataURL("image/jpeg", 0.9));
  }
  drawPictures();
}

/** The images of the next message, each of which a click takes out. */
function drawPictures() {
  const made = pictures.map((url, i) => {
    const button = element("button");
    button.type = "button";
    button.title = "Take this image out";
    button.append(shown(url));
    button.addEventListener("click", () => (pictures.splice(i, 1), drawPictures()));
    return button;
  });
  at("pictures").replaceChildren(...made);
}

function stop() {
  if (running) running.stopped = true;
  running?.abort.abort();
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
  turns.push({ asked, pictures, view: viewOf(asked, pictures) });
  pictures = [];
  drawPictures();
  answer(turns.at(-1));
}

function clear() {
  stop();
  for (const turn of turns.splice(0)) turn.view.box.remove();
  buttons();
}

function keyed(event) {
  if (event.key === "Escape") stop();
  // On a phone the key is for lines: Shift+Enter is not there.
  const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (event.target !== at("said") || !sends || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  send();
}

let store = null; // null in a browser that keeps nothing
try {
  store = window.sessionStorage;
} catch {
  at("key-note").textContent = "Forgotten when this page is left.";
}
const on = (id, event, act) => at(id).addEventListener(event, act);
const clicked = (id, act) => on(id, "click", () => (at("said").focus(), act()));
on("ask", "submit", (event) => (event.preventDefault(), send()));
on("sampling", "submit", (event) => event.preventDefault());
on("key", "change", () => (store?.setItem(KEY, at("key").value.trim()), listModels()));
on("model", "change", buttons);
on("picture", "change", () => attach(at("picture").files).then(() => (at("picture").value = "")));
on("said", "paste", (event) => at("attach").hidden || attach(event.clipboardData.files));
clicked("attach", () => at("picture").click());
clicked("stop", stop);
clicked("clear", clear);
clicked("again", () => turns.length && may() && answer(turns.at(-1)));
document.addEventListener("keydown", keyed);
at("key").value = store?.getItem(KEY) ?? "";
at("settings").open = matchMedia("(min-width: 56rem)").matches;
listModels();
