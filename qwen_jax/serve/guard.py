# SPDX-License-Identifier: Apache-2.0
"""The guard of a server: prompts, answers, and answers while they come.

`Guard.check_prompt`, `check_response` and `stream` ask every checker and give one
`Verdict`, made of the worst that was said and of the policy. A checker is anything with
the three methods of `Checker`: rules (`guard_rules`), a small head (`guard_head`), a
model in Qwen3Guard's format (`guard_model`). `load` builds a guard from files.

Source: Qwen3Guard (arXiv 2510.14276) for labels; OpenAI's API reference for the shape
and keys of moderation results.
Invariants: a checker that raises blocks where the policy fails closed (the default),
whatever else was said; otherwise it is passed over and named in `failed`. What a stream
was blocked for, it stays blocked for. Each check is counted and, where there is an
audit log, written to it: a stream once, when it is blocked or ends.
Raises: config.InputError from `load` for files that are missing or wrong.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from qwen_jax import config
from qwen_jax.serve import guard_audit, guard_policy, guard_rules, guard_verdict

# OpenAI's keys for each of our categories. Keys that say more than our categories do
# (sexual/minors, violence/graphic and the like) are never set: false means not known.
OPENAI = {
    "harassment": ("Unethical Acts",),
    "harassment/threatening": (),
    "hate": ("Unethical Acts",),
    "hate/threatening": (),
    "illicit": ("Non-violent Illegal Acts",),
    "illicit/violent": ("Violent",),
    "self-harm": ("Suicide & Self-Harm",),
    "self-harm/intent": (),
    "self-harm/instructions": (),
    "sexual": ("Sexual Content or Sexual Acts",),
    "sexual/minors": (),
    "violence": ("Violent",),
    "violence/graphic": (),
}


class Listener(Protocol):
    """A checker's part of one stream: findings on all that came so far."""

    def push(self, text: str) -> guard_verdict.Finding:
        """More of the answer, whole code points."""

    def end(self) -> guard_verdict.Finding:
        """The answer is over."""


class Checker(Protocol):
    """One way of judging texts."""

    name: str

    def prompt(self, messages: Any) -> guard_verdict.Finding:
        """Of all that is asked: a text or a list of {role, content}."""

    def response(self, messages: Any, text: str) -> guard_verdict.Finding:
        """Of a whole answer."""

    def stream(self, messages: Any) -> Listener:
        """Of an answer while it comes."""


class Guard:
    """Checkers and a policy.

    Args:
      checkers: asked in order; two may not share a name.
      policy: what is done about findings.
      audit: where decisions are logged; None for nowhere.
    """

    def __init__(
        self,
        checkers: Sequence[Checker],
        policy: guard_policy.Policy | None = None,
        audit: guard_audit.Audit | None = None,
    ):
        names = [checker.name for checker in checkers]
        if len(set(names)) < len(names):
            raise config.InputError(f"two checkers of one name among {names}")
        self.checkers = tuple(checkers)
        self.policy = policy or guard_policy.Policy()
        self.audit = audit
        self._counts: collections.Counter = collections.Counter()
        self._lock = threading.Lock()

    def check_prompt(self, messages: Any, request: str = "") -> guard_verdict.Verdict:
        """Judge what is asked; `request` names it in the audit log."""
        calls = {c.name: lambda c=c: c.prompt(messages) for c in self.checkers}
        verdict = self._judge(guard_verdict.INPUT, calls)
        self._log(verdict, lambda: _texts(messages), request)
        return verdict

    def check_response(
        self, messages: Any, text: str, request: str = ""
    ) -> guard_verdict.Verdict:
        """Judge a whole answer."""
        calls = {c.name: lambda c=c: c.response(messages, text) for c in self.checkers}
        verdict = self._judge(guard_verdict.OUTPUT, calls)
        self._log(verdict, lambda: [text], request)
        return verdict

    def stream(self, messages: Any, request: str = "") -> "Watch":
        """Judge an answer while it comes."""
        return Watch(self, messages, request)

    def counts(self) -> dict[str, int]:
        """Since the start: checks as "stage/action", "failed/CHECKER" for each call
        that raised, "audit/lost" for lines that the log could not take."""
        with self._lock:
            made = dict(self._counts)
        return made | {"audit/lost": self.audit.lost if self.audit else 0}

    def _judge(
        self,
        stage: str,
        calls: dict[str, Callable[[], guard_verdict.Finding]],
        failed: Sequence[str] = (),
    ) -> guard_verdict.Verdict:
        """Ask, join, decide. `failed`: checkers that raised before."""
        findings, failed = [], list(failed)
        for name, call in calls.items():
            try:
                findings.append(_valid(call()))
            # Whatever is wrong with a checker, a text that it did not judge must not
            # pass for judged.
            except Exception:  # noqa: BLE001
                failed.append(name)
                with self._lock:
                    self._counts[f"failed/{name}"] += 1
        found = guard_verdict.worst(findings)
        action = self.policy.action(stage, found.risks)
        level = found.level
        if failed and self.policy.fail_closed:
            level, action = guard_verdict.UNSAFE, guard_verdict.BLOCK
        return guard_verdict.Verdict(
            level=level,
            categories=tuple(c for c in found.risks if c),
            scores=found.scores,
            refusal=found.refusal,
            action=action,
            where=found.spans,
            stage=stage,
            failed=tuple(failed),
            hold=found.hold if self.policy.hold else 0,
        )

    def _log(
        self,
        verdict: guard_verdict.Verdict,
        texts: Callable[[], list[str]],
        request: str,
    ) -> None:
        with self._lock:
            self._counts[f"{verdict.stage}/{verdict.action}"] += 1
        if self.audit:
            self.audit.write(verdict, texts(), request)


