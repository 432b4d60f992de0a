# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: answers by a script, at a pace, from a thread of its own.

It honours what a server relies on: n, max_tokens, stop texts and ids, logprobs, bias of
a whole answer, grammars (the scripted id where it is allowed, else a short way out),
cancellation within a step, refusals, faults. Its answer to a prompt is a function of
the prompt and the seed, so the same request is answered the same.
"""

import dataclasses
import pathlib
import threading
import time
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import chat, tokenizer
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import engine
from qwen_jax.serve import request as request_lib


@dataclasses.dataclass
class Model:
    """As `talk.Model`."""

    spec: Any
    tokenizer: tokenizer.Tokenizer
    template: chat.Template | None
    advised: dict = dataclasses.field(default_factory=dict)

    @property
    def stop_ids(self):
        return self.tokenizer.stop_ids


def model(template: str | None = None, **advised) -> Model:
    """A tiny vocabulary with Qwen's control tokens, and a template."""
    texts = [pathlib.Path(__file__).read_text(), 'äöü 你好 🙂🙂 {} [] "name": ' * 20]
    words = tokenizer.train(texts, 600)
    if template is not None:
        words.settings["chat_template"] = template
    spec = spec_lib.Spec(
        vocab_size=words.vocab_size + 8,  # padded, as published models are
        width=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_width=16,
        ffn_width=64,
        max_positions=4096,
    )
    return Model(spec, words, chat.template_of(words), dict(advised))


class Engine:
    """See the module docstring.

    script: {text at the end of the prompt: answer}; anything else is answered with
    words drawn by prompt and seed. delay_s: of each token. fault: {"submit", "piece",
    "tell"}: where it fails. full: refuses with Overloaded.
    """

    def __init__(self, of: Model, script: dict[str, str] | None = None):
        self.model, self.script = of, dict(script or {})
        self.max_tokens, self.weights = 4096, 0
        self.delay_s, self.first_delay_s = 0.0, 0.0
        self.full, self.fault, self.fault_after = False, None, 3
        self.seen: list[request_lib.Request] = []
        self.cancelled: list[str] = []
        self.cached, self.wait_s = 0, 0.0
        self._jobs: dict[str, _Job] = {}
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def start(self):
        """It runs from the start."""

    def submit(self, request, tell):
        if self.full:
            raise engine.Overloaded(9, 2.0)
        if self.fault == "submit":
            raise RuntimeError("secret /etc/path in a stack")
        if self.fault == "never":
            raise config.InputError("max_tokens=1: this engine never can")
        with self._lock:
            self.seen.append(request)
            self._jobs[request.id] = _Job(self, request, tell)
        self._wake.set()
        return 0

    def refusal(self):
        return engine.Overloaded(9, 2.0) if self.full else None

    def cancel(self, request_id):
        with self._lock:
            job = self._jobs.get(request_id)
            if job is not None:
                self.cancelled.append(request_id)
                job.cancelled = True

    def load(self):
        with self._lock:
            running = len(self._jobs)
        used = 0.25 if running else 0.0
        return request_lib.Load(running, 0, used, 100, 40, 1, 3, self.wait_s, 5, 15, 9)

    def embed(self, prompts):
        rows = []
        for prompt in prompts:
            draw = np.random.default_rng(list(prompt))
            row = draw.normal(size=self.model.spec.width).astype(np.float32)
            rows.append(row / np.linalg.norm(row))
        return np.stack(rows)

    def close(self, timeout_s=None):
        self._closing = True
        self._wake.set()
        self._thread.join(5)

    def _run(self):
        while not self._closing:
            with self._lock:
                jobs = list(self._jobs.values())
            for job in jobs:
                if job.step():
                    with self._lock:
                        self._jobs.pop(job.request.id, None)
            if jobs:
                time.sleep(self.delay_s or 0.0005)
            else:
                self._wake.wait(0.2)
                self._wake.clear()


class _Job:
    def __init__(self, engine, request, tell):
        self.engine, self.request, self.tell = engine, request, tell
        self.cancelled = False
        self.begun_s = time.monotonic()
        self.rows = [_Row(self, i) for i in range(request.n)]

    def step(self) -> bool:
        """One token for each answer; whether all are over."""
        if time.monotonic() - self.begun_s < self.engine.first_delay_s:
            if not self.cancelled:
                return False
        for row in self.rows:
            if not row.over:
                row.step()
        return all(row.over for row in self.rows)


