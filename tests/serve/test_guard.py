# SPDX-License-Identifier: Apache-2.0
"""The guard: what a policy makes of findings, checkers that fail, the audit log, and
moderation results as OpenAI's own package reads them."""

import dataclasses
import hashlib
import hmac
import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from qwen_jax import config
from qwen_jax.serve import guard, guard_audit, guard_policy, guard_verdict

LEVELS, ACTIONS = guard_verdict.LEVELS, guard_verdict.ACTIONS


def finding(hold=0, refusal=None, **risks):
    risks = {guard_verdict.CATEGORIES[k]: level for k, level in risks.items()}
    scores = dict.fromkeys(risks, 0.25)
    return guard_verdict.Finding(risks, scores, refusal, hold=hold)


class Says:
    """A checker that says what it is told to, or raises it."""

    def __init__(self, *says, name="says"):
        self.name, self._says = name, itertools.cycle(says)

    def prompt(self, messages):
        said = next(self._says)
        if isinstance(said, Exception):
            raise said
        return said

    def response(self, messages, text):
        return self.prompt(messages)

    def stream(self, messages):
        return self

    def push(self, text):
        return self.prompt(text)

    def end(self):
        return self.prompt("")


SAFE = finding()


# --- policy ---


@pytest.mark.parametrize("mode", ["strict", "loose"])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_what_a_policy_makes_of_a_level(mode, action, level):
    policy = guard_policy.Policy(mode=mode, input={"violent": action})
    verdict = guard.Guard([Says(finding(violent=level))], policy).check_prompt("x")
    unsafe = level == "unsafe" or mode == "strict"
    assert verdict.action == (action if unsafe else "allow")
    assert (verdict.level, verdict.categories) == (level, ("Violent",))
    assert verdict.scores == {"Violent": 0.25} and verdict.stage == "input"


def test_each_category_counts_by_its_own_level():
    """Loose: what is controversial does not block because something else is unsafe."""
    policy = guard_policy.Policy(
        mode="loose", input={"default": "allow", "violent": "block", "pii": "flag"}
    )
    said = finding(violent="controversial", pii="unsafe")
    verdict = guard.Guard([Says(said)], policy).check_prompt("x")
    assert (verdict.action, verdict.level) == ("flag", "unsafe")


def test_the_stages_have_tables_of_their_own():
    policy = guard_policy.Policy(
        input={"pii": "allow"}, output={"pii": "flag"}, stream={"PII": "block"}
    )
    made = guard.Guard([Says(finding(pii="unsafe"))], policy)
    actions = [
        made.check_prompt("x").action,
        made.check_response("x", "y").action,
        made.stream("x").push("y").action,
    ]
    assert actions == ["allow", "flag", "block"]
    assert guard_policy.Policy(output={"pii": "flag"}).stream["PII"] == "flag"


def test_the_worst_of_several_checkers():
    one = finding(violent="controversial", pii="unsafe", hold=3)
    two = dataclasses.replace(
        finding(violent="unsafe", refusal=False), scores={"Violent": 0.75}
    )
    three = finding(refusal=True, hold=7)
    for order in itertools.permutations([one, two, three]):
        checkers = [Says(x, name=str(i)) for i, x in enumerate(order)]
        verdict = guard.Guard(checkers).stream("").push("x" * 9)
        assert verdict.categories == ("Violent", "PII")
        assert verdict.scores == {"Violent": 0.75, "PII": 0.25}
        assert (verdict.level, verdict.action) == ("unsafe", "block")
        assert verdict.refusal is True
    assert guard_verdict.worst([one, three]).hold == 7
    assert guard_verdict.worst([]) == SAFE and SAFE.level == "safe"


def test_a_risk_of_no_category_takes_the_default():
    said = guard_verdict.Finding({guard_verdict.NO_CATEGORY: "unsafe"})
    verdict = guard.Guard([Says(said)]).check_prompt("x")
    assert (verdict.action, verdict.categories) == ("block", ())


TOML = """
mode = "loose"
fail_closed = false
[input]
default = "flag"
jailbreak = "block"
"Suicide & Self-Harm" = "block"
[output]
pii = "allow"
"""