class Watch:
    """One answer while it comes; every verdict is on all of it so far."""

    def __init__(self, guard: Guard, messages: Any, request: str):
        self._guard, self._request = guard, request
        self._pieces: list[str] = []
        self._listeners: dict[str, Listener] = {}
        self._failed: list[str] = []
        self._final: guard_verdict.Verdict | None = None
        opened = {c.name: lambda c=c: self._open(c, messages) for c in guard.checkers}
        self._failed += guard._judge(guard_verdict.STREAM, opened).failed

    def _open(self, checker: Checker, messages: Any) -> guard_verdict.Finding:
        self._listeners[checker.name] = checker.stream(messages)
        return guard_verdict.Finding()

    def push(self, text: str) -> guard_verdict.Verdict:
        """More of the answer, whole code points."""
        return self._step(lambda one: one.push(text), text)

    def end(self) -> guard_verdict.Verdict:
        """The answer is over."""
        return self._step(lambda one: one.end(), over=True)

    def _step(
        self,
        ask: Callable[[Listener], guard_verdict.Finding],
        text: str = "",
        over: bool = False,
    ) -> guard_verdict.Verdict:
        if self._final is not None:
            return self._final
        self._pieces.append(text)
        calls = {n: lambda x=x: ask(x) for n, x in self._listeners.items()}
        verdict = self._guard._judge(guard_verdict.STREAM, calls, self._failed)
        for name in verdict.failed:  # what raised once has lost its place in the text
            self._listeners.pop(name, None)
        self._failed = list(verdict.failed)
        if over or verdict.action == guard_verdict.BLOCK:
            self._final = dataclasses.replace(verdict, hold=0)
            self._guard._log(
                self._final, lambda: ["".join(self._pieces)], self._request
            )
            return self._final
        return verdict


def moderation_results(verdict: guard_verdict.Verdict) -> dict[str, Any]:
    """One entry of `results` of OpenAI's moderations: their 13 keys and our nine
    categories, and under "qwen" the verdict itself.

    A category is true where the verdict has it and is unsafe or not simply allowed.
    """
    flagged = (
        verdict.level == guard_verdict.UNSAFE or verdict.action != guard_verdict.ALLOW
    )
    sources = OPENAI | {name: (name,) for name in guard_verdict.NAMES}
    scores = verdict.scores
    return {
        "flagged": flagged,
        "categories": {
            key: flagged and any(c in verdict.categories for c in ours)
            for key, ours in sources.items()
        },
        "category_scores": {
            key: float(max((scores.get(c, 0.0) for c in ours), default=0.0))
            for key, ours in sources.items()
        },
        "category_applied_input_types": {key: ["text"] for key in sources},
        "qwen": {
            "level": verdict.level,
            "categories": list(verdict.categories),
            "action": verdict.action,
            "refusal": verdict.refusal,
            "failed": list(verdict.failed),
        },
    }


def load(
    policy: str = "",
    *,
    head: str = "",
    audit: str = "",
    audit_key: bytes = b"",
    more: Sequence[Checker] = (),
) -> Guard:
    """A guard from files: rules, and a trained head where one is given.

    Args:
      policy: a policy file; "" for the built-in policy.
      head: a folder that `qwen-jax guard train` wrote.
      audit: the audit log.
      audit_key: for its hashes.
      more: further checkers, such as `guard_model.ModelChecker`.
    Raises:
      config.InputError: a file that is missing or wrong.
    """
    rules = guard_policy.load(policy)
    checkers: list[Checker] = [guard_rules.RuleChecker(guard_rules.load(rules.rules))]
    if head:
        from qwen_jax.serve import guard_trunk  # imports JAX

        checkers.append(guard_trunk.HeadChecker(guard_trunk.load(head)))
    log = guard_audit.Audit(audit, audit_key) if audit else None
    return Guard([*checkers, *more], rules, log)


def _valid(finding: Any) -> guard_verdict.Finding:
    """The same, if it is one: a wrong answer of a checker is a failure of it."""
    if not isinstance(finding, guard_verdict.Finding):
        raise TypeError(f"a checker gave {type(finding).__name__}, no Finding")
    known = (*guard_verdict.NAMES, guard_verdict.NO_CATEGORY)
    for category, level in finding.risks.items():
        if category not in known or level not in guard_verdict.LEVELS[1:]:
            raise ValueError(f"a checker gave {category!r}: {level!r}")
    for category, score in finding.scores.items():
        if category not in known or not 0 <= score <= 1:  # NaN is refused, too
            raise ValueError(f"a checker gave {category!r} the score {score!r}")
    return finding


def _texts(messages: Any) -> list[str]:
    try:
        return [text for _, _, text in guard_verdict.texts_of(messages)]
    except config.InputError:  # such messages made the checkers fail, too
        return []
