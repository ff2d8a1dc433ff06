# SPDX-License-Identifier: Apache-2.0
"""ranks.py: who a process is, where it runs, how ranks connect, disagree, get lost and leave.

    python -m pytest tests/test_ranks.py

Launchers' variables, CPUs and back ends are simulated. Ranks that talk to each other are processes.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import types
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from tones import REPO, TINY, tiny_corpus

import ranks
from ranks import Heartbeat, Ranks

LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
VARIABLES = (*sum(LAUNCHERS.values(), ()), "MASTER_ADDR", "MASTER_PORT", "I_MPI_PIN_DOMAIN",
             "GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE", "TORCHELASTIC_USE_AGENT_STORE", "PMI_FD",
             "RNNT_STATUS_FILE")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Removes the variables of launchers, and afterwards those that start_ranks has set."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def launch_by(environment, launcher, values):
    """Sets a launcher's variables to the digits of rank, number of ranks and local rank."""
    for name, value in zip(LAUNCHERS[launcher], values, strict=True):
        environment.setenv(name, value)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# ---- who and where ----------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_are_read_from_the_variables_of_each_launcher(environment, launcher):
    launch_by(environment, launcher, "351")
    assert ranks.read_ranks() == Ranks(rank=3, world=5, local_rank=1)


@pytest.mark.parametrize(("inner", "outer"), [
    ("torchrun", "Intel MPI"), ("Intel MPI", "Slurm"), ("Open MPI", "Slurm")])
def test_variables_of_the_inner_launcher_win(environment, inner, outer):
    """A batch job, or torchrun inside an MPI job."""
    launch_by(environment, outer, "010")
    launch_by(environment, inner, "120")
    assert ranks.read_ranks() == Ranks(1, 2, 0)


def test_one_process_needs_no_group(environment):
    assert ranks.start_ranks()[0] == Ranks(0, 1, 0)
    launch_by(environment, "torchrun", "010")
    assert ranks.start_ranks(expected=1)[0] == Ranks(0, 1, 0)
    assert not dist.is_initialized()


def test_wrong_number_of_ranks_is_an_error():
    """Each process of another MPI's mpirun would take itself for the only one."""
    with pytest.raises(ValueError, match=r"^ranks: expected 4, the launcher started 1: "):
        ranks.start_ranks(expected=4)


@pytest.fixture
def bound(environment):
    """Lists the sets of CPUs to which this process would have been bound."""
    sets = []

    def set_affinity(_pid, cpus):
        if not cpus:  # Linux refuses an empty set
            raise OSError(22, "Invalid argument")
        sets.append(cpus)

    environment.setattr(os, "sched_setaffinity", set_affinity, raising=False)
    return sets


@pytest.mark.parametrize(("local_rank", "expected"), [(0, range(4, 52)), (1, range(56, 104))])
def test_rank_binds_itself_to_its_mask(environment, bound, local_rank, expected):
    environment.setenv("I_MPI_PIN_DOMAIN", "[0xffffffffffff0,0xffffffffffff00000000000000,]")
    assert ranks.bind(local_rank)
    assert bound == [set(expected)]


@pytest.mark.parametrize("domain", ["", "socket"])
def test_pin_domain_without_masks_is_left_to_intel_mpi(environment, bound, domain):
    environment.setenv("I_MPI_PIN_DOMAIN", domain)
    assert not ranks.bind(1)
    assert bound == []


@pytest.mark.parametrize("domains", ["[0x3,0xc,]", "[0x3,0xc,auto]", "[0x3,0xc,0x0]"])
def test_rank_without_cpus_is_an_error(environment, bound, domains):
    environment.setenv("I_MPI_PIN_DOMAIN", domains)
    with pytest.raises(ValueError, match="^I_MPI_PIN_DOMAIN: .* has no CPUs .* local rank 2$"):
        ranks.bind(2)


def test_system_without_affinity_binds_no_rank(environment):
    environment.setenv("I_MPI_PIN_DOMAIN", "[0x1,]")
    for name in ("sched_setaffinity", "sched_getaffinity"):  # macOS has none
        environment.delattr(os, name)
    assert not ranks.bind(0)
    ranks.warn_of_idle_cpus(0, 1)


@pytest.mark.parametrize(
    ("threads", "num_sharing", "cpus"),
    [
        (1, 1, 8),
        (1, 2, 4),
        (1, 4, None),  # two CPUs may be hyper-threads of one core
        (2, 1, None),
    ],
)
def test_one_thread_on_many_cpus_is_warned_of(environment, capsys, threads, num_sharing, cpus):
    environment.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    environment.setattr(ranks.torch, "get_num_threads", lambda: threads)
    ranks.warn_of_idle_cpus(3, num_sharing)
    expected = f"warning: rank 3 computes with one thread on {cpus} CPUs; set OMP_NUM_THREADS\n"
    assert capsys.readouterr().err == (expected if cpus else "")


