# SPDX-License-Identifier: Apache-2.0
"""Copies of run.sh for tests of its processes: with a stand-in for Python, or with the real one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tones import REPO, heed_signals, write_tones

FLAGS = ("--preset", "demo", "--vocab-size", "24", "--batch-size", "2", "--loader-workers", "0",
         "--epochs", "100000", "--checkpoint-every-s", "0")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

# tools/launch.py is real; every other call is recorded in `calls`, one a line, with bars between
# the arguments. FAIL names the script or module whose call ends with status 3.
PYTHON = f"""#!/bin/sh
case "$*" in *"-m tools.launch "*) exec "{sys.executable}" "$@" ;; esac
for argument; do printf '%s|' "$argument"; done >> calls
printf 'threads=%s rank=%s\\n' "$OMP_NUM_THREADS" "$RANK" >> calls
case "$*" in *"${{FAIL:-never}}"*) exit 3 ;; esac
[ -z "$RNNT_STATUS_FILE" ] || echo 0 > "$RNNT_STATUS_FILE"
case "$*" in
  "decode.py "*)
    for argument; do tsv=$argument; done
    mkdir -p "$(dirname "$tsv")"
    for row in id:hypothesis:reference 7-9-0:HEARD:SAID 7-9-1::SO 7-9-2:A:B 7-9-3:C:D; do
      printf '%s\\n' "$row" | tr : '\\t'
    done > "$tsv" ;;
esac
"""
# `python3 -m venv .venv` brings the stand-in above.
PYTHON3 = f"""#!/bin/sh
case "$*" in "-c "* | *"-m tools.launch "*) exec "{sys.executable}" "$@" ;; esac
echo "python3|$*" >> calls
mkdir -p .venv/bin
cp stand-ins/python .venv/bin/python
"""


def copy_project(folder, python):
    """run.sh and what it reads, with a set-up .venv whose Python is the given script."""
    (folder / "tools").mkdir()
    for name in ("run.sh", "hosts", "requirements.txt", "tools/__init__.py", "tools/launch.py",
                 "tools/torchrun.py"):
        shutil.copy(REPO / name, folder / name)
    write_script(folder / ".venv/bin/python", python)
    shutil.copy(folder / "requirements.txt", folder / ".venv")


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class StandIn:
    """A folder with run.sh, tools/launch.py and a Python that records its calls."""

    def __init__(self, folder):
        self.folder = folder
        copy_project(folder, PYTHON)
        write_script(folder / "stand-ins/python", PYTHON)
        write_script(folder / "stand-ins/python3", PYTHON3)
        (folder / "tmp").mkdir()
        # The caller's OMP_NUM_THREADS or OUT must not decide a test, so no variable is inherited.
        path = f"{folder}/stand-ins:{os.environ['PATH']}"
        self.env = {"PATH": path, "CGROUPS": "none", "TMPDIR": str(folder / "tmp"),
                    "LAUNCHER": "torchrun"}

    def run(self, *argv, **env):
        """Runs run.sh with one rank, unless RANKS says otherwise; then with torchrun."""
        command = ["bash", str(self.folder / "run.sh"), *argv]
        return subprocess.run(command, env=self.merge(env), capture_output=True, text=True,
                              timeout=300)

    def start(self, **env):
        return subprocess.Popen(["bash", self.folder / "run.sh"], stdout=subprocess.DEVNULL,
                                env=self.merge(env), preexec_fn=heed_signals)

    def merge(self, env):
        alone = {"RANKS": "1", "LAUNCHER": "auto"} if env.get("RANKS", "1") == "1" else {}
        return {**self.env, **alone, **env}

    def calls(self, start=""):
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(start)]


def processes(folder):
    """Process id -> environment of every process that runs in a folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd") == str(folder):
                entries = (path / "environ").read_bytes().split(b"\0")
                state = (path / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z":  # a zombie has ended and waits for its new parent
                    found[int(path.name)] = dict(e.split(b"=", 1) for e in entries if b"=" in e)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def kill_processes(folder):
    for pid in processes(folder):
        os.kill(pid, signal.SIGKILL)


class Run:
    """run.sh as a child in a folder with the real train.py and a corpus of tones."""

    def __init__(self, folder):
        self.folder = folder
        # The real Python inherits what the tests run in, so nothing is installed.
        copy_project(folder, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for path in REPO.glob("*.py"):
            shutil.copy(path, folder)
        (folder / "tools/prepare.py").write_text("")  # the corpus is there
        texts = ["ONE TWO", "THREE FOUR FIVE", "SIX", "SEVEN EIGHT"] * 8
        write_tones(folder / "data/demo", "train-demo", texts, [0.8] * 32)
        write_tones(folder / "data/demo", "dev-demo", texts[:4], [0.8] * 4)
        self.out = folder / "out/demo"

    def start(self, *flags, command=("bash", "run.sh"), **env):
        env = {**os.environ, "PATH": PATH, "RANKS": "2", "OMP_NUM_THREADS": "1", **env}
        with (self.folder / "output").open("w") as output:
            self.child = subprocess.Popen(
                [*command, *FLAGS, *flags], cwd=self.folder, env=env, stdout=output,
                stderr=subprocess.STDOUT, preexec_fn=heed_signals,
            )
        return self

    def output(self):
        return (self.folder / "output").read_text()

    def num_steps(self):
        log = self.out / "log.jsonl"
        return log.read_text().count('"event": "step"') if log.exists() else 0

    def wait_for_steps(self, count):
        end = time.monotonic() + 300
        while self.num_steps() < count:
            assert self.child.poll() is None, self.output()
            assert time.monotonic() < end, f"step {count} not reached within 300 s"
            time.sleep(0.1)

    def rank(self, number):
        """Process id of a rank: the one process of that rank which is no loader worker."""
        ranks = {
            pid: env.get(b"RANK", env.get(b"PMI_RANK", env.get(b"OMPI_COMM_WORLD_RANK")))
            for pid, env in processes(self.folder).items()
        }
        (pid,) = [pid for pid, rank in ranks.items() if rank == str(number).encode()]
        return pid

    def expect_end(self, seconds):
        """Returns the status of run.sh, after which no process may be left."""
        try:
            status = self.child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.output()}")
        end = time.monotonic() + 2  # the last ones may be zombies for a moment
        while left := processes(self.folder):
            assert time.monotonic() < end, (left, self.output())
            time.sleep(0.1)
        return status
