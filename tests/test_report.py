# SPDX-License-Identifier: Apache-2.0
"""The report page: of whole, killed, broken and hostile run folders, and of several."""

import base64
import hashlib
import html.parser
import json
import math
import pathlib
import re
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_jax import config, metrics, report
from qwen_jax.report import page, plot, record

HOSTILE = '</table><script>alert("x")</script><img src=x onerror=alert(1)>&amp;'


def make_run(folder, steps=60, facts=None, loss=lambda step: 9.0 / (1 + step / 9)):
    """A run folder as training writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {
        "commit": "0123456789abcdef",
        "dirty": True,
        "command": "qwen-jax run --config experiments/quickstart.py --workdir runs/x",
        "config": {"seed": 1, "train": {"num_steps": 60}, "optim": {"lr_peak": 0.01}},
        "versions": {"jax": "0.10.2"},
        "host": "laptop",
        "started": "2026-03-04T05:06:07+00:00",
        "derivation": ["1. tokens = 6,000: given"],
        "gzip_bits_per_byte": 2.5,
    }
    (folder / "run.json").write_text(json.dumps(known | (facts or {})))
    with metrics.Writer(folder / "metrics.jsonl") as writer:
        writer.write(0, {"event": "start", "time": 1.7e9})
        for step in range(1, steps + 1):
            row = {"loss": loss(step), "bits_per_byte": loss(step) / 2, "lr": 0.01}
            row |= {"tokens": 100 * step, "tokens_per_s": 1e4, "mfu": 0.4}
            row |= {"step_s": 2.0, "grad_norm": 1.0, "skipped_steps": 0}
            writer.write(step, row)
            if step % 20 == 0:
                writer.write(
                    step, {"eval_loss": 3.0, "eval_bits_per_byte": 3 - step / 30}
                )
    samples = [
        {"step": s, "prompt": "Once", "text": f" upon {s}"} for s in (20, 40, 60)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in samples)
    (folder / "samples.jsonl").write_text(lines)
    for step in (20, 40):
        (folder / "checkpoints" / f"{step:08d}").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / f"{step:08d}" / "data").write_bytes(b"0" * 2**20)
    (folder / "checkpoints" / "tmp.60").mkdir(exist_ok=True)
    return folder


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def test_a_finished_run_tells_what_matters(tmp_path):
    out = report.write([make_run(tmp_path / "run")])
    assert out == tmp_path / "run" / "report.html"
    shown = Page(out.read_text())
    for words in (
        "finished, 60 steps",
        "held-out bits/byte 1.000 the best so far",
        "gzip -9 bits/byte 2.500 model: 40% of that",
        "tokens 6.00k targets seen",
        "tokens/s 10.0k",
        "MFU 40.0%",
        "time 2m00s",
        "commit 0123456789, changed · on laptop · jax 0.10.2 · started 2026-03-04",
        "training loss 1.258 mean of last 10",
        "Why these numbers 1. tokens = 6,000: given",
        "Once upon 20",
        "Once upon 60",
        "40 1.0 MiB",
        "qwen-jax run --config experiments/quickstart.py --workdir runs/x",
        "optim.lr_peak 0.01",
        "start 0 2023-11-14 22:13:20 UTC",
    ):
        assert words in shown.words, words
    assert "tmp.60" not in shown.words
    assert shown.tags.count("svg") == 6
    assert not list((tmp_path / "run").glob("*.part"))


def test_the_command_says_where_the_page_is(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert report.main([str(folder)]) == 0
    assert report.main([str(folder)], str(tmp_path / "x.html")) == 0
    first, second = capsys.readouterr().out.split()
    assert first == str(folder / "report.html") and second == str(tmp_path / "x.html")
    assert all(
        pathlib.Path(p).read_text().endswith("</html>\n") for p in (first, second)
    )


def test_the_page_needs_and_allows_nothing_from_outside(tmp_path):
    text = report.write([make_run(tmp_path / "run")]).read_text()
    shown = Page(text)
    assert not {"link", "img", "iframe", "object", "base"} & set(shown.tags)
    assert not [a for a, _ in shown.attributes if a in ("src", "href") or a[:2] == "on"]
    assert "url(" not in text and "@import" not in text and "http" not in shown.words
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [v for k, v in shown.attributes if k == "content"]
    assert any(
        f"'sha256-{digest}'" in p and "default-src 'none'" in p for p in policies
    )
    assert text.count("<script") == 1


def test_texts_from_the_run_folder_are_text_on_the_page(tmp_path):
    """Samples, events, counters, configuration, commands, names of folders."""
    facts = {
        "command": HOSTILE,
        "host": HOSTILE,
        "config": {HOSTILE: HOSTILE, "train": {"num_steps": 9}},
    }
    folder = make_run(tmp_path / 'run<b>"x', facts=facts)
    row = {"step": 60, "prompt": HOSTILE, "text": HOSTILE}
    with open(folder / "samples.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with metrics.Writer(folder / "metrics.jsonl") as writer:
        writer.write(61, {"event": HOSTILE, HOSTILE: HOSTILE, "time": HOSTILE})
        writer.write(61, {"data": {HOSTILE: {"x": HOSTILE}}})
    for runs in ([folder], [folder, folder]):
        text = report.write(runs, tmp_path / "out.html").read_text()
        shown = Page(text)
        assert text.count("<script") == 1 and "<img" not in text
        assert not [a for a, _ in shown.attributes if a.startswith("on")]
        assert HOSTILE in "".join(shown.text)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "run.json").unlink(), "run.json is missing"),
        (lambda f: (f / "run.json").write_text('{"a'), "run.json is not valid JSON"),
        (lambda f: (f / "run.json").write_text("[1]"), "run.json is not a JSON object"),
        (lambda f: (f / "samples.jsonl").unlink(), "samples.jsonl is missing"),
        (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (
            lambda f: (f / "metrics.jsonl").write_bytes(
                b'{"step": 1, "loss": 2}\n{"st'
            ),
            "metrics.jsonl: 1 broken lines left out, first 2",
        ),
        (
            lambda f: (f / "run.json").write_text(
                '{"config": [1], "versions": 3, "gzip_bits_per_byte": "x"}'
            ),
            "gzip -9 bits/byte –",
        ),
    ],
)
def test_what_is_missing_or_broken_is_said(tmp_path, break_it, words):
    folder = make_run(tmp_path / "run")
    break_it(folder)
    assert words in Page(report.write([folder]).read_text()).words


def test_what_was_not_asked_for_is_not_missed(tmp_path):
    facts = {"config": {"sample": {"every_steps": 0}}}
    folder = make_run(tmp_path / "run", facts=facts)
    (folder / "samples.jsonl").unlink()
    shutil.rmtree(folder / "checkpoints")
    shown = Page(report.write([folder]).read_text()).words
    assert "samples.jsonl" not in shown and "No finished checkpoint." in shown
    assert "Start it again: qwen-jax run" in shown and "Go on from" not in shown


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(config.InputError, match="no such folder"):
        report.write([tmp_path / "none"])
    with pytest.raises(config.InputError, match=r"neither run\.json"):
        report.write([tmp_path])
    with pytest.raises(config.InputError, match="no run folder given"):
        report.write([])
    with pytest.raises(config.InputError, match="--out"):
        report.write([make_run(tmp_path / "run")], tmp_path / "absent" / "x.html")


def test_state_of_a_run(tmp_path):
    folder = make_run(tmp_path / "run", steps=30)
    run = record.load(folder)
    now = run.written_s
    assert run.status(now + 5) == ("live", "running, step 30 of 60")
    assert run.status(now + 3600) == ("bad", "silent for 1h00m, step 30 of 60")
    with metrics.Writer(folder / "metrics.jsonl") as writer:
        writer.write(30, {"event": "stop"})
    assert record.load(folder).status(now) == ("idle", "stopped, step 30 of 60")
    (folder / "metrics.jsonl").unlink()
    assert record.load(folder).status(now) == ("idle", "no step yet")


def test_non_finite_values_are_counted_and_not_drawn(tmp_path):
    bad = {10: math.nan, 11: math.inf, 12: -math.inf}
    folder = make_run(tmp_path / "run", loss=lambda step: bad.get(step, 2.0 + step))
    text = report.write([folder]).read_text()
    assert "3 non-finite values are not drawn" in Page(text).words
    drawn = "".join(re.findall(r' d="[^"]*"', text))
    assert "nan" not in drawn and "inf" not in drawn


def test_later_lines_of_a_step_win_and_order_does_not_matter(tmp_path):
    folder = make_run(tmp_path / "run", steps=3)
    with metrics.Writer(folder / "metrics.jsonl") as writer:
        writer.write(2, {"loss": 7.0})
    points, _ = record.load(folder).points("loss")
    assert [x for x, _ in points] == [1, 2, 3] and points[1] == (2, 7.0)


def test_several_runs_are_compared(tmp_path):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", facts={"config": {"optim": {"lr_peak": 0.5}}})
    c = make_run(tmp_path / "deep" / "b", steps=0)
    out = report.write([a, b, c])
    assert out == tmp_path / "report.html"
    shown = Page(out.read_text())
    assert "3 runs" in shown.words
    assert f"{tmp_path.name}/b" in shown.words and "deep/b" in shown.words
    assert "optim.lr_peak 0.01 0.5" in shown.words  # in the table of differences
    losses = re.search(r"<figure.*?</figure>", out.read_text(), re.DOTALL)[0]
    assert losses.count('class="line s0"') == 2 == losses.count('class="line s1"')
    assert 'class="line s2"' not in losses  # it has no point yet


def test_samples_show_first_and_last_of_many(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [{"step": s, "prompt": "p", "text": f"t{s}."} for s in range(100)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(lines)
    shown = Page(report.write([folder]).read_text()).words
    seen = re.findall(r"p t(\d+)\.", shown)
    assert len(seen) == page.SAMPLES and seen[0] == "0" and seen[-1] == "99"
    assert "100 in all" in shown


@given(
    points=st.lists(
        st.tuples(st.integers(0, 10**9), st.floats(-1e300, 1e300)),
        min_size=1,
        max_size=40,
    ),
    zero=st.booleans(),
    level=st.floats(0, 1e6) | st.just(math.nan),
)
@example(points=[(0, 5e-324)], zero=True, level=0.0)
def test_any_finite_curve_can_be_drawn(points, zero, level):
    points = [(float(x), y) for x, y in sorted(dict(points).items())]
    figure = plot.figure("t", [plot.Series("s", 0, points)], zero=zero, level=level)
    drawn = " ".join(re.findall(r' (?:d|x|y|cx|cy)="([^"]*)"', figure))
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d|-?\d+", drawn)]
    assert all(-20 <= n <= plot.WIDTH for n in numbers)
    assert "nan" not in drawn and "inf" not in drawn


def test_long_curves_are_averaged_with_their_extremes():
    points = [(float(i), float(i % 10)) for i in range(10_000)]
    got = plot.averaged(points, 100)
    assert got[0] == (99.0, 4.5, 0.0, 9.0) and len(got) == 100
    figure = plot.figure("t", [plot.Series("s", 0, points)])
    line = re.search(r'class="line s0" d="([^"]*)"', figure)[1]
    assert line.count("L") < plot.POINTS and 'class="band s0"' in figure


@pytest.mark.parametrize(
    ("low", "high", "log", "want"),
    [
        (0.0, 10.0, False, [0, 2, 4, 6, 8, 10]),
        (0.0, 0.003, False, [0, 0.001, 0.002, 0.003]),
        (-7.0, 4.0, False, [-6, -4, -2, 0, 2, 4]),
        (0.5, 80.0, True, [0.5, 1, 2, 5, 10, 20, 50]),
        (1.5, 5.2, True, [2, 3, 4, 5]),
        (1e-3, 1e6, True, [1e-3, 1e-1, 1e1, 1e3, 1e5]),
        (2.0, 2.0, False, [2.0]),
    ],
)
def test_ticks_are_round_and_inside(low, high, log, want):
    assert plot.ticks(low, high, log) == pytest.approx(want)


def test_needles_asked_of_a_run_are_on_its_page_and_broken_ones_are_told(tmp_path):
    folder = make_run(tmp_path / "run")
    grid = {"lengths": [256, 4096], "depths": [0.5], "found": [[0.95], [0.3]]}
    text = json.dumps(grid | {"title": HOSTILE})
    (folder / "needle.json").write_text(text)
    (folder / "needle-2.json").write_text(json.dumps(grid | {"found": [[1]]}))
    (folder / "needle-3.json").write_text("{")
    page_text = report.write([folder]).read_text()
    assert "Needles in haystacks" in page_text and HOSTILE not in page_text
    assert "4,096 tokens, depth 50 %: 30%" in page_text
    for name in ("needle-2.json", "needle-3.json"):
        assert f"{name} is no grid of needles and was left out." in page_text
    assert page_text.count('class="x cell"') == 2
