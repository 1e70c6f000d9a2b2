"""The launch scripts, with stand-ins for gcloud, srun, nvidia-smi and the trainer that note how they were called.

Nothing of the scripts themselves is replaced: they run in a copy of launch/, and what gcloud is to run on the workers,
its stand-in runs in two directories.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FILES = sorted(path.name for path in (ROOT / "launch").iterdir())
SCRIPTS = [name for name in FILES if name != "options.sh"]  # which is sourced by them
OVERRIDES = ("family.t_range=(0.3,0.8)", "data.source=it's $HOME \"a\" *")
QUOTED = r"family.t_range=\(0.3\,0.8\) data.source=it\'s\ \$HOME\ \"a\"\ \*"
POD = ("eso", "v6e-256", "experiments/toy.py", "gs://bucket/runs/toy", *OVERRIDES)

NOTE = '#!/usr/bin/env bash\necho "${0##*/}$(printf " %q" "$@")" >>"$STAND_INS/calls"\n'
# The n-th run in a directory does what the n-th word of CODES says; a worker's directory is new after a preemption.
TRAINER = NOTE + r"""
count=$STAND_INS/runs${PWD//\//_}
echo . >>"$count"
run=$(wc -l <"$count")
echo "run $run"
read -ra codes <<<"$CODES"
case ${codes[run - 1]} in
  wait)
    trap 'sleep 0.2; exit 75' TERM
    trap 'exit 130' INT
    touch "$STAND_INS/waiting"
    for _ in {1..2000}; do sleep 0.02; done ;;
  preempted) echo SUSPENDED >"$STAND_INS/state"; exit 255 ;;
  *) exit "${codes[run - 1]}" ;;
