# SPDX-License-Identifier: Apache-2.0
"""The real run.sh and train.py on a corpus of tones, for tests of their processes."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tones import REPO, heed_signals, write_tones

WORDS = ("--preset", "demo", "--vocab-size", "24", "--batch-size", "2", "--loader-workers", "0",
         "--epochs", "100000", "--checkpoint-every-s", "0")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


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
            *(REPO / n for n in ("run.sh", "hosts", "requirements.txt")),
        ]:
            shutil.copy(path, folder)
        (folder / "tools").mkdir()
        (folder / "tools/prepare.py").write_text("")  # the corpus is there
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

    def start(self, *words, command=("bash", "run.sh"), **env):
        env = {**os.environ, "PATH": PATH, "RANKS": "2", "OMP_NUM_THREADS": "1", **env}
        with (self.folder / "said").open("w") as said:
            self.child = subprocess.Popen(
                [*command, *WORDS, *words], cwd=self.folder, env=env, stdout=said,
                stderr=subprocess.STDOUT, preexec_fn=heed_signals,
            )
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