def test_a_policy_file(tmp_path):
    toml, as_json = tmp_path / "p.toml", tmp_path / "p.json"
    toml.write_text(TOML)
    as_json.write_text(
        json.dumps(
            {
                "mode": "loose",
                "fail_closed": False,
                "input": {
                    "default": "flag", "jailbreak": "block", "self_harm": "block",
                },
                "output": {"pii": "allow"},
            }
        )
    )  # fmt: skip
    policy = guard_policy.load(str(toml))
    assert policy == guard_policy.load(str(as_json))
    assert policy.input == {
        "default": "flag", "Jailbreak": "block", "Suicide & Self-Harm": "block",
    }  # fmt: skip
    assert policy.stream == {"default": "block", "PII": "allow"}
    assert guard_policy.load("") == guard_policy.Policy()
    assert guard_policy.Policy().fail_closed and guard_policy.Policy().hold


@pytest.mark.parametrize(
    "text, told",
    [
        ("mod = 'strict'", "unknown key 'mod'"),
        ("mode = 'lose'", "mode='lose': wanted strict or loose"),
        ("[input]\npii = 'blok'", "input.pii='blok'; did you mean 'block'?"),
        ("[input]\nvoilent = 'block'", "'voilent'; did you mean 'violent'?"),
        ("[output]\njailbreak = 'block'", "put it into [input]"),
        ("[input]\npii = 3", "input.pii: wanted str"),
        ("fail_closed = 'no'", "fail_closed: wanted bool"),
        ("[input", "cannot be read"),
    ],
)
def test_a_policy_that_is_wrong(tmp_path, text, told):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(config.InputError, match=re.escape(told)) as error:
        guard_policy.load(str(path))
    assert str(path) in str(error.value)


def test_a_policy_that_is_not_there(tmp_path):
    for name, told in (("p.toml", "No such file"), ("p.yaml", "wanted a .toml")):
        with pytest.raises(config.InputError, match=told):
            guard_policy.load(str(tmp_path / name))


def test_the_rules_of_a_policy_stand_beside_it(tmp_path):
    (tmp_path / "p.toml").write_text('rules = "mine.json"')
    group = {"name": "a", "category": "violent", "level": "unsafe", "phrases": ["zork"]}
    (tmp_path / "mine.json").write_text(json.dumps({"phrases": [group]}))
    made = guard.load(str(tmp_path / "p.toml"))
    assert made.check_prompt("a zork!").action == "block"
    assert made.check_prompt("how to make a bomb").action == "allow"
    assert guard.load().check_prompt("how to make a bomb").action == "block"


# --- checkers that fail ---