esac
"""
GCLOUD = NOTE + r"""
cd "$STAND_INS"
case "$3 $4" in
  "queued-resources describe")
    [ "${!#}" = "--format=value(state.state)" ] || { echo "no such quota"; exit; }
    [ -s state ] || exit 1
    head -n 1 state
    [ "$(wc -l <state)" = 1 ] || sed -i 1d state ;;
  "queued-resources create") printf '%s\n' ${STATES:-WAITING_FOR_RESOURCES PROVISIONING ACTIVE} >state ;;
  "queued-resources delete") rm -r state workers/*; mkdir workers/0 workers/1 ;;
  "tpu-vm scp") for worker in 0 1; do cp "$OLDPWD/$5" "workers/$worker/${6#*:}"; done ;;
  "tpu-vm ssh")
    for worker in 0 1; do (cd "workers/$worker" && exec env HOSTNAME=w$worker bash -c "${!##--command=}") & done
    code=0
    for job in $(jobs -p); do wait "$job" || code=$?; done
    exit $code ;;
esac
"""
STAND_INS = {
    "gcloud": GCLOUD,
    "nvidia-smi": NOTE + 'exit "${NO_GPU:-0}"\n',
    "srun": NOTE + 'while [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    "venv/bin/python": NOTE + 'exit "${PIP:-0}"\n',
    "venv/bin/eso-jax": TRAINER,
    "python3": NOTE + 'if [ "$2" = uv ]; then mkdir -p .venv/bin; cp "$STAND_INS/venv/bin"/* .venv/bin; fi\n',
} | {name: NOTE for name in ("scontrol", "ssh-add", "sudo", "gcsfuse")} | {"mountpoint": "#!/bin/sh\nexit 1\n"}


class Project:
    """A copy of launch/ in a git repository, and the stand-ins on PATH."""

    def __init__(self, directory: Path) -> None:
        self.root, self.stand_ins = directory / "project", directory / "stand_ins"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        (self.root / "experiments").mkdir()
        (self.root / "experiments" / "toy.py").write_text("config = 1\n")
        (self.root / "eso_jax").mkdir()
        (self.root / "eso_jax" / "quickstart.py").write_text("config = 3\n")
        subprocess.run(["git", "init", "--quiet"], cwd=self.root, check=True)
        subprocess.run(["git", "add", "."], cwd=self.root, check=True)
        (self.root / "experiments" / "untracked.py").write_text("config = 2\n")
        for worker in "01":
            (self.stand_ins / "workers" / worker).mkdir(parents=True)
        for name, text in STAND_INS.items():
            path = self.stand_ins / ("bin" if "/" not in name else "") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def start(self, script: str | Path, *arguments: str, codes: str = "0", **environment: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        env = kept | {
            "PATH": f"{self.stand_ins / 'bin'}:{kept['PATH']}", "STAND_INS": str(self.stand_ins), "PAUSE": "0",
            "VENV": str(self.stand_ins / "venv"), "CODES": codes} | environment
        command = ["env", "--default-signal=INT", "bash", str(self.root / "launch" / script), *arguments]
        return subprocess.Popen(command, env=env, cwd=self.root, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def run(self, script: str | Path, *arguments: str, code: int = 0, codes: str = "0", **environment: str) -> str:
        """Returns stdout, or stderr where the code is not 0."""
        process = self.start(script, *arguments, codes=codes, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, (process.returncode, out, err)
        return err if code else out

    def interrupt(self, number: signal.Signals, script: str, *arguments: str, code: int, **environment: str) -> str:
        """Sends a signal once the trainer waits; returns stderr."""
        process = self.start(script, *arguments, codes="wait", **environment)
        end = time.monotonic() + 60
        while not (self.stand_ins / "waiting").exists():
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == code, err
        return err

    def calls(self, *names: str) -> list[str]:
        """The calls so far, of some commands or of all."""
        path = self.stand_ins / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not names or line.split()[0] in names]

    def steps(self) -> list[str]:
        """What gcloud was told to do so far, a word each, without the looking on."""
        found = []
        for call in self.calls("gcloud"):
            command, _, remote = call.partition(" --command=")
            words = remote.split("\\ ")
            found.append(words[2] if words[0] == "bash" else words[0] or command.split()[4])
        return [step for step in found if step != "describe"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck; install the extra test")
    files = [*(f"launch/{name}" for name in FILES), "tests/run.sh", ".ci/run", "experiments/accelerator.sh"]
    done = subprocess.run([shellcheck, "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_header(script: str, project: Project) -> None:
    text = project.run(script, "--help")
    header = (ROOT / "launch" / script).read_text().split("\n", 1)[1]
    assert text and header.startswith("".join(f"# {line}\n" for line in text.splitlines()))
    assert f"launch/{script}" in text and "set -e" not in text and "shellcheck" not in text


@pytest.mark.parametrize(("script", "arguments", "said"), [
    ("tpu_pod.sh", ("eso", "v6e-8", "experiments/toy.py", "runs/toy"), "would be deleted with the machine"),
    *((script, ["--nonsense"], "--nonsense") for script in SCRIPTS),
    *((script, [], "--help") for script in SCRIPTS if script not in ("local.sh", "install.sh")),
    *((script, ["experiments/toy.py", "runs/toy", "train.steps=1", "--dry-run"], "'--dry-run': not section.field=value")
      for script in ("gpu.sh", "slurm.sbatch")),
    ("local.sh", ["train.steps=1", "--dry-run"], "'--dry-run': not section.field=value"),
    ("tpu_pod.sh", [*POD, "--dry-run"], "'--dry-run': not section.field=value"),
    ("gpu.sh", ["--dry-run", "config", "runs/toy"], "EXPERIMENT = 'config': no such file"),  # though it is a module
    *((script, ["--dry-run", "experiments/no.py", "runs/toy"], "EXPERIMENT = 'experiments/no.py': no such file")
      for script in ("gpu.sh", "slurm.sbatch")),
    *((script, ["--dry-run", "experiments/owt/esolm_025.py", "runs/toy"],
       "no such file; the paper's runs are in one file now: experiments/paper.py:owt/esolm_025")
      for script in ("gpu.sh", "slurm.sbatch")),
    *((script, ["--dry-run", *POD[:keep], experiment, "gs://bucket/w"], f"EXPERIMENT = '{experiment}': no such file")
      for script, keep in (("gpu.sh", 0), ("slurm.sbatch", 0), ("tpu_pod.sh", 2))
      for experiment in ("experiments/no.py:owt/toy", "quickstrat", "experiments/toy.py.:a")),
    ("slurm.sbatch", ["--partition=gpu"], "sbatch's own options come before the script"),
    ("tpu_pod.sh", ["--zone", "us-east5-b", *POD], "no option --zone"),
    ("gpu.sh", ["experiments/toy.py"], "1 arguments"),
    ("slurm.sbatch", ["--dry-run", "experiments/toy.py"], "1 arguments"),
    ("tpu_pod.sh", POD[:3], "3 arguments"),
    ("tpu_pod.sh", ["eso", "h100-8", *POD[2:]], "h100-8"),
    *(("tpu_pod.sh", [*POD[:2], experiment, "gs://bucket/w"], "git add")
      for experiment in ("experiments/untracked.py", "experiments/untracked.py:owt/toy")),
])
def test_a_mistake_is_one_line_and_starts_nothing(script: str, arguments: list[str], said: str,
                                                  project: Project) -> None:
    text = project.run(script, *arguments, code=2)
    assert text.startswith(f"{script}: error: ") and said in text and text.count("\n") == 1
    assert not project.calls()


def test_dry_run_local(project: Project) -> None:
    text = project.run("local.sh", "--dry-run", *OVERRIDES, VENV=".venv")
    assert text.splitlines() == [
        "bash launch/install.sh cuda",  # nvidia-smi is there, and finds a GPU
        f"exec .venv/bin/python experiments/quickstart.py --workdir runs/quickstart {QUOTED}",
    ]
    assert not project.calls("python")


def test_slurm_without_slurm(project: Project) -> None:
    (project.stand_ins / "bin" / "srun").unlink()
    text = project.run("slurm.sbatch", "experiments/toy.py", "runs/toy", code=2)
    assert "no srun on PATH" in text and not project.calls()


def test_dry_run_gpu(project: Project) -> None:
    text = project.run("gpu.sh", "--dry-run", "experiments/toy.py", "runs/toy", *OVERRIDES, VENV=".venv")
    assert text.splitlines() == [
        "nvidia-smi --list-gpus",
        "bash launch/install.sh cuda",
        f"exec bash launch/restart.sh .venv/bin/eso-jax train experiments/toy.py --workdir runs/toy {QUOTED}",
    ]
    assert not project.calls()


@pytest.mark.parametrize("experiment", ["experiments/toy.py:owt/toy", "quickstart", "experiments/a:b.py"])
def test_every_name_of_a_run(experiment: str, project: Project) -> None:
    """A run of a file, one that the package ships, a file with a colon: each comes to the trainer as it is."""
    (project.root / "experiments" / "a:b.py").write_text("config = 4\n")
    subprocess.run(["git", "add", "."], cwd=project.root, check=True)
    project.run("gpu.sh", experiment, "runs/toy")
    project.run("slurm.sbatch", experiment, "runs/toy", codes="0 0")
    project.run("tpu_pod.sh", "eso", "v6e-8", experiment, "gs://bucket/toy")
    trained = [call.split()[2] for call in project.calls("eso-jax")]
    assert trained == [experiment] * 4  # a pod has two workers


def test_dry_run_slurm(project: Project) -> None:
    text = project.run("slurm.sbatch", "--dry-run", "experiments/toy.py", "/shared/toy", *OVERRIDES, VENV=".venv")
    assert text.splitlines() == [
        "bash launch/install.sh cuda",
        r"env FINAL=0\ 2\ 75\ 130 bash launch/restart.sh srun --kill-on-bad-exit=1 --label --cpus-per-task=8 "
        f".venv/bin/eso-jax train experiments/toy.py --workdir /shared/toy --multi-host {QUOTED}",
        "scontrol requeue JOB",
    ]
    assert not project.calls()


def test_dry_run_tpu_pod_is_what_then_runs(project: Project) -> None:
    options = ("--spot", "--zone=us-east5-b", "--project=ours")
    where = "--quiet --zone=us-east5-b --project=ours"
    remote = f"gcloud compute tpus tpu-vm ssh eso {where} --worker=all --ssh-flag=-oServerAliveInterval=60 --command="
    lines = project.run("tpu_pod.sh", "--dry-run", *options, *POD).splitlines()
    assert lines[:6] + lines[7:] == [
        "git ls-files -z | tar --create --gzip --file=logs/eso/code.tar.gz --null --files-from=-",
        f"gcloud compute tpus queued-resources create eso {where} --node-id=eso --accelerator-type=v6e-256 "
        "--runtime-version=v2-alpha-tpuv6e --spot",
        rf"gcloud compute tpus queued-resources describe eso {where} --format=value\(state.state\)",
        f"gcloud compute tpus tpu-vm scp logs/eso/code.tar.gz eso:eso-jax.tar.gz {where} --worker=all",
        remote + r"tar\ --extract\ --gzip\ --file=eso-jax.tar.gz\ --one-top-level=eso-jax",
        remote + r"bash\ eso-jax/launch/tpu_worker.sh\ install\ bucket",
        f"gcloud compute tpus queued-resources delete eso {where} --force",
    ]
    assert lines[6].startswith(remote + r"bash\ eso-jax/launch/tpu_worker.sh\ run\ train\ experiments/toy.py\ ")
    assert not project.calls() and not (project.root / "logs").exists()

    project.run("tpu_pod.sh", *options, *POD)
    calls = project.calls("gcloud")
    assert [line for line in calls if " describe " not in line] == [
        line for line in lines[1:] if " describe " not in line]
    assert calls.count(lines[2]) == 4  # nothing there, two states of waiting, and ready
    # Quoted twice, for ssh and for printing, the arguments are what they were.
    trained = f"eso-jax train experiments/toy.py --workdir /gcs/bucket/runs/toy --multi-host {QUOTED}"
    assert project.calls("eso-jax") == [trained] * 2


@pytest.mark.parametrize(("accelerator", "runtime"), [
    ("v5litepod-8", "v2-alpha-tpuv5-lite"), ("v5p-1024", "v2-alpha-tpuv5"), ("v4-32", "tpu-ubuntu2204-base")])
def test_tpu_types_and_a_shared_path(accelerator: str, runtime: str, project: Project) -> None:
    lines = project.run("tpu_pod.sh", "--dry-run", "--keep", "eso", accelerator, *POD[2:3], "/nfs/toy").splitlines()
    assert f"--accelerator-type={accelerator} --runtime-version={runtime}" in lines[1] and "--spot" not in lines[1]
    assert lines[5].endswith(r"tpu_worker.sh\ install") and "--workdir\\ /nfs/toy" in lines[6] and len(lines) == 7
    line = project.run("tpu_pod.sh", "--dry-run", *POD, RUNTIME="newer").splitlines()[1]
    assert "--runtime-version=newer" in line


@pytest.mark.parametrize(("codes", "code", "runs"), [
    ("0", 0, 1), ("2", 2, 1), ("130", 130, 1),
    ("75 75 75 75 0", 0, 5),  # not counted
    ("134 1 0", 0, 3), ("134 75 1 139 0", 139, 4),
])
def test_restart_by_exit_code(codes: str, code: int, runs: int, project: Project) -> None:
    trainer = str(project.stand_ins / "venv/bin/eso-jax")
    text = project.run("restart.sh", trainer, "train", *OVERRIDES, codes=codes, code=code, CRASHES="2")
    assert project.calls() == [f"eso-jax train {QUOTED}"] * runs
    assert ("giving up" in text) == (code == 139)


def test_restart_survives_the_loss_of_its_log(project: Project) -> None:
    """A pipe whose reader is gone, and a full disk."""
    trainer = str(project.stand_ins / "venv/bin/eso-jax")
    (project.root / "lost.sh").write_text('bash launch/restart.sh "$@" 2>&1 | true; exit "${PIPESTATUS[0]}"\n')
    (project.root / "full.sh").write_text('exec bash launch/restart.sh "$@" >/dev/full 2>&1\n')
    for number, script in enumerate(("lost.sh", "full.sh"), 1):
        project.run(f"../{script}", trainer, "train", codes=" ".join(["75 134 0"] * number))
        assert len(project.calls()) == 3 * number


def test_install_takes_the_newest_python_that_is_tested(project: Project) -> None:
    make = NOTE + '[ "$1" = -c ] || { mkdir -p "$3/bin"; cp "$STAND_INS/venv/bin/python" "$3/bin"; }\n'
    for name in ("python3.14", "python3.13", "python3.12", "python3"):
        path = project.stand_ins / "bin" / name
        path.write_text(make)
        path.chmod(0o755)
    for number, chosen in enumerate(("python3.13", "python3.12")):
        venv = str(project.root / f"venv{number}")
        project.run("install.sh", VENV=venv)
        assert f"{chosen} -m venv {venv}" in project.calls()
        (project.stand_ins / "bin" / chosen).write_text("exit 1\n")  # as pyenv has one that is not installed
    project.run("install.sh", VENV=str(project.root / "mine"), PYTHON="python3.14")
    assert any(call.startswith("python3.14 -m venv") for call in project.calls())


def test_gpu(project: Project) -> None:
    project.run("gpu.sh", "experiments/toy.py", "runs/toy", *OVERRIDES, codes="75 1 0")
    trained = f"eso-jax train experiments/toy.py --workdir runs/toy {QUOTED}"
    assert project.calls() == [
        "nvidia-smi --list-gpus",
        r"python -m pip install --quiet --disable-pip-version-check --editable .\[cuda\]", *[trained] * 3]


def test_no_gpu(project: Project) -> None:
    text = project.run("gpu.sh", "experiments/toy.py", "runs/toy", code=2, NO_GPU="9")
    assert "nvidia-smi finds no GPU" in text and project.calls() == ["nvidia-smi --list-gpus"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_trainer_and_ends_it(number: signal.Signals, code: int, project: Project) -> None:
    project.interrupt(number, "gpu.sh", "experiments/toy.py", "runs/toy", code=code)
    assert len(project.calls("eso-jax")) == 1


def test_a_signal_between_two_runs_ends_it(project: Project) -> None:
    process = project.start("gpu.sh", "experiments/toy.py", "runs/toy", codes="75 0", PAUSE="60")
    assert process.stderr is not None and "exit code 75; starting again in 60 s" in process.stderr.readline()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 75 and len(project.calls("eso-jax")) == 1


@pytest.mark.parametrize(("codes", "code", "runs"), [("0", 0, 1), ("2", 2, 1), ("134 0", 0, 2), ("75", 75, 1)])
def test_slurm(codes: str, code: int, runs: int, project: Project) -> None:
    spooled = project.stand_ins / "slurm_script"  # Slurm runs a copy
    shutil.copy(project.root / "launch" / "slurm.sbatch", spooled)
    project.run(spooled, "experiments/toy.py", "/shared/toy", *OVERRIDES, codes=codes, code=code, SLURM_JOB_ID="17",
                SLURM_SUBMIT_DIR=str(project.root), SLURM_CPUS_PER_TASK="12")
    trained = f"train experiments/toy.py --workdir /shared/toy --multi-host {QUOTED}"
    eso_jax = project.stand_ins / "venv/bin/eso-jax"
    assert project.calls() == [
        f"srun --kill-on-bad-exit=1 --label --cpus-per-task=12 {eso_jax} {trained}", f"eso-jax {trained}"
    ] * runs + ["scontrol requeue 17"] * (code == 75)


def test_slurm_submitted_elsewhere(project: Project, tmp_path: Path) -> None:
    text = project.run("slurm.sbatch", "experiments/toy.py", "w", code=2, SLURM_JOB_ID="17",
                       SLURM_SUBMIT_DIR=str(tmp_path))
    assert "submit it in the repository's root" in text and not project.calls()


def test_slurm_options() -> None:
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    directives = {line.split()[1] for line in lines if line.startswith("#SBATCH ")}
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append", "--ntasks-per-node=8",
            "--gpus-per-node=8"} <= directives
    # sbatch reads up to the first command
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index("set -euo pipefail")


SETUP = ["create", "scp", "tar", "install"]


@pytest.mark.parametrize(("codes", "code", "steps"), [
    ("0", 0, [*SETUP, "run", "delete"]),
    ("2", 2, [*SETUP, "run", "delete"]),
    ("preempted preempted preempted 0", 0, [*SETUP, "run", "delete"] * 4),  # not counted as crashes
    ("75 0", 0, [*SETUP, "run", *SETUP[1:], "run", "delete"]),  # still there: not asked for again
    ("134 1 139", 139, [*SETUP, "run", *SETUP[1:], "run", *SETUP[1:], "run", "delete"]),
])
def test_tpu_pod(codes: str, code: int, steps: list[str], project: Project) -> None:
    project.run("tpu_pod.sh", *POD, codes=codes, code=code, CRASHES="2")
    assert project.steps() == steps
    assert len(project.calls("eso-jax")) == 2 * steps.count("run")
    log = (project.root / "logs/eso/train.log").read_text()  # of every run and every worker
    assert all(log.count(f": run {run}\n") == 2 for run in range(1, steps.count("run") + 1))
    with_tar = subprocess.run(["tar", "-tf", project.root / "logs/eso/code.tar.gz"], capture_output=True, text=True)
    assert "launch/tpu_pod.sh\n" in with_tar.stdout and "untracked" not in with_tar.stdout


def test_tpu_pod_installs_and_mounts(project: Project) -> None:
    project.run("tpu_pod.sh", *POD)
    mount = ("gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 "
             "--metadata-cache-negative-ttl-secs=0 bucket /gcs/bucket")
    for call in ("python3 -m pip install --quiet --user uv",
                 "python3 -m uv venv --quiet --seed --python 3.12 .venv",
                 r"python -m pip install --quiet --disable-pip-version-check --editable .\[tpu\]",
                 "sudo mkdir -p /gcs/bucket", mount):
        assert project.calls().count(call) == 2, call  # on each worker


def test_tpu_pod_does_not_run_what_it_could_not_install(project: Project) -> None:
    project.run("tpu_pod.sh", *POD, code=1, PIP="1", CRASHES="1")
    assert project.steps() == [*SETUP, *SETUP[1:], "delete"]


def test_tpu_pod_kept(project: Project) -> None:
    process = project.start("tpu_pod.sh", "--keep", *POD)
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and project.steps() == [*SETUP, "run"]
    assert "gcloud compute tpus queued-resources delete eso --quiet --force" in text


def test_tpu_pod_preempted_while_it_waits(project: Project) -> None:
    (project.stand_ins / "state").write_text("SUSPENDING\nSUSPENDED\n")
    project.run("tpu_pod.sh", *POD)
    assert project.steps() == ["delete", *SETUP, "run", "delete"]


def test_tpu_pod_failed(project: Project) -> None:
    text = project.run("tpu_pod.sh", *POD, code=2, STATES="WAITING_FOR_RESOURCES FAILED")
    assert "tpu_pod.sh: error: eso FAILED: no such quota" in text and project.steps() == ["create", "delete"]


def test_tpu_pod_interrupted(project: Project) -> None:
    text = project.interrupt(signal.SIGTERM, "tpu_pod.sh", *POD, code=75)
    assert project.steps() == [*SETUP, "run", "stop"] and "eso is still there" in text


def test_a_worker_stops_what_a_lost_connection_left(project: Project) -> None:
    (project.root / ".venv").symlink_to(project.stand_ins / "venv")
    first = project.start("tpu_worker.sh", "run", "train", codes="wait 0")
    while not (project.stand_ins / "waiting").exists():
        assert first.poll() is None
        time.sleep(0.01)
    assert project.run("tpu_worker.sh", "run", "train", codes="wait 0").endswith(": run 2\n")
    assert first.poll() == 75  # before the second began
    first.communicate()
    project.run("tpu_worker.sh", "stop")  # nothing to stop