def test_loader_worker_may_use_every_cpu_of_its_rank():
    """The worker may use the CPUs of all threads of its parent, here two with one CPU each."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one CPU only")
    program = (
        "import os, threading, data\n"
        "first, second = sorted(os.sched_getaffinity(0))[:2]\n"
        "bound = threading.Event()\n"
        "def compute():\n"
        "    os.sched_setaffinity(0, {second})\n"
        "    bound.set()\n"
        "    threading.Event().wait()\n"
        "os.sched_setaffinity(0, {first})\n"
        "threading.Thread(target=compute, daemon=True).start()\n"
        "bound.wait()\n"
        "if os.fork() == 0:\n"
        "    data.start_worker(0)\n"
        "    os._exit(not os.sched_getaffinity(0) >= {first, second})\n"
        "os._exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPO, check=True, timeout=300)


# ---- back ends and addresses ------------------------------------------------------------------


def test_ccl_needs_the_bindings_of_oneccl(environment):
    environment.setitem(sys.modules, ranks.ONECCL, None)  # importing it raises ImportError
    ranks.load_backend("gloo")
    with pytest.raises(ValueError, match="^backend: ccl needs oneccl_bindings_for_pytorch: "):
        ranks.load_backend("ccl")
    environment.setitem(sys.modules, ranks.ONECCL, types.ModuleType(ranks.ONECCL))
    ranks.load_backend("ccl")


def test_interface_to_this_machine_is_the_loopback():
    assert ranks.interface_to("127.0.0.1") == "lo"


def test_port_that_is_taken_is_named(environment):
    launch_by(environment, "torchrun", "020")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        environment.setenv("MASTER_PORT", port)
        with pytest.raises(ConnectionError, match=f"MASTER_PORT={port}: .*EADDRINUSE"):
            ranks.start_ranks(timeout_s=20)


@pytest.mark.parametrize(
    ("rank", "address", "timeout_s"),
    [("0", "127.0.0.1", 2), ("1", "127.0.0.1", 2), ("1", "no-such-host.invalid", 600)],
)
def test_ranks_that_never_start_end_the_wait(environment, rank, address, timeout_s):
    """An unknown host ends the wait as soon as the resolver answers."""
    launch_by(environment, "torchrun", f"{rank}20")
    environment.setenv("MASTER_ADDR", address)
    environment.setenv("MASTER_PORT", free_port())
    started = time.monotonic()
    given = rf"\(RANK={rank} WORLD_SIZE=2 LOCAL_RANK=0\)"
    with pytest.raises(ConnectionError,
                       match=rf"^rank {rank} {given}: no connection .*={address} "):
        ranks.start_ranks(timeout_s=timeout_s)
    assert time.monotonic() - started < 300


def test_process_in_a_batch_job_of_several_tasks_says_why_it_waits(environment, capsys):
    """A batch script has these variables although it runs once."""
    launch_by(environment, "Slurm", "040")
    environment.setenv("MASTER_PORT", port := free_port())
    with pytest.raises(ConnectionError, match=r"^rank 0 \(SLURM_PROCID=0 SLURM_NTASKS=4 "):
        ranks.start_ranks(timeout_s=2)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "ranks: SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0: this process is rank 0 of 4 and "
        f"waits 2 s for the others at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}. srun starts one "
        "process for each task; RANK=0 WORLD_SIZE=1 makes this process the only one.")


def test_backend_that_does_not_connect_is_an_error_with_its_interfaces(environment):
    def fail(*_, **__):
        raise RuntimeError("no such device")

    environment.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    environment.setattr(dist, "init_process_group", fail)
    with pytest.raises(ConnectionError, match="rank 0: gloo does not .*nosuch0.*no such device"):
        ranks.start_group("gloo", dist.HashStore(), Ranks(0, 2, 0), 60.0)


# ---- agreement --------------------------------------------------------------------------------


@pytest.fixture
def run_two(tmp_path):
    """Runs train.py as ranks 0 and 1, each in a folder of its own; both must fail.

    Returns what they print on standard error.
    """
    for rank in range(2):
        tiny_corpus(tmp_path / str(rank) / "corpus")

    def run(*flags_of):
        port, processes = free_port(), []
        for rank, flags in enumerate(flags_of):
            env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port,
                   "OMP_NUM_THREADS": "1"}
            command = [sys.executable, REPO / "train.py", "--data", "corpus", "--out", "run",
                       *TINY, *flags]
            processes.append(subprocess.Popen(command, cwd=tmp_path / str(rank), env=env,
                                              stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [1, 1], errors
        assert not (tmp_path / "0/run").exists()
        return errors

    return run


@pytest.mark.parametrize(("flag", "values"), [("lr", (0.004, 0.005)), ("out", ("a", "b"))])
def test_ranks_with_different_flags_stop_before_the_first_step(run_two, flag, values):
    errors = run_two(*([f"--{flag}={value}"] for value in values))
    first, second = map(repr, values)
    assert f"train.py: {flag}: rank 0 has {first}, rank 1 {second}" in errors[0]
    assert f"train.py: {flag}: rank 1 has {second}, rank 0 {first}" in errors[1]


def test_ranks_with_different_corpora_stop_before_the_first_step(run_two, tmp_path):
    path = tmp_path / "1/corpus/train/1/2/1-2.trans.txt"
    path.write_text(path.read_text().replace("0003 ONE", "0003 TWO"))
    for error in run_two([], []):
        assert "train.py: corpus: rank " in error
        assert "11 utterances, sha256 " in error  # 8 for training and 3 of dev


# ---- lost ranks -------------------------------------------------------------------------------


class EndedStore:
    """A store that has ended."""

    def add(self, *_):
        raise dist.DistNetworkError("reset by peer")


@pytest.fixture
def left(environment):
    """Lists the status and message of every call of leave, which does not end this process."""
    calls = []
    environment.setattr(ranks, "leave", lambda status, message, wait_s: calls.append(
        (status, message)))
    environment.setattr(sys, "argv", ["/somewhere/train.py"])
    return calls


@pytest.fixture
def start_heartbeat(left):
    """Starts the heartbeat of one of three ranks; all are stopped after the test."""
    started = []

    def start(rank, store, timeout_s=60.0):
        started.append(Heartbeat(store, Ranks(rank, 3, rank), timeout_s))
        return started[-1]

    yield start
    for heartbeat in started:
        heartbeat.stop()
    ranks.faulthandler.cancel_dump_traceback_later()


def test_rank_that_does_not_send_its_facts_is_an_error(start_heartbeat):
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    with pytest.raises(ConnectionError, match="^rank 0: rank 1 has not sent its run: "):
        start_heartbeat(0, store).compare("run", {"seed": 1})


def fail_to_exchange(heartbeat, text="closed"):
    with pytest.raises(RuntimeError, match=text), heartbeat.watching():
        raise RuntimeError(text)


def test_rank_without_heartbeat_is_lost(left, start_heartbeat):
    store = dist.HashStore()
    start_heartbeat(0, store)
    fail_to_exchange(start_heartbeat(2, store))  # rank 1 never starts
    assert left == [(1, "train.py: rank 2: lost rank 1: closed")]


@pytest.mark.slow
def test_error_of_an_exchange_is_raised_while_all_hearts_beat(left, start_heartbeat):
    store = dist.HashStore()
    heartbeats = [start_heartbeat(rank, store) for rank in range(3)]
    fail_to_exchange(heartbeats[0], "a bug")
    assert left == []


@pytest.mark.slow
def test_store_that_has_ended_means_that_rank_0_is_lost(left, start_heartbeat):
    fail_to_exchange(start_heartbeat(1, EndedStore()))
    assert left == [
        (1, "train.py: rank 1: lost rank 0, or the launcher, which keeps the counts: closed")
    ]


@pytest.mark.slow
def test_silence_beyond_the_timeout_ends_the_run_without_any_exchange(left, start_heartbeat):
    store = dist.HashStore()
    start_heartbeat(0, store)
    second = start_heartbeat(1, store)
    start_heartbeat(2, store, timeout_s=10)
    time.sleep(12)
    assert left == []
    second.stop()
    until = time.monotonic() + 300
    while not left:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert left[0] == (1, "train.py: rank 2: lost rank 1: silent for too long")


# ---- the end ----------------------------------------------------------------------------------

START = ("import os, sys, time\n"
         "from ranks import *\n"
         "ranks, heartbeat = start_ranks(backend='gloo', timeout_s=60)\n")


@pytest.fixture
def start_program(tmp_path):
    """Starts a program as a rank, beside a copy of ranks.py; returns the process."""
    shutil.copy(REPO / "ranks.py", tmp_path)
    processes, port = [], free_port()

    def start(program, rank=0, world=1, **env):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port,
               "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "", "RNNT_STATUS_FILE": "status",
               **env}
        to_hydra = [int(env["PMI_FD"])] if "PMI_FD" in env else []
        processes.append(subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, pass_fds=to_hydra))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


ABORT = b"cmd=abort exitcode=1\n"


@pytest.fixture
def hydra(environment, tmp_path):
    """A file in place of the connection over which ranks ask Hydra to kill all ranks."""
    path = tmp_path / "hydra"
    with path.open("wb") as file:
        environment.setenv("PMI_FD", str(file.fileno()))
        yield path


def end_of(process):
    """Returns the status, standard output and standard error of a process."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_leave_prints_flushes_and_writes_the_status_file(start_program, tmp_path):
    program = START + "print('a line', end='')\nleave(75, 'a message')\n"
    assert end_of(start_program(program)) == (75, "a line", "a message\n")
    assert (tmp_path / "status").read_text() == "75\n"


