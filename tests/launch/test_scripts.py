# SPDX-License-Identifier: Apache-2.0
"""Every launcher: help, refusals, and the exact commands of a dry run."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from qwen_jax import verbs

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHELL_SCRIPTS = sorted(p.relative_to(ROOT) for p in ROOT.glob("launch/*.sh"))
COMMANDS = [*SHELL_SCRIPTS, *map(ROOT.joinpath, ("launch/tpu_gke.py",))]
RUN = ["run", "--config", "experiments/a b.py:tiny", "--workdir", "/runs/x"]


@pytest.mark.parametrize("script", [*SHELL_SCRIPTS, ".ci/run"], ids=str)
def test_is_an_executable_script_that_parses(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", COMMANDS, ids=str)
def test_help_says_the_usage_and_nothing_else_happens(shell, script):
    done = shell(ROOT / script, "--help", VENV=str(shell.folder / "none"))
    assert f"Usage: {os.path.relpath(ROOT / script, ROOT)}" in done.stdout
    assert not done.stderr
    assert not (shell.folder / "none").exists()


@pytest.mark.parametrize("script", ["local.sh", "gpu_slurm.sh", "tpu_pod.sh"])
def test_wrong_flags_are_refused_with_the_flag_named(shell, script):
    done = shell(ROOT / "launch" / script, "--nonsense", "--", *RUN, code=2)
    assert "--nonsense" in done.stderr and "--help" in done.stderr
    done = shell(ROOT / "launch" / script, "--dry_run", code=2)
    assert "nothing to run" in done.stderr


# --- local.sh ---


def test_local_dry_run_prints_one_command_per_process(shell):
    local = ROOT / "launch/local.sh"
    shell.stand_in("nvidia-smi", "exit 1")
    done = shell(local, "--processes", 2, "--port", 7, "--dry_run", "--", *RUN)
    base = r".venv/bin/qwen-jax run --config experiments/a\ b.py:tiny --workdir /runs/x"
    group = "--coordinator=127.0.0.1:7 --num_processes=2 --process_id="
    assert done.stdout.splitlines() == [
        f"{base} {group}0 &",
        f"{base} {group}1 >>runs/local/process-1.log 2>&1 &",
    ]
    alone = shell(local, "--dry_run", "--", *RUN).stdout
    assert alone.strip() == base
    shell.stand_in("nvidia-smi", "exit 0")
    done = shell(local, "--processes", 2, "--dry_run", "--", *RUN)
    assert re.findall(r"^JAX_LOCAL_DEVICE_IDS=(\d)", done.stdout, re.M) == ["0", "1"]


PROCESS = f"""#!{sys.executable}
import signal, sys, time
me = int(sys.argv[-1].rpartition("=")[2])
def save(*_):
    print("saved", me, flush=True)
    time.sleep(1)  # a second signal would be seen
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("up", me, flush=True)
if sys.argv[1] == "fail" and me == 1:
    sys.exit(3)