class _Row:
    def __init__(self, job, index):
        self.job, self.index, self.over = job, index, False
        self.words = job.engine.model.tokenizer
        request = job.request
        self.ids, self.text, self.told = [], "", 0
        self.letters = tokenizer.Detokenizer(self.words, skip_special=True)
        self.matcher = request.grammar.start() if request.grammar else None
        prompt = self.words.decode(request.prompt)
        self.wanted = self._script(prompt, request.sampling.seed + index)
        self.at = 0

    def _script(self, prompt, seed):
        found = {prompt.rfind(key): a for key, a in self.job.engine.script.items()}
        if max(found, default=-1) >= 0:  # what was said last
            return self._encode(found[max(found)]) + [self.words.im_end_id]
        if self.job.request.sampling.temperature == 0:
            seed = 0
        draw = np.random.default_rng([seed % 2**32, *self.job.request.prompt])
        picked = draw.choice(["one ", "two ", "drei ", "四 ", "🙂 "], 12)
        return self.words.encode("".join(picked)) + [self.words.im_end_id]

    def _encode(self, text):
        """With tags such as <tool_call> as ids of their own."""
        ids = []
        for piece, special in chat._pieces(self.words, text):
            ids += [special] if special is not None else self.words.encode(piece)
        return ids

    def step(self):
        job, request = self.job, self.job.request
        if job.cancelled:
            return self._end(request_lib.CANCELLED)
        if job.engine.fault == "piece" and len(self.ids) >= job.engine.fault_after:
            self.over = True
            job.tell(
                request_lib.Piece(
                    request.id, self.index, finish="error", error="/secret/path broke"
                )
            )
            return None
        token = self._next()
        if self.matcher is not None and token not in request.stop_ids:
            self.matcher.accept(token)
        self.ids.append(token)
        logprobs = () if request.logprobs is None else (self._logprob(token),)
        if token in request.stop_ids:
            return self._end(request_lib.STOP, (token,), logprobs, token)
        self.text += self.letters.push([token])
        for stop in request.stop:
            if stop in self.text:
                self.text = self.text[: self.text.index(stop)]
                return self._end(request_lib.STOP, (token,), logprobs, stop)
        if len(self.ids) >= request.max_tokens:
            self.text += self.letters.end()
            return self._end(request_lib.LENGTH, (token,), logprobs)
        most = max((len(stop) - 1 for stop in request.stop), default=0)
        self._tell(
            self.text[: max(self.told, len(self.text) - most)], (token,), logprobs
        )

    def _next(self):
        request = self.job.request
        token = self.wanted[self.at] if self.at < len(self.wanted) else 0
        self.at += 1
        if request.logit_bias.get(token, 0) <= -100:
            token = self.words.encode("x")[0]
        for i, bias in request.logit_bias.items():
            token = i if bias >= 100 else token
        if self.matcher is None:
            return token
        words_w = self.matcher.allowed()
        assert words_w.shape == (-(-self.job.engine.model.spec.vocab_size // 32),)
        bits_v = np.unpackbits(words_w.view(np.uint8), bitorder="little")
        if not bits_v[token]:
            short = [self.words.encode(letter)[0] for letter in '"}]:,1t']
            fit = [i for i in (*request.stop_ids, *short) if bits_v[i]]
            token = fit[0] if fit else int(np.flatnonzero(bits_v)[0])
            self.at -= 1  # the script goes on when it can
        return token

    def _logprob(self, token):
        others = [(i, -1.5 - i) for i in range(20) if i != token]
        return request_lib.Logprob(token, -0.5, ((token, -0.5), *others)[:20])

    def _tell(self, text, ids, logprobs, **more):
        request = self.job.request
        asked = request.prompt_logprobs is not None
        several = asked and len(request.prompt) > 1
        if several and len(self.ids) == 1 and self.index == 0:
            told = tuple(self._logprob(token) for token in request.prompt[1:])
            more["prompt_logprobs"] = told
        if len(self.ids) == 1:
            more |= {"queue_s": 0.25 + self.index, "prefill_s": 0.5}
        piece, self.told = text[self.told :], len(text)
        self.job.tell(
            request_lib.Piece(
                request.id, self.index, piece, ids, logprobs=logprobs, **more
            )
        )

    def _end(self, finish, ids=(), logprobs=(), stopped_by=None):
        self.over = True
        usage = request_lib.Usage(
            len(self.job.request.prompt), self.job.engine.cached, len(self.ids)
        )
        self._tell(
            self.text, ids, logprobs, finish=finish, stopped_by=stopped_by, usage=usage
        )
