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

import pytest
from launched import PATH, Run, processes

from checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

NEEDS_MPIRUN = pytest.mark.skipif(
    shutil.which("mpirun", path=PATH) is None,
    reason="there is no mpirun; pip install impi-rt brings one",
)
LAUNCHERS = ["torchrun", pytest.param("mpirun", marks=NEEDS_MPIRUN)]


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
    checkpoints = list((run.folder / "out/demo").glob("checkpoint-*.pt"))
    assert checkpoints
    for checkpoint in checkpoints:
        load_checkpoint(checkpoint)
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


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [("torchrun", 1), *(pytest.param("mpirun", rank, marks=NEEDS_MPIRUN) for rank in (0, 1))],
)
def test_stopped_rank_is_named_and_ended(run, launcher, rank):
    """Under mpirun rank 0 keeps the counts by which others are seen to be alive."""
    run.start("--timeout-s", "10", LAUNCHER=launcher).wait_for_steps(3)
    os.kill(run.rank(rank), signal.SIGSTOP)
    assert run.expect_end(90) not in (0, 2)
    assert f"train.py: rank {1 - rank}: lost rank {rank}" in run.said()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("launcher", ["python", *LAUNCHERS])
def test_signal_leaves_no_process(run, launcher, number, status):
    chosen = {"RANKS": "1"} if launcher == "python" else {"LAUNCHER": launcher}
    run.start("--loader-workers", "1", **chosen).wait_for_steps(2)
    assert len(processes(run.folder)) >= 3
    run.child.send_signal(number)
    assert run.expect_end(60) == status