time.sleep(0.2 if sys.argv[1] == "short" else 60)
"""


@pytest.fixture
def local(shell):
    shell.stand_in("venv/bin/qwen-jax", PROCESS)
    (shell.bin / "venv/bin/python").symlink_to(sys.executable)
    shell.stand_in("nvidia-smi", "exit 1")
    shell.env["VENV"] = str(shell.bin / "venv")
    flags = ["--processes", 3, "--log_dir", shell.folder / "logs", "--"]
    return [ROOT / "launch/local.sh", *flags]


def test_local_ends_when_all_processes_have(shell, local):
    done = shell(*local, "short")
    assert done.stdout == "up 0\n"
    logs = sorted(p.read_text() for p in (shell.folder / "logs").iterdir())
    assert logs == ["up 1\n", "up 2\n"]


def test_local_ends_the_others_when_one_fails(shell, local):
    start_s = time.monotonic()
    done = shell(*local, "fail", code=3)
    assert time.monotonic() - start_s < 30
    assert "exit code 3" in done.stderr and done.stdout == "up 0\nsaved 0\n"
    assert (shell.folder / "logs/process-2.log").read_text() == "up 2\nsaved 2\n"


def test_local_hands_a_signal_to_every_process(shell, local):
    process = shell.start(*local, "long")
    assert process.stdout.readline() == "up 0\n"
    last = shell.folder / "logs/process-2.log"
    while not (last.exists() and "up" in last.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "saved 0\n"
    assert last.read_text() == "up 2\nsaved 2\n"


# --- gpu_slurm.sh ---


def slurm_job(shell, *flags) -> str:
    done = shell(ROOT / "launch/gpu_slurm.sh", *flags, "--dry_run", "--", *RUN)
    return done.stdout


def test_slurm_job_file_asks_for_what_was_said(shell):
    flags = ["--nodes", 4, "--gpus_per_node", 2, "--time", "1:00:00"]
    flags += ["--partition", "h100", "--sbatch", "--exclusive", "--name", "n"]
    job = slurm_job(shell, *flags)
    assert set(re.findall("^#SBATCH (.*)", job, re.M)) == {
        "--job-name=n",
        "--nodes=4",
        "--ntasks-per-node=2",
        "--cpus-per-task=8",
        "--gpus-per-node=2",
        "--time=1:00:00",
        "--signal=B:USR1@120",
        "--requeue",
        "--open-mode=append",
        "--output=runs/slurm/%j.log",
        "--partition=h100",
        "--exclusive",
    }
    command = r"run --config experiments/a\ b.py:tiny --workdir /runs/x --distributed &"
    assert command in job
    assert "JAX_LOCAL_DEVICE_IDS" not in job  # each process takes the GPU of its rank
    by_node = slurm_job(shell, "--gpus_per_node", 2, "--per", "node")
    assert "#SBATCH --ntasks-per-node=1\n" in by_node
    assert "export JAX_LOCAL_DEVICE_IDS=0,1\n" in by_node


@pytest.mark.parametrize(
    ("flags", "cores"),
    [
        ([], "8"),
        (["--per", "node"], "64"),
        (["--cpus_per_task", 12], "12"),
        (["--cpus_per_task", 0, "--per", "node"], None),
    ],
)
def test_slurm_gives_a_process_cores_twice_over(shell, flags, cores):
    """In the job and to srun, which since 22.05 does not take it over from the job."""
    job = slurm_job(shell, *flags)
    asked = re.findall(r"^#SBATCH --cpus-per-task=(.*)$", job, re.M)
    [srun] = re.findall(r"^srun (.*)$", job, re.M)
    given = re.findall(r"--cpus-per-task=(\S+)(?= .*qwen-jax)", srun)
    assert asked == given == ([cores] if cores else [])


def test_slurm_refuses_a_wrong_count(shell):
    script = ROOT / "launch/gpu_slurm.sh"
    done = shell(script, "--nodes", "two", "--dry_run", "--", *RUN, code=2)
    assert "--nodes two" in done.stderr
    done = shell(script, "--cpus_per_task", "all", "--dry_run", "--", *RUN, code=2)
    assert "--cpus_per_task all" in done.stderr


def test_slurm_submits_the_file_it_shows(shell):
    shell.stand_in("sbatch", 'cat > "$SEEN"; echo "77;cluster"')
    seen, logs = shell.folder / "job", shell.folder / "logs"
    flags = ["--log_dir", logs, "--", *RUN]
    done = shell(ROOT / "launch/gpu_slurm.sh", *flags, SEEN=str(seen))
    assert "scancel 77" in done.stdout and f"{logs}/77.log" in done.stdout
    assert slurm_job(shell, "--log_dir", logs).startswith(seen.read_text())


# As srun does: a SIGTERM to itself kills its processes. USR2 stands for theirs.
SRUN = """trap 'echo killed; exit 143' TERM
trap 'echo saved; exit 0' USR2
echo "srun $*"
[[ -z "${FAILS:-}" ]] || exit 9
echo $$ > "$UP.new" && mv "$UP.new" "$UP"
for _ in $(seq "${TICKS:-600}"); do sleep 0.1; done
"""


def run_slurm_job(shell, **env):
    shell.stand_in("srun", SRUN)
    shell.stand_in("scontrol", 'echo "scontrol $*"')
    tell = '[[ "$*" == "--signal=TERM 77" ]] && kill -USR2 "$(cat "$UP")"'
    shell.stand_in("scancel", tell)
    job = shell.folder / "job.sh"
    job.write_text(slurm_job(shell))
    up = shell.folder / "up"
    return up, shell.start("bash", job, UP=str(up), SLURM_JOB_ID="77", **env)


def wait_for(path):
    deadline_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline_s, path
        time.sleep(0.02)


@pytest.mark.parametrize(("env", "code"), [({"TICKS": "1"}, 0), ({"FAILS": "1"}, 9)])
def test_slurm_job_ends_as_its_processes_do(shell, env, code):
    _, process = run_slurm_job(shell, **env)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert "scontrol" not in out


def test_slurm_job_goes_back_to_the_queue_near_the_time_limit(shell):
    up, process = run_slurm_job(shell)
    wait_for(up)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.index("saved") < out.index("scontrol requeue 77")
    assert "killed" not in out


def test_slurm_job_that_is_cancelled_does_not_come_back(shell):
    up, process = run_slurm_job(shell)
    wait_for(up)
    process.send_signal(signal.SIGTERM)  # Slurm tells this shell and the processes
    os.kill(int(up.read_text()), signal.SIGUSR2)
    out, _ = process.communicate(timeout=30)
    assert "saved" in out and "killed" not in out and "scontrol" not in out


# --- tpu_pod.sh ---


def test_tpu_pod_dry_run_is_what_a_run_would_call(shell):
    script = ROOT / "launch/tpu_pod.sh"
    flags = ["--name", "pod", "--zone", "z", "--create", "v6e-64", "--spot", "--"]
    dry = shell(script, "--dry_run", *flags, *RUN).stdout.splitlines()
    assert [re.sub(" .*(create|scp|ssh) ", r" \1 ", line)[:25] for line in dry[:5]] == [
        "gcloud create pod --zone=",
        "git archive --format=tar.",
        "gcloud scp " + dry[2].split(" scp ")[1][:14],
        "gcloud ssh pod --zone=z -",
        "gcloud ssh pod --zone=z -",
    ]
    assert "--accelerator-type=v6e-64" in dry[0] and dry[0].endswith("--spot ")
    assert "launch/install.sh" in dry[3]
    shell.stand_in("gcloud", 'printf "%s\\n" "$*" >> "$SEEN"')
    shell.stand_in("git", 'printf "git %s\\n" "$*" >> "$SEEN"')
    seen = shell.folder / "seen"
    shell(script, *flags, *RUN, SEEN=str(seen))
    calls = seen.read_text().splitlines()
    assert len(calls) == 5
    assert calls[4].startswith("compute tpus tpu-vm ssh pod --zone=z --worker=all")


def test_tpu_pod_names_a_python_and_says_how_hosts_get_one(shell):
    script = [ROOT / "launch/tpu_pod.sh", "--name", "pod", "--zone", "z"]
    dry = shell(*script, "--python", "/opt/py thon", "--dry_run", "--", *RUN).stdout
    # The folder stays the one from which the run is started.
    [line] = [x for x in dry.splitlines() if "install.sh" in x]
    [command] = [x for x in shlex.split(line) if x.startswith("--command=")]
    installs = "VENV=.venv PYTHON=/opt/py\\ thon qwen_jax/launch/install.sh tpu,"
    assert f"&& {installs}" in command
    assert "PYTHON" not in shell(*script, "--dry_run", "--", *RUN).stdout
    shell.stand_in("gcloud", '[[ "$*" != *install.sh* ]] || exit 2')
    done = shell(*script, "--", *RUN, code=2)
    assert "no Python of 3.11" in done.stderr and "--python" in done.stderr
    assert re.search(r"ssh pod --zone=z --worker=all .*apt-get install", done.stderr)
    assert "tpu_host.sh" not in done.stdout


SAVES = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
def save(*_):
    print("told")
    time.sleep(0.5)  # a second signal would be seen
    print("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("up", *sys.argv[1:])
if "fail" in sys.argv:
    sys.exit(9)
pathlib.Path(os.environ["UP"]).touch()
time.sleep(60)
"""


