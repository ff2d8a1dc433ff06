# SPDX-License-Identifier: Apache-2.0
"""Every tool ends without a traceback at Ctrl-C, and in a pipe that is not read any more.

python -m pytest tests/test_tools.py
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_ranks import free_port
from tones import REPO, TINY, heed_signals, tiny_corpus, write_tones

from tools import bench, tune

KNOBS = {"RANKS": "", "LAUNCHER": "auto", "BACKEND": "auto", "CORPUS": "demo", "DRY_RUN": "0"}


def open_for_writing(fifo, process):
    """Open a named pipe as soon as the process reads it."""
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


# Every tool is interrupted while it waits for a file, {folder}/log.jsonl.
@pytest.mark.parametrize(("tool", "argv", "message"), [
    ("prepare", ["import", "{folder}/log.jsonl", "{folder}/root", "train"], ""),
    ("bench", ["curves", "{folder}", "--png", "{folder}/curves.png"], ""),
    ("tune", ["--config", "{folder}/log.jsonl", "--out", "{folder}/out"],
     "tune.py: interrupted; the same command goes on\n"),
    ("launch", ["check"], ""),
])
def test_ctrl_c_ends_a_tool_with_status_130(tmp_path, tool, argv, message):
    fifo = tmp_path / "log.jsonl"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", f"tools.{tool}", *(x.format(folder=tmp_path) for x in argv)]
    process = subprocess.Popen(
        command, cwd=REPO, env={**os.environ, **KNOBS, "HOSTS": str(fifo)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_signals,
    )
    writer = open_for_writing(fifo, process)
    process.send_signal(signal.SIGINT)
    os.close(writer)  # ends a read that begins just after the signal
    output = process.communicate(timeout=60)
    assert (process.returncode, *output) == (130, "", message)


def run_in_closed_pipe(command, **env):
    """Run a command whose output nobody reads; returns its status and its standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=REPO, env={**os.environ, **env}, stdout=writer,
                          stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    return done.returncode, done.stderr


def test_a_closed_pipe_ends_the_check_with_status_141(tmp_path):
    write_tones(tmp_path, "train", ["ONE"], [0.5])
    command = [sys.executable, "-m", "tools.prepare", "check", str(tmp_path)]
    assert run_in_closed_pipe(command) == (141, "")


def test_a_closed_pipe_ends_a_dry_run_with_status_141():
    assert run_in_closed_pipe(["bash", "run.sh"], DRY_RUN="1") == (141, "")


def test_a_closed_pipe_ends_training_with_status_141(tmp_path):
    root = tiny_corpus(tmp_path / "corpus")
    command = [sys.executable, "train.py", "--data", root, "--out", tmp_path / "out", *TINY]
    assert run_in_closed_pipe(list(map(str, command))) == (141, "")


@pytest.mark.slow
def test_a_closed_pipe_ends_both_ranks_without_a_word(tmp_path):
    root = tiny_corpus(tmp_path / "corpus")
    command = [sys.executable, "-m", "tools.torchrun", "--nnodes", "1", "--nproc-per-node", "2",
               "--master-addr", "127.0.0.1", "--master-port", free_port(), "train.py",
               "--data", root, "--out", tmp_path / "out", *TINY]
    status = tmp_path / "status"  # rank 0's; torchrun's own is 1 after any failure
    ended = run_in_closed_pipe(list(map(str, command)), RNNT_STATUS_FILE=str(status))
    assert (*ended, status.read_text()) == (1, "", "141\n")


def broken_pipe(*_args):
    raise BrokenPipeError


@pytest.mark.parametrize(("tool", "argv"), [
    (bench, ["curves", "run", "--png", "x.png"]), (tune, ["--config", "x.yaml"])])
def test_a_closed_pipe_is_no_error_of_a_tool(monkeypatch, tool, argv):
    monkeypatch.setattr(sys, "argv", [tool.__name__, *argv])
    monkeypatch.setitem(bench.WITHOUT, "curves", broken_pipe)
    monkeypatch.setattr(tune, "read_search", broken_pipe)
    with pytest.raises(BrokenPipeError):
        tool.main()


@pytest.mark.parametrize(("code", "status"), [
    ("raise KeyboardInterrupt", 130), ("print('a line')\nprint('a second line')", 141)])
def test_a_tool_ends_quietly_while_it_imports_its_libraries(code, status):
    assert run_in_closed_pipe([sys.executable, "-c", f"import tools\n{code}"]) == (status, "")


@pytest.mark.parametrize("script", ["train.py", "decode.py"])
def test_a_script_ends_quietly_while_it_imports_its_libraries(tmp_path, script):
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\nimport time\n"
                                       "time.sleep(60)\n")
    done = subprocess.run([sys.executable, script], cwd=REPO, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, preexec_fn=heed_signals)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_error_keeps_its_traceback():
    status, error = run_in_closed_pipe([sys.executable, "-c", "import tools\nraise KeyError(7)"])
    assert status == 1
    assert error.endswith("KeyError: 7\n")


@pytest.mark.parametrize(("code", "status", "said"), [
    ("import sys; print('my own words', file=sys.stderr); sys.exit(3)", 1, "my own words\n"),
    ("import os; os.kill(os.getpid(), 9)", 1, "torchrun: rank 0 was killed by SIGKILL\n"),
    ("import os; os.kill(os.getppid(), 15); import time; time.sleep(60)", 128 + 15, ""),
    ("", 0, ""),
])
def test_torchrun_adds_nothing_to_what_a_rank_says(tmp_path, code, status, said):
    (tmp_path / "rank.py").write_text(code)
    command = [sys.executable, "-m", "tools.torchrun", "--nnodes", "1", "--nproc-per-node", "1",
               "--master-addr", "127.0.0.1", "--master-port", "0", str(tmp_path / "rank.py")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (status, said)