def test_only_rank_0_writes_the_status_file(start_program, tmp_path):
    program = "from ranks import leave\nleave(1)\n"
    assert end_of(start_program(program, rank=1, world=2)) == (1, "", "")
    assert not (tmp_path / "status").exists()


def test_leave_ends_the_process_although_its_outputs_fail(start_program, tmp_path):
    program = "import os\nfrom ranks import leave\nos.close(1)\nprint('lost')\nleave(3, 'message')"
    process = start_program(program, RNNT_STATUS_FILE="no/such/folder")
    assert end_of(process) == (3, "", "message\n")


def test_leave_ends_loader_workers(start_program):
    """Standard output stays open, and end_of waits, until the worker has ended."""
    program = (
        "import multiprocessing, signal, time\n"
        "from ranks import leave\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,)).start()\n"
        "leave(0)\n"
    )
    assert end_of(start_program(program)) == (0, "", "")


def test_ranks_wait_for_rank_0_to_finish_writing(start_program, tmp_path):
    program = START + (
        "print(all_sum(torch.tensor([1.0 + ranks.rank]), ranks).item())\n"
        "if ranks.rank == 0:\n"
        "    time.sleep(2)\n"
        "    open('checkpoint', 'w').close()\n"
        "leave(0, wait_s=None)\n"
    )
    first, second = (start_program(program, rank, world=2) for rank in range(2))
    assert end_of(second) == (0, "3.0\n", "")
    assert (tmp_path / "checkpoint").exists()
    assert end_of(first) == (0, "3.0\n", "")