@pytest.fixture
def host(shell):
    """The home folder of a TPU host, with a run that saves on SIGTERM."""
    home = shell.folder / "home"
    (home / "qwen_jax/launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch/tpu_host.sh", home / "qwen_jax/launch")
    shell.bin = home / "qwen_jax"
    shell.stand_in(".venv/bin/qwen-jax", SAVES)
    shell.bin = shell.folder / "bin"
    shell.env["UP"] = str(home / "up")
    return home


def test_tpu_pod_a_run_saves_when_this_end_is_gone(shell, host):
    """gcloud stands in for ssh and a host: however this end ends, its input does."""
    text = 'cd "$HOST" && exec bash -c "$(printf "%s" "${*: -1}" | cut -d= -f2-)"'
    shell.stand_in("gcloud", text)
    flags = ["--name", "pod", "--zone", "z", "--no_install", "--"]
    script = ROOT / "launch/tpu_pod.sh"
    process = shell.start(script, *flags, "run", HOST=str(host))  # input: /dev/null
    wait_for(host / "up")
    time.sleep(0.5)
    [log] = (host / "qwen_jax/runs/tpu").iterdir()
    assert log.read_text() == "up run --distributed\n"  # nobody told it to stop
    process.kill()
    out, _ = process.communicate(timeout=30)  # ends when the last writer has
    assert out.splitlines()[1:] == ["up run --distributed", "told", "saved"]


