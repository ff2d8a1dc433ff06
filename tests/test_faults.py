# SPDX-License-Identifier: Apache-2.0
"""What run.sh does when a rank dies, raises or stops, or when it is told to end.

    python -m pytest tests/test_faults.py

Real ranks of the real train.py under the real run.sh, on a corpus of tones, with torchrun and with
an mpirun if there is one. Only the corpus is not prepared. Each test takes about a minute.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tones import write_tones

import decode

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parent.parent
WORDS = ("--preset", "demo", "--vocab-size", "24", "--batch-size", "2", "--loader-workers", "0",
         "--epochs", "100000", "--checkpoint-every-s", "0")  # fmt: skip
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
LAUNCHERS = [
    "torchrun",
    pytest.param("mpirun", marks=pytest.mark.skipif(
        shutil.which("mpirun", path=PATH) is None,
        reason="there is no mpirun; pip install impi-rt brings one")),
]  # fmt: skip


def processes(folder):
    """Process id -> environment of every process that runs in a folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd") == str(folder):
                entries = (path / "environ").read_bytes().split(b"\0")
                state = (path / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z":  # ended, but not yet waited for by its new parent
                    found[int(path.name)] = dict(e.split(b"=", 1) for e in entries if b"=" in e)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def wait_until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


class Run:
    """run.sh in a folder with a corpus of tones, as a child."""

    def __init__(self, folder):
        self.folder = folder
        for path in [
            *REPO.glob("*.py"),
            REPO / "run.sh",
            REPO / "hosts",
            REPO / "requirements.txt",
        ]:
            shutil.copy(path, folder)
        (folder / "prepare.py").write_text("")  # the corpus is there
        # Inherits what the tests run in; nothing is installed.
        (folder / ".venv/bin").mkdir(parents=True)
        python = folder / ".venv/bin/python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        shutil.copy(folder / "requirements.txt", folder / ".venv")
        texts = ["ONE TWO", "THREE FOUR FIVE", "SIX", "SEVEN EIGHT"] * 8
        write_tones(folder / "data/demo", "train-demo", texts, [0.8] * 32)
        write_tones(folder / "data/demo", "dev-demo", texts[:4], [0.8] * 4)
        self.log = folder / "out/demo/log.jsonl"

    def start(self, *words, **env):
        env = {**os.environ, "PATH": PATH, "RANKS": "2", "OMP_NUM_THREADS": "1", **env}
        with (self.folder / "said").open("w") as said:
            self.child = subprocess.Popen(
                ["bash", "run.sh", *WORDS, *words], cwd=self.folder, env=env, stdout=said,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self

    def said(self):
        return (self.folder / "said").read_text()

    def steps(self):
        return self.log.read_text().count('"event": "step"') if self.log.exists() else 0

    def wait_for_steps(self, count):
        def condition():
            assert self.child.poll() is None, self.said()
            return self.steps() >= count

        wait_until(condition, 300, f"step {count}")

    def rank(self, number):
        """Process id of a rank: the one whose parent does not have the same rank."""
        ranks = {
            pid: env.get(b"RANK", env.get(b"PMI_RANK", env.get(b"OMPI_COMM_WORLD_RANK")))
            for pid, env in processes(self.folder).items()
        }
        (pid,) = [pid for pid, rank in ranks.items() if rank == str(number).encode()]
        return pid

    def expect_end(self, seconds):
        """Waits for the end; no process may be left when run.sh is. Returns its status."""
        try:
            status = self.child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.said()}")
        assert processes(self.folder) == {}, self.said()
        return status


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    for pid in processes(tmp_path):
        os.kill(pid, signal.SIGKILL)


def names_rank(text, rank):
    """In our words, in torchrun's report, or in Hydra's or Open MPI's."""
    return re.search(
        rf"lost rank {rank}\b|^\s*rank\s+: {rank} |RANK {rank} PID|process rank {rank} ", text, re.M
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_rank_ends_the_run_which_can_be_resumed(run, launcher, rank):
    run.start(LAUNCHER=launcher).wait_for_steps(3)
    os.kill(run.rank(rank), signal.SIGKILL)
    assert run.expect_end(30) not in (0, 2)
    assert names_rank(run.said(), rank), run.said()
    for checkpoint in (run.folder / "out/demo").glob("checkpoint-*.pt"):
        decode.load_checkpoint(checkpoint)
    if (launcher, rank) == ("torchrun", 1):
        before = run.steps()
        run.start(LAUNCHER=launcher).wait_for_steps(before + 3)
        assert "resumed" in run.said()
        run.child.terminate()
        run.expect_end(60)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_raising_rank_ends_the_run(run, launcher):
    source = (run.folder / "train.py").read_text()
    marker = "    trainer.parallel.train()\n"
    assert source.count(marker) == 1
    fault = "    if step == 3 and ranks.rank == 1:\n        raise KeyError('deliberate')\n"
    (run.folder / "train.py").write_text(source.replace(marker, fault + marker))
    assert run.start(LAUNCHER=launcher).expect_end(300) not in (0, 2)
    assert "KeyError: 'deliberate'" in run.said()
    assert run.steps() == 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_stopped_rank_is_named_and_ended(run, launcher):
    run.start("--timeout-s", "10", LAUNCHER=launcher).wait_for_steps(3)
    os.kill(run.rank(1), signal.SIGSTOP)
    assert run.expect_end(90) not in (0, 2)
    assert "train.py: rank 0: lost rank 1: " in run.said()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("launcher", ["python", *LAUNCHERS])
def test_signal_leaves_no_process(run, launcher, number, status):
    chosen = {"RANKS": "1"} if launcher == "python" else {"LAUNCHER": launcher}
    run.start("--loader-workers", "1", **chosen).wait_for_steps(2)
    assert len(processes(run.folder)) >= 3
    run.child.send_signal(number)
    assert run.expect_end(60) == status