def test_error_of_one_rank_ends_all_ranks_of_hydra(start_program, hydra):
    program = START + "if ranks.rank == 0: time.sleep(600)\nleave(1, 'message', wait_s=0.5)\n"
    start_program(program, rank=0, world=2)
    second = start_program(program, rank=1, world=2)
    assert end_of(second) == (1, "", "message\n")
    assert hydra.read_bytes() == ABORT


def test_error_of_all_ranks_ends_each_with_its_own_message(start_program, hydra):
    program = START + "leave(1, f'message of rank {ranks.rank}', wait_s=60)\n"
    processes = [start_program(program, rank, world=2) for rank in range(2)]
    assert [end_of(process) for process in processes] == [
        (1, "", "message of rank 0\n"), (1, "", "message of rank 1\n")
    ]
    assert hydra.read_bytes() == b""


@pytest.mark.parametrize(("status", "sent"), [(0, b""), (75, b""), (143, b""), (1, ABORT)])
def test_an_error_ends_all_ranks_of_hydra_but_no_time_limit_or_signal(start_program, hydra, status,
                                                                      sent):
    """This process ends before it connects to other ranks."""
    program = f"from ranks import leave\nleave({status})\n"
    assert end_of(start_program(program)) == (status, "", "")
    assert hydra.read_bytes() == sent


@pytest.mark.parametrize(
    ("is_begun", "is_ended", "num_ends"), [(0, 0, 0), (1, 0, 1), (1, 1, 0)]
)
def test_mpi_is_finalised_if_it_has_begun_and_not_ended(environment, is_begun, is_ended, num_ends):
    ends = []
    mpi = types.SimpleNamespace(
        MPI_Initialized=lambda flag: setattr(flag._obj, "value", is_begun),
        MPI_Finalized=lambda flag: setattr(flag._obj, "value", is_ended),
        MPI_Finalize=lambda: ends.append("ended"),
    )

    def load(name, mode):
        if name != "libmpi.so.12":
            raise OSError("not loaded")
        return mpi

    environment.setattr(ranks.ctypes, "CDLL", load)
    environment.setattr(ranks.signal, "alarm", lambda seconds: None)
    ranks.finalize_mpi()
    assert len(ends) == num_ends


def test_process_without_mpi_has_none_to_finalise():
    ranks.finalize_mpi()
    assert "libmpi" not in Path("/proc/self/maps").read_text()
