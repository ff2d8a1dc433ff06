# SPDX-License-Identifier: Apache-2.0
"""train.py among other ranks: who it is, where it runs, whom it talks to, what it refuses.

    python -m pytest tests/test_ranks.py

Environment, CPUs and back ends are stand-ins. The two processes that must agree are real.
"""

import os
import socket
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.distributed as dist
from tones import REPO, write_tones

import ranks
import train
from ranks import Pulse, Ranks

WORDS = ["--data", "corpus", "--train-splits", "train", "--dev-split", "dev", "--out", "run"]
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
VARIABLES = (*sum(LAUNCHERS.values(), ()), "MASTER_ADDR", "MASTER_PORT", "I_MPI_PIN_DOMAIN",
             "GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Without a launcher's variables; what train.py sets is taken back."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def init_ranks(*words):
    return ranks.init_ranks(train.parse_configs([*WORDS, *words])[0])


# ---- who and where ----------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_are_those_that_the_launcher_says(environment, launcher):
    for name, value in zip(LAUNCHERS[launcher], "351", strict=True):
        environment.setenv(name, value)
    assert ranks.read_ranks() == Ranks(rank=3, world=5, local_rank=1)


def test_torchrun_inside_an_mpi_job_wins(environment):
    for launcher, values in (("Intel MPI", "010"), ("torchrun", "120")):
        for name, value in zip(LAUNCHERS[launcher], values, strict=True):
            environment.setenv(name, value)
    assert ranks.read_ranks() == Ranks(1, 2, 0)


def test_one_process_needs_no_group(environment):
    assert init_ranks()[0] == Ranks(0, 1, 0)
    environment.setenv("RANK", "0")
    environment.setenv("WORLD_SIZE", "1")
    assert init_ranks("--ranks", "1")[0] == Ranks(0, 1, 0)
    assert not dist.is_initialized()


def test_other_number_of_ranks_than_expected_is_an_error():
    """As if each process of another MPI's mpirun took itself for the only one."""
    with pytest.raises(ValueError, match=r"ranks: expected 4, the launcher started 1\b"):
        init_ranks("--ranks", "4")


@pytest.fixture
def affinity(environment):
    """The CPUs of this process, of 104; what is set is remembered only."""
    cpus = set(range(104))
    environment.setattr(os, "sched_getaffinity", lambda _pid: set(cpus))

    def set_affinity(_pid, wanted):
        cpus.clear()
        cpus.update(wanted)

    environment.setattr(os, "sched_setaffinity", set_affinity)
    environment.setattr(torch, "get_num_threads", lambda: 48)
    return cpus


@pytest.mark.parametrize(("local_rank", "expected"), [(0, range(4, 52)), (1, range(56, 104))])
def test_rank_binds_itself_to_its_mask(environment, affinity, local_rank, expected):
    environment.setenv("I_MPI_PIN_DOMAIN", "[0xffffffffffff0,0xffffffffffff00000000000000,]")
    ranks.bind(Ranks(2 + local_rank, 4, local_rank))
    assert affinity == set(expected)


@pytest.mark.parametrize("domain", [None, "socket", "4:compact"])
def test_what_is_no_mask_is_left_to_intel_mpi(environment, affinity, domain):
    if domain is not None:
        environment.setenv("I_MPI_PIN_DOMAIN", domain)
    ranks.bind(Ranks(1, 2, 1))
    assert affinity == set(range(104))


@pytest.mark.parametrize("domains", ["[0x3,0xc,]", "[0x3,0xc,auto]", "[0x3,0xc,0x0]"])
def test_rank_without_cpus_is_an_error(environment, affinity, domains):
    def refuse(_pid, cpus):
        if not cpus:  # as Linux does
            raise OSError(22, "Invalid argument")

    environment.setattr(os, "sched_setaffinity", refuse)
    environment.setenv("I_MPI_PIN_DOMAIN", domains)
    with pytest.raises(ValueError, match="I_MPI_PIN_DOMAIN: .* has no CPUs .* local rank 2"):
        ranks.bind(Ranks(2, 3, 2))


def test_a_rank_that_is_no_number_is_an_error(environment):
    environment.setenv("RANK", "")
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK: '', expected a number"):
        ranks.read_ranks()


@pytest.mark.parametrize(
    ("threads", "world", "domain", "warns"),
    [(1, 2, "", True), (1, 104, "", False), (2, 2, "", False), (1, 8, "[0xff]", True),
     (1, 8, "[0x1]", False), (1, 2, "[0x3]", False)],
)
def test_one_thread_on_many_cpus_is_warned_of(
    environment, affinity, capsys, threads, world, domain, warns
):
    environment.setattr(torch, "get_num_threads", lambda: threads)
    environment.setenv("I_MPI_PIN_DOMAIN", domain)
    ranks.bind(Ranks(5, world, 0))
    assert ("rank 5 computes with one thread on" in capsys.readouterr().err) == warns


def test_loader_worker_may_use_every_cpu_of_its_rank():
    """Its parent is bound to one CPU, another thread of its parent to another."""
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


def test_backend_is_gloo_without_the_bindings_of_oneccl():
    if ranks.load_backend("auto") == "ccl":
        pytest.skip("oneccl_bindings_for_pytorch is installed")
    assert ranks.load_backend("gloo") == "gloo"
    with pytest.raises(ValueError, match="backend: ccl needs oneccl_bindings_for_pytorch: "):
        ranks.load_backend("ccl")


def test_backend_is_ccl_with_the_bindings(environment):
    module = types.ModuleType("oneccl_bindings_for_pytorch")
    environment.setitem(sys.modules, module.__name__, module)
    assert [ranks.load_backend(name) for name in ("auto", "ccl", "gloo")] == ["ccl", "ccl", "gloo"]


def test_backend_mpi_needs_a_torch_with_mpi(environment):
    environment.setattr(dist, "is_mpi_available", lambda: False)
    with pytest.raises(ValueError, match="a torch that was built with MPI"):
        ranks.load_backend("mpi")
    environment.setattr(dist, "is_mpi_available", lambda: True)
    assert ranks.load_backend("mpi") == "mpi"


def test_interface_to_this_machine_is_the_loopback():
    assert ranks.interface_to("127.0.0.1") == "lo"


def test_taken_port_is_named(environment):
    environment.setenv("RANK", "0")
    environment.setenv("WORLD_SIZE", "2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        environment.setenv("MASTER_PORT", port)
        with pytest.raises(ConnectionError, match=f"MASTER_PORT={port}: .*EADDRINUSE"):
            init_ranks("--timeout-s", "20")


def test_no_interface_is_told_by_an_address_that_is_not_ipv4():
    assert ranks.interface_to("127.0.0.1") == "lo"
    assert ranks.interface_to("::1") is None
    with pytest.raises(OSError):  # noqa: PT011 - the system's words differ
        ranks.interface_to("no-such-host.invalid")


def test_without_affinity_a_rank_is_not_bound(environment):
    environment.setenv("I_MPI_PIN_DOMAIN", "[0x1,]")
    environment.delattr(os, "sched_setaffinity")  # macOS
    ranks.bind(ranks.Ranks(0, 1, 0))


@pytest.mark.parametrize(("rank", "address"), [("0", "127.0.0.1"), ("1", "127.0.0.1"),
                                               ("1", "no-such-host.invalid")])
def test_ranks_that_do_not_come_end_the_wait(environment, rank, address):
    environment.setenv("RANK", rank)
    environment.setenv("WORLD_SIZE", "2")
    environment.setenv("MASTER_ADDR", address)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    started = time.monotonic()
    is_known = "invalid" not in address
    with pytest.raises(ConnectionError, match=rf"^rank {rank}: no connection .*={address} "):
        init_ranks("--timeout-s", "2" if is_known else "600")  # nobody waits for a wrong name
    assert time.monotonic() - started < 60


# ---- agreement and loss -----------------------------------------------------------------------


@pytest.fixture
def run_two(tmp_path):
    """Runs train.py as ranks 0 and 1, each in a folder of its own; returns what they said."""
    texts = ["ONE TWO", "THREE FOUR"] * 2
    for rank in range(2):
        write_tones(tmp_path / str(rank) / "corpus", "train", texts, [0.5] * 4)
        write_tones(tmp_path / str(rank) / "corpus", "dev", texts, [0.5] * 4)

    def run(*words_of):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = []
        for rank, words in enumerate(words_of):
            env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port,
                   "OMP_NUM_THREADS": "1"}
            command = [sys.executable, REPO / "train.py", *WORDS, "--preset", "demo", *words]
            processes.append(
                subprocess.Popen([*command, "--batch-size", "1"], cwd=tmp_path / str(rank), env=env,
                                 stderr=subprocess.PIPE, text=True)
            )
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [1, 1], errors
        assert not (tmp_path / "0/run").exists()
        return errors

    return run


def test_ranks_with_different_configs_stop_before_the_first_step(run_two):
    errors = run_two(["--lr", "0.004"], ["--lr", "0.005"])
    assert "train.py: lr: rank 0 has 0.004, rank 1 0.005" in errors[0]
    assert "train.py: lr: rank 1 has 0.005, rank 0 0.004" in errors[1]


def test_ranks_with_different_run_directories_stop_before_the_first_step(run_two):
    errors = run_two(["--out", "a"], ["--out", "b"])
    assert "train.py: out: rank 0 has 'a', rank 1 'b'" in errors[0]
    assert "train.py: out: rank 1 has 'b', rank 0 'a'" in errors[1]


def test_a_backend_that_does_not_connect_is_an_error_in_words(environment):
    def fail(*_, **__):
        raise RuntimeError("no such device")

    environment.setenv("RANK", "0")
    environment.setenv("WORLD_SIZE", "2")
    environment.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    environment.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    environment.setattr(Pulse, "beat", lambda _: None)
    environment.setattr(Pulse, "compare", lambda *_: None)
    environment.setattr(dist, "init_process_group", fail)
    with pytest.raises(ConnectionError, match="rank 0: gloo does not .*nosuch0.*no such device"):
        init_ranks()


def test_ranks_with_different_corpora_stop_before_the_first_step(run_two, tmp_path):
    path = tmp_path / "1/corpus/train/1/2/1-2.trans.txt"
    path.write_text(path.read_text().replace("FOUR", "FORE", 1))
    for error in run_two([], []):
        assert "train.py: corpus: rank " in error
        assert "8 utterances, sha256 " in error


PULSES = []


class Gone:
    """A store whose keeper has ended."""

    def add(self, *_):
        raise dist.DistNetworkError("reset by peer")


def make_pulse(rank, store, timeout_s=60.0):
    PULSES.append(Pulse(store, Ranks(rank, 3, rank), timeout_s))
    return PULSES[-1]


def fail_to_exchange(pulse, text="closed"):
    with pytest.raises(RuntimeError, match=text), pulse.watching():
        raise RuntimeError(text)


@pytest.fixture
def ends(environment):
    """Statuses of processes that would have ended."""
    statuses = []
    environment.setattr(os, "_exit", statuses.append)
    environment.setattr(ranks.faulthandler, "dump_traceback_later", lambda *a, **k: None)
    yield statuses
    # Their threads have to end while os._exit is the stand-in.
    for pulse in PULSES:
        pulse.store, pulse.risen = Gone(), {0: time.monotonic()}
    PULSES.clear()
    time.sleep(2.5)


def test_rank_that_does_not_count_is_lost(ends, capsys):
    store = dist.HashStore()
    pulses = [make_pulse(rank, store) for rank in (0, 2)]  # rank 1 never begins
    fail_to_exchange(pulses[1])
    assert ends == [1]
    assert capsys.readouterr().err == "train.py: rank 2: lost rank 1: closed\n"


@pytest.mark.slow
def test_nobody_is_lost_while_all_count(ends, capsys):
    store = dist.HashStore()
    pulses = [make_pulse(rank, store) for rank in range(3)]
    fail_to_exchange(pulses[0], "a bug")
    assert ends == []
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_store_that_is_gone_went_with_rank_0(ends, environment, capsys):
    fail_to_exchange(make_pulse(1, Gone()))
    assert ends == [1]
    assert "rank 1: lost rank 0, or the launcher" in capsys.readouterr().err


@pytest.mark.slow
def test_silence_beyond_the_timeout_ends_the_run_without_any_exchange(ends, capsys):
    store = dist.HashStore()
    pulses = [make_pulse(0, store), make_pulse(1, store), make_pulse(2, store, timeout_s=2.5)]
    assert pulses
    time.sleep(4)
    assert ends == []
    pulses[1].risen = {}  # rank 1 counts no more: its thread has nothing left to add to
    time.sleep(5)
    assert 1 in ends
    assert "rank 2: lost rank 1: silent for too long" in capsys.readouterr().err


@pytest.mark.slow
def test_hydra_is_told_to_end_the_other_ranks(ends, environment, capsys):
    end, hydra = socket.socketpair()
    environment.setenv("PMI_FD", str(end.fileno()))
    fail_to_exchange(make_pulse(0, dist.HashStore()))
    assert hydra.recv(100) == b"cmd=abort exitcode=1\n"