def tpu_host(shell, host, *words):
    script = host / "qwen_jax/launch/tpu_host.sh"
    words = ["a", ".venv/bin/qwen-jax", *words]
    return shell.start(script, *words, stdin=subprocess.PIPE)


@pytest.mark.parametrize("signals", [[], [signal.SIGTERM], [signal.SIGINT] * 2])
def test_tpu_host_tells_the_run_once_when_the_connection_ends(shell, host, signals):
    process = tpu_host(shell, host, "run")
    wait_for(host / "up")
    # With a terminal there is a hang-up, too; a start that ignores it cannot hear it.
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    log = host / "qwen_jax/runs/tpu/a.log"
    assert log.read_text() == "up run\n"
    for number in signals:
        process.send_signal(number)
        while "told" not in log.read_text():
            time.sleep(0.02)
    process.stdout.close()  # nobody listens any more
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stderr.close()
    assert log.read_text() == "up run\ntold\nsaved\n"
    # gcloud tries a lost connection again: that is no new run.
    again = tpu_host(shell, host, "run")
    out, err = again.communicate(timeout=30)
    assert (again.returncode, out) == (1, "") and str(log) in err
    assert log.read_text() == "up run\ntold\nsaved\n"


def test_tpu_host_ends_as_the_run_does_and_shows_all_it_wrote(shell, host):
    with tpu_host(shell, host, "fail") as process:
        out, err = process.stdout.read(), process.stderr.read()  # its input stays open
        assert process.wait(timeout=30) == 9
        assert (out, err) == ("up fail\n", "")


# --- tpu_gke.py ---

STOPPED = ["--exit_code_when_stopped", "75"]


def gke(shell, *flags, code=0):
    script = ROOT / "launch/tpu_gke.py"
    flags = ["--image", "reg/q", "--dry_run", *flags]
    return shell(sys.executable, script, *flags, "--", *RUN, code=code)