WRONG = [
    RuntimeError("boom"),
    RecursionError(),
    MemoryError(),
    None,  # no finding
    guard_verdict.Finding({"Violence": "unsafe"}),  # no such category
    guard_verdict.Finding({"Violent": "safe"}),
    guard_verdict.Finding(scores={"Violent": float("nan")}),
    guard_verdict.Finding(scores={"Violent": "high"}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize("fail_closed", [True, False])
def test_a_checker_that_fails(wrong, fail_closed):
    policy = guard_policy.Policy(fail_closed=fail_closed)
    made = guard.Guard([Says(SAFE, name="good"), Says(wrong, name="bad")], policy)
    watch = made.stream("x")
    verdicts = [
        made.check_prompt("x"),
        made.check_response("x", "y"),
        watch.push("y"),
        watch.end(),
    ]
    for verdict in verdicts:
        assert verdict.failed == ("bad",)
        assert verdict.action == ("block" if fail_closed else "allow")
        assert verdict.level == ("unsafe" if fail_closed else "safe")
    # In a stream it is asked no more, and named in every verdict.
    assert made.counts()["failed/bad"] == 3


def test_a_policy_that_allows_all_still_fails_closed():
    allow = {"default": "allow"}
    policy = guard_policy.Policy(input=allow, output=allow)
    made = guard.Guard(
        [Says(finding(violent="unsafe")), Says(OSError(), name="b")], policy
    )
    assert made.check_prompt("x").action == "block"


def test_messages_that_are_none_are_blocked():
    made = guard.load()
    for messages in (3, None, ["x"], [{"role": "user", "content": "x"}, 7]):
        assert made.check_prompt(messages).action == "block"
    odd = [{"content": {"a": 1}}, {"role": 3, "content": [3, None, {"text": 4}]}]
    assert made.check_prompt(odd).action == "allow"  # no text in them


def test_a_checker_that_cannot_begin_a_stream():
    class Broken(Says):
        def stream(self, messages):
            raise KeyError("x")

    made = guard.Guard([Broken(SAFE)])
    assert made.stream("x").push("y").action == "block"
    assert made.counts()["failed/says"] == 1


def test_what_stops_the_program_is_not_caught():
    class Stops(Says):
        def prompt(self, messages):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard.Guard([Stops()]).check_prompt("x")


def test_two_checkers_of_one_name():
    with pytest.raises(config.InputError, match="of one name"):
        guard.Guard([Says(SAFE), Says(SAFE)])


# --- streams ---


def test_a_stream_stays_blocked():
    says = Says(SAFE, finding(violent="unsafe"), RuntimeError("asked again"))
    watch = guard.Guard([says]).stream("x")
    assert watch.push("a").action == "allow"
    blocked = watch.push("b")
    assert blocked.action == "block" and blocked.failed == ()
    assert watch.push("c") == watch.end() == blocked


def test_hold_is_the_policys_choice():
    for hold in (True, False):
        policy = guard_policy.Policy(hold=hold)
        watch = guard.Guard([Says(finding(hold=4))], policy).stream("x")
        assert watch.push("12345").hold == (4 if hold else 0)
        assert watch.end().hold == 0


def test_rules_in_a_stream_end_to_end():
    watch = guard.load().stream([{"role": "user", "content": "hi"}])
    sent = ""
    whole = ""
    for piece in ["To begin: how", " to make", " a bo", "mb. First", " take"]:
        whole += piece
        verdict = watch.push(piece)
        if verdict.action == "block":
            break
        sent = whole[: len(whole) - verdict.hold]
    assert sent == "To begin: " and verdict.where[0].start == len("To begin: ")


# --- audit ---


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_has_hashes_and_no_text(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit = guard_audit.Audit(str(path), b"key", clock=lambda: 12.3456)
    made = guard.load()
    made.audit = audit
    secret = "my card is 4111 1111 1111 1111 é"
    made.check_prompt(secret, request="r1")
    made.check_response("q", secret, request="r2")
    watch = made.stream("q", request="r3")
    watch.push(secret[:9])
    watch.push(secret[9:])
    watch.end()
    watch.end()
    held = path.read_text()
    assert "4111" not in held and "card is" not in held
    data = secret.encode()
    wanted = hmac.new(b"key", len(data).to_bytes(8, "little") + data, hashlib.sha256)
    for row, stage, request in zip(
        lines(path), ["input", "output", "stream"], ["r1", "r2", "r3"], strict=True
    ):
        assert row == {
            "time": 12.346, "request": request, "stage": stage, "action": "flag",
            "level": "unsafe", "categories": ["PII"], "rules": ["card"], "failed": [],
            "refusal": None, "texts": 1, "length": len(secret),
            "hmac": wanted.hexdigest(),
        }  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_hash_without_a_key_and_of_several_texts(tmp_path):
    def manual(*texts):
        made = hashlib.sha256()
        for text in texts:
            made.update(len(text).to_bytes(8, "little") + text)
        return made.hexdigest()

    assert guard_audit.digest(["ab", "c"]) == manual(b"ab", b"c")
    assert guard_audit.digest(["ab", "c"]) != guard_audit.digest(["a", "bc"])
    assert guard_audit.digest(["\ud800"])  # a lone surrogate is no error


WRITER = """
import sys
from qwen_jax.serve import guard_audit, guard_verdict
audit = guard_audit.Audit(sys.argv[1])
verdict = guard_verdict.Verdict("safe", ("PII",) * 40, {}, None, "allow")
for i in range(200):
    audit.write(verdict, ["x" * i], f"{sys.argv[2]}-{i}")
sys.exit(audit.lost)
"""


@pytest.mark.slow
def test_several_processes_write_whole_lines(tmp_path):
    path = tmp_path / "audit.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n)])
        for n in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    requests = [row["request"] for row in lines(path)]
    assert sorted(requests) == sorted(f"{n}-{i}" for n in range(3) for i in range(200))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_counted_and_stops_nothing():
    made = guard.Guard([Says(SAFE)], audit=guard_audit.Audit("/dev/full"))
    for _ in range(3):
        assert made.check_prompt("x").action == "allow"
    assert made.counts() == {"input/allow": 3, "audit/lost": 3}


def test_a_line_that_was_cut_spoils_no_other(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    audit = guard_audit.Audit(str(path))
    verdict = guard_verdict.Verdict("safe", (), {}, None, "allow")
    whole = os.write
    audit.write(verdict, ["a"], "1")
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[: len(data) // 2]))
    audit.write(verdict, ["b"], "2")
    monkeypatch.setattr(os, "write", whole)
    audit.write(verdict, ["c"], "3")
    audit.write(verdict, ["d"], "4")
    first, cut, *rest = path.read_text().splitlines()
    assert json.loads(first)["request"] == "1" and audit.lost == 1
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut)
    assert [json.loads(line)["request"] for line in rest] == ["3", "4"]


def test_a_log_that_cannot_be_begun(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "no" / "a.jsonl", tmp_path, tmp_path / "link"):
        with pytest.raises(config.InputError, match="audit log"):
            guard_audit.Audit(str(path))


def test_a_log_that_was_moved_away_is_begun_anew(tmp_path):
    path = tmp_path / "audit.jsonl"
    made = guard.load(audit=str(path))
    made.check_prompt("one")
    path.rename(tmp_path / "old.jsonl")
    made.check_prompt("two")
    assert len(lines(path)) == len(lines(tmp_path / "old.jsonl")) == 1


# --- moderations ---


def test_moderation_results_as_openais_package_reads_them():
    moderation = pytest.importorskip("openai.types.moderation")
    said = finding(violent="unsafe", pii="unsafe", unethical="controversial")
    verdict = guard.Guard([Says(said)]).check_prompt("x")
    made = guard.moderation_results(verdict)
    read = moderation.Moderation.model_validate(made)
    fields = moderation.Categories.model_fields
    keys = {field.alias or name for name, field in fields.items()}
    assert keys == set(guard.OPENAI) and len(keys) == 13
    assert read.flagged
    told = {key for key, value in made["categories"].items() if value}
    assert told == {
        "violence", "illicit/violent", "hate", "harassment",
        "Violent", "PII", "Unethical Acts",
    }  # fmt: skip
    assert read.category_scores.violence == 0.25 and read.category_scores.sexual == 0.0
    assert made["categories"].keys() == keys | set(guard_verdict.NAMES)
    assert made["category_scores"].keys() == made["categories"].keys()
    assert made["category_applied_input_types"].keys() == made["categories"].keys()
    assert made["qwen"]["level"] == "unsafe"
    json.dumps(made)


def test_what_is_allowed_is_not_flagged():
    policy = guard_policy.Policy(mode="loose")
    says = Says(finding(violent="controversial"))
    made = guard.moderation_results(guard.Guard([says], policy).check_prompt("x"))
    assert not made["flagged"] and not any(made["categories"].values())
    assert made["category_scores"]["violence"] == 0.25
    failed = guard.Guard([Says(OSError())]).check_prompt("x")
    assert guard.moderation_results(failed)["flagged"]


def test_counts():
    made = guard.Guard([Says(SAFE)])
    made.check_prompt("x")
    made.check_response("x", "y")
    watch = made.stream("x")
    watch.push("y")
    watch.end()
    assert made.counts() == {
        "input/allow": 1, "output/allow": 1, "stream/allow": 1, "audit/lost": 0,
    }  # fmt: skip
