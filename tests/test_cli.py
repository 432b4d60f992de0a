# SPDX-License-Identifier: Apache-2.0
"""The command line: help, unknown words with the nearest name, exit codes."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from qwen_jax import __version__, cli, config

ROOT = pathlib.Path(cli.__file__).resolve().parents[1]
RUN = ["run", "--config=x.py"]


@pytest.fixture
def call(capsys):
    """(exit code, standard output, standard error) of a command."""

    def call(*words):
        try:
            code = cli.main(words)
        except SystemExit as end:  # argparse, after --help and --version
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def verb(monkeypatch):
    """Call with a function that stands in for what `qwen-jax doctor` does."""
    return lambda fn: monkeypatch.setitem(cli.VERBS, "doctor", lambda *_: fn())


def refused(call, *words):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "COMMAND"),
        (["run"], "--takeover"),
        (["generate"], "--prompt_file"),
        (["chat"], "--thinking"),
        (["data"], "preview"),
        (["data", "preview"], "--rows"),
        (["report"], "--out"),
        (["convert"], "RUN_OR_MODEL"),
        (["doctor"], "--json"),
        (["bench"], "train     a training step"),
        (["bench", "train"], "--peers"),
    ],
)
def test_every_verb_has_help(call, words, told):
    code, out, err = call(*words, "--help")
    assert (code, err) == (0, "") and told in out
    name = " ".join(["usage: qwen-jax", *words])
    assert out.startswith(name)


def test_every_verb_is_in_the_help_and_has_a_function(call):
    _, out, _ = call()
    listed = {line.split()[0] for line in out.splitlines() if line[:4] == " " * 4}
    assert listed - {"COMMAND"} >= {*cli.VERBS, "bench"}
    assert "-h" not in cli.VERBS
    assert call()[0] == 0 and call("bench")[0] == 0


def test_version(call):
    assert call("--version") == (0, f"qwen_jax {__version__}\n", "")


def test_a_mistake_is_told_without_loading_what_the_verb_would_need():
    """Whoever mistypes a flag does not wait for JAX."""
    code = "import sys; from qwen_jax import cli; code = cli.main(sys.argv[1:]);"
    code += "print(code, sorted({'jax', 'numpy', 'ml_collections'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "--confg", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2 []\n" and "did you mean --config?" in done.stderr


@pytest.mark.parametrize(
    "words, told",
    [
        (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["zzz"], "unknown command 'zzz'; known: bench, chat, convert, data, doct"),
        (["data", "preveiw"], "unknown command 'preveiw'; did you mean 'preview'?"),
        (["data"], "required: COMMAND (qwen-jax data --help"),
        (["bench", "trian"], "unknown bench 'trian'; did you mean 'train'?"),
        (["--jsn"], "unknown flag --jsn of qwen-jax; known: --help, --version"),
        ([*RUN, "--workdri=d"], "unknown flag --workdri of qwen-jax run; did you m"),
        ([*RUN, "--work", "d"], "unknown flag --work of qwen-jax run; did you mean"),
        (
            ["doctor", "--jsn"],
            "unknown flag --jsn of qwen-jax doctor; did you mean --j",
        ),
        (["bench", "train", "--round=3"], "unknown flag --round; did you mean '--ro"),
        (["run"], "the following arguments are required: --config"),
        (["report"], "the following arguments are required: DIR"),
        (["convert", "a", "b", "--step", "x"], "argument --step: invalid int value"),
        ([*RUN, "more"], "unrecognized arguments: more"),
        ([*RUN, "--config.seed"], "--config.seed needs a value"),
        (["doctor", "--config.seed=1"], "qwen-jax doctor takes no --config.* flags"),
        (
            ["data", "preview", "--config=x.py", "--color=alwys"],
            "--color 'alwys'; did you mean 'always'?",
        ),
    ],
)
def test_an_unknown_word_is_told_with_what_was_wanted(call, words, told):
    assert told in refused(call, *words)


def test_an_unknown_key_is_told_with_the_nearest(call):
    words = ["run", f"--config={ROOT}/tests/tiny.py", "--workdir=/nowhere"]
    told = "--config.optim.lr_peek: unknown key 'lr_peek'; did you mean 'lr_peak'?"
    for spelling in (["--config.optim.lr_peek=1"], ["--config.optim.lr_peek", "1"]):
        assert refused(call, *words, *spelling) == told


def test_overrides_have_two_spellings():
    words = ["run", "--config.a.b=1", "--config", "x", "--config.c", "-1", "--quiet"]
    rest, pairs = cli.split_overrides([*words, "--config.d=e=f", "--config.g="])
    assert rest == ["run", "--config", "x", "--quiet"]
    assert pairs == [("a.b", "1"), ("c", "-1"), ("d", "e=f"), ("g", "")]


@pytest.mark.parametrize("number, fix", cli.DISK.items())
def test_a_disk_that_cannot_be_written_is_told_with_its_fix(call, verb, number, fix):
    def fail():
        raise OSError(number, os.strerror(number), "run/metrics.jsonl")

    verb(fail)
    told = refused(call, "doctor")
    assert told.startswith(f"run/metrics.jsonl: {os.strerror(number)}; {fix}")
    assert told.endswith("then give the same command again")


def test_other_errors_of_the_system_are_faults_of_the_program(call, verb):
    def fail():
        raise OSError(errno.EIO, "broken")

    verb(fail)
    with pytest.raises(OSError, match="broken"):
        call("doctor")


def test_a_mistake_ends_with_2_and_ctrl_c_with_130(call, verb):
    def mistake():
        raise config.InputError("3 is no 4: take 4")

    def interrupt():
        raise KeyboardInterrupt

    verb(mistake)
    assert call("doctor") == (2, "", "error: 3 is no 4: take 4\n")
    verb(interrupt)
    assert call("doctor") == (130, "", "interrupted\n")
    verb(lambda: 1)
    assert call("doctor") == (1, "", "")


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys; from qwen_jax import cli\n"
    code += "cli.VERBS['doctor'] = lambda *_: print('x' * 10**6, flush=True) or 0\n"
    code += "sys.exit(cli.main(['doctor']))"
    command = f'{sys.executable} -c "{code}" | head -c 10; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("x" * 10 + "0\n", "")


def test_flags_reach_the_verb(monkeypatch):
    got = []
    monkeypatch.setitem(cli.VERBS, "run", lambda *seen: got.append(seen) or 0)
    words = ["--workdir=d", "--config.seed=4", "--takeover", "--num_processes", "2"]
    assert cli.main([*RUN, *words]) == 0
    ((args, overrides),) = got
    assert overrides == [("seed", "4")]
    assert (args.config, args.workdir, args.takeover) == ("x.py", "d", True)
    assert (args.num_processes, args.process_id, args.data) == (2, -1, "")