def test_gke_one_host_is_a_plain_job(shell):
    job = yaml.safe_load(gke(shell, "--topology", "v5e:2x2").stdout)
    pod = job["spec"]["template"]["spec"]
    assert (job["kind"], job["spec"]["backoffLimit"]) == ("Job", 10)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "2x2",
    }
    [container] = pod["containers"]
    assert container["command"] == ["qwen-jax", *RUN, *STOPPED]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["restartPolicy"] == "Never"  # as podFailurePolicy wants it
    assert job["spec"]["podFailurePolicy"] == disruptions("Ignore", container)


def disruptions(action, container):
    """The rules for a run that was told to stop and for a pod that was taken away."""
    code = int(STOPPED[1])
    name = container["name"]
    exits = {"containerName": name, "operator": "In", "values": [code]}
    # status: a JobSet without it is refused by the cluster
    taken = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "rules": [
            {"action": action, "onExitCodes": exits},
            {"action": action, "onPodConditions": taken},
        ]
    }


@pytest.mark.parametrize(
    ("topology", "more", "hosts", "chips"),
    [
        ("v6e:16x16", [], 64, 4),
        ("v5p:2x2x4", [], 4, 4),
        ("v6e:2x4", ["--chips_per_host", "4"], 2, 4),
        ("v6e:2x4", ["--slices", "2"], 1, 8),
    ],
)
def test_gke_several_hosts_are_a_jobset(shell, topology, more, hosts, chips):
    jobset = yaml.safe_load(gke(shell, "--topology", topology, *more).stdout)
    assert jobset["kind"] == "JobSet"
    [slices] = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == (2 if "--slices" in more else 1)
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    [container] = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["command"] == ["qwen-jax", *RUN, *STOPPED, "--distributed"]
    # A new pod alone could not join the others: the Job fails, all start again, and
    # the JobSet does not count it.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podFailurePolicy"] == disruptions("FailJob", container)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 10
    [rule] = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_gke_asks_for_an_exit_code_only_where_the_command_has_one(shell):
    script = [sys.executable, ROOT / "launch/tpu_gke.py", "--image", "i", "--dry_run"]
    done = shell(*script, "--topology", "v6e:2x2", "--", "doctor")
    job = yaml.safe_load(done.stdout)
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["qwen-jax", "doctor"]
    words = verbs.parser().parse_args([*RUN, *STOPPED])  # where it has one, it is known
    assert words.exit_code_when_stopped == int(STOPPED[1]) != 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--topology", "v9:2x2"], "v9:2x2"),
        (["--topology", "v6e:4x4x4"], "v6e:4x4"),
        (["--topology", "v6e:4x"], "v6e:4x"),
        (["--topology", "v6e:2x2", "--chips_per_host", "8"], "--chips_per_host 8"),
        (["--topology", "v6e:2x2", "--name", "Big_Job"], "Big_Job"),
        (["--topology", "v6e:2x2", "--claim", "c", "--"], "below /runs"),
    ],
)
def test_gke_refuses_with_the_value_named(shell, flags, named):
    script = [sys.executable, ROOT / "launch/tpu_gke.py", "--image", "i", "--dry_run"]
    run = ["run", "--workdir", "/home/x" if "--claim" in flags else "/runs/x"]
    flags = [flag for flag in flags if flag != "--"]
    assert named in shell(*script, *flags, "--", *run, code=2).stderr


def test_gke_submits_the_file_it_shows(shell):
    shell.stand_in("kubectl", 'cat > "$SEEN"; echo "$*"')
    seen, script = shell.folder / "seen", ROOT / "launch/tpu_gke.py"
    flags = ["--image", "reg/q", "--topology", "v6e:4x4", "--", *RUN]
    done = shell(sys.executable, script, *flags, SEEN=str(seen))
    assert "apply --filename -" in done.stdout and "delete jobset" in done.stdout
    shown = gke(shell, "--topology", "v6e:4x4").stdout
    assert shown.startswith(seen.read_text())
