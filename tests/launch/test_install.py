# SPDX-License-Identifier: Apache-2.0
"""install.sh over a stand-in Python: made once, made anew when half-made; core size."""

import configparser
import importlib.metadata
import pathlib
import re
import shutil

import pytest
from packaging import requirements

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A Python that can only say its version, make a venv (a copy of itself) and note what
# pip was asked for. DIES=venv|pip ends it there with kill -9 of the calling script too.
PYTHON = """
die() { [[ "${DIES:-}" != "$1" ]] || { kill -9 "$PPID"; exit 1; }; }
case "$*" in
*ensurepip*) [[ -z "${TOO_OLD:-}" ]] && echo "${SAYS:-3.12}" ;;
*version_info*) echo "${SAYS:-3.12}" ;;
"-m venv "*)
    mkdir -p "$3/bin"
    die venv
    cp "$0" "$3/bin/python"
    echo made >> "$SEEN"
    ;;
"-m pip install "*)
    echo "pip ${*: -1}${FORCED:-} $*" >> "$SEEN"
    die pip
    [[ -z "${FAILS:-}" ]] || { echo "pip: no such package" >&2; exit 1; }
    ;;
esac
"""


@pytest.fixture
def install(shell):
    """install.sh in a copy of the repository; `install.seen()` tells what it called."""
    root = shell.folder / "repository"
    (root / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch/install.sh", root / "launch")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    for name in ("python3", "python3.12"):
        shell.stand_in(name, PYTHON)
    seen = shell.folder / "seen"
    shell.env["SEEN"] = str(seen)

    def call(*extras, code=0, **env):
        seen.write_text("")
        return shell("launch/install.sh", *extras, code=code, cwd=root, **env)

    def calls() -> list[str]:
        return [" ".join(line.split()[:2]) for line in seen.read_text().splitlines()]

    call.seen, call.root, call.shell = calls, root, shell
    call.pip = lambda: seen.read_text()
    return call


def test_makes_the_folder_installs_pinned_and_prints_it(install):
    done = install()
    assert done.stdout == ".venv\n" and "installing qwen_jax into .venv" in done.stderr
    assert install.seen() == ["made", "pip ."]
    assert "-c constraints.txt -e ." in install.pip()


def test_does_nothing_the_second_time(install):
    install("test")
    done = install("test")
    assert (done.stdout, done.stderr, install.seen()) == (".venv\n", "", [])


def test_extras_add_up_and_none_is_lost(install):
    install("test")
    install()
    assert install.seen() == []  # the core is in it
    install("hf,tpu")
    assert install.seen() == ["pip .[hf,test,tpu]"]


@pytest.mark.parametrize("name", ["setup.cfg", "constraints.txt", "pyproject.toml"])
def test_installs_again_in_place_when_a_file_changed(install, name):
    install("test")
    with (install.root / name).open("a") as file:
        file.write("# changed\n")
    install()
    assert install.seen() == ["pip .[test]"]


@pytest.mark.parametrize("where", ["venv", "pip"])
def test_a_folder_left_half_made_is_made_anew(install, where):
    install(code=-9, DIES=where)
    done = install()
    assert "half-made" in done.stderr
    assert install.seen() == ["made", "pip ."]
    assert install() and install.seen() == []
    assert [p.name for p in install.root.glob(".venv*")] == [".venv"]


def test_a_change_cut_short_is_made_anew(install):
    install()
    install("test", code=-9, DIES="pip")
    install("test")
    assert install.seen() == ["made", "pip .[test]"]


def test_an_empty_folder_is_taken_as_none(install):
    (install.root / ".venv").mkdir()
    install()
    assert install.seen() == ["made", "pip ."]


def test_a_folder_of_somebody_else_is_used_and_never_deleted(install):
    bin_dir = install.root / ".venv/bin"
    bin_dir.mkdir(parents=True)
    shutil.copy(install.shell.bin / "python3", bin_dir / "python")
    (install.root / ".venv/precious").touch()
    install(code=-9, DIES="pip")
    install()
    assert install.seen() == ["pip ."]
    assert "--force-reinstall" in install.pip()  # what was cut short may look whole
    assert (install.root / ".venv/precious").exists()


def test_a_folder_that_is_no_environment_is_refused(install):
    (install.root / ".venv").mkdir()
    (install.root / ".venv/precious").touch()
    done = install(code=2)
    assert ".venv exists" in done.stderr and "VENV=" in done.stderr
    assert (install.root / ".venv/precious").exists()


def test_pips_error_is_shown_and_the_next_call_starts_anew(install):
    done = install(code=2, FAILS="1")
    assert "no such package" in done.stderr and "could not install" in done.stderr
    install()
    assert install.seen() == ["made", "pip ."]


def test_another_python_gets_a_folder_of_its_own(install):
    install()
    assert install(PYTHON="python3.12").stdout == ".venv-3.12\n"
    assert install.seen() == ["made", "pip ."]


def test_without_a_python_it_says_what_to_install(install):
    for name in ("python3.13", "python3.11", "python"):
        install.shell.stand_in(name, PYTHON)
    done = install(code=2, TOO_OLD="1")
    assert "no Python of 3.11" in done.stderr and "PYTHON=" in done.stderr
    done = install(code=2, TOO_OLD="1", PYTHON="python3.12")
    assert "PYTHON=python3.12" in done.stderr


def test_quickstart_hands_paths_on_as_the_user_meant_them(install):
    shutil.copy(ROOT / "launch/quickstart.sh", install.root / "launch")
    install()
    command = 'echo "$PWD $GLIBC_TUNABLES $*"'
    install.shell.bin = install.root / ".venv/bin"
    install.shell.stand_in("qwen-jax", command)
    script = install.root / "launch/quickstart.sh"
    here = install.shell.folder
    flags = ["--data", "my texts", "--config.train.num_steps=3", "--workdir=w"]
    done = install.shell(script, *flags, cwd=here)
    assert done.stdout == (
        f"{install.root} glibc.malloc.hugetlb=1 run --config "
        f"experiments/quickstart.py --workdir runs/quickstart --data {here}/my texts "
        f"--config.train.num_steps=3 --workdir {here}/w\n"
    )
    done = install.shell(script, "--data", "gs://b/x", cwd=here, GLIBC_TUNABLES="a=1")
    assert "a=1 run" in done.stdout and "--data gs://b/x" in done.stdout
    assert "--data needs a path" in install.shell(script, "--data", code=2).stderr


# --- the size of the core ---


def closure() -> dict[str, importlib.metadata.Distribution]:
    """The core and all that it brings, as installed here, without any extra of ours."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = [requirements.Requirement("qwen_jax")]
    seen = set()
    while left:
        requirement = left.pop()
        name = requirement.name.lower().replace("_", "-")
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found[name] = importlib.metadata.distribution(requirement.name)
            for line in found[name].requires or ():
                inner = requirements.Requirement(line)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    left.append(inner)
    del found["qwen-jax"]
    return found


def test_the_core_is_small():
    """At most 65 distributions and 1 GB on disk: all else is an extra."""
    core = closure()
    size_bytes = sum(
        path.stat().st_size
        for distribution in core.values()
        for file in distribution.files or ()
        if (path := pathlib.Path(distribution.locate_file(file))).is_file()
    )
    print(f"core: {len(core)} distributions, {size_bytes / 1e6:.0f} MB")
    assert 30 < len(core) <= 65, sorted(core)
    assert 100e6 < size_bytes <= 1e9
    heavy = {"torch", "tensorflow", "transformers", "libtpu", "pyarrow", "matplotlib"}
    assert not heavy & core.keys()


def pins() -> dict[str, str]:
    """Name -> the version that constraints.txt pins (one of them)."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [text for line in lines if (text := line.partition("#")[0].strip())]
    found = map(requirements.Requirement, lines)
    return {r.name.lower().replace("_", "-"): str(r.specifier) for r in found}


def test_the_image_can_read_what_a_data_path_may_name():
    """On TPUs, from buckets and parquet files, every package pinned."""
    text = (ROOT / "launch/gke/Dockerfile").read_text()
    install = re.search(r"^RUN pip install .* '\.\[(.*)\]'$", text, re.M)
    assert "--constraint constraints.txt" in install[0]
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    lines = [x for extra in install[1].split(",") for x in extras[extra].split("\n")]
    wanted = [requirements.Requirement(line) for line in lines if line]
    assert {"jax", "pyarrow", "gcsfs"} <= {r.name for r in wanted}
    for requirement in wanted:
        assert requirement.specifier.contains(pins()[requirement.name].strip("="))
    # what gcsfs brings besides
    assert {"google-cloud-storage-control", "google-auth-oauthlib"} <= pins().keys()


def test_everything_that_is_asked_for_is_pinned():
    pinned = pins().keys()
    assert closure().keys() <= pinned
    asked = {
        requirement.name.lower().replace("_", "-")
        for line in importlib.metadata.requires("qwen_jax") or ()
        if 'extra == "cuda"' not in line
        for requirement in [requirements.Requirement(line)]
    }
    assert asked - {"qwen-jax"} <= pinned
