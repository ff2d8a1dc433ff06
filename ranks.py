# SPDX-License-Identifier: Apache-2.0
"""Several processes train one model: start-up, sums, lost ranks, and one way to end.

This file needs torch and the standard library only, so it can be copied into another project:

    ranks, heartbeat = start_ranks()
    heartbeat.compare("run", {"seed": seed})  # every rank must have the same values
    with heartbeat.watching():
        ...  # training: all_sum, DistributedDataParallel
    leave(0, wait_s=60)  # never returns

A rank is one of these processes. Their number is called the world size, as in torch.distributed.
"""

import atexit
import ctypes
import faulthandler
import fcntl
import importlib
import json
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """The place of this process among all that train together."""

    rank: int
    world: int  # number of ranks
    local_rank: int  # counts the ranks of one host


# ------------------------------------------------------------------------------------- start-up


def start_ranks(expected: int = 0, backend: str = "gloo",
                timeout_s: float = 600.0) -> tuple[Ranks, "Heartbeat"]:
    """Connects this process to the other ranks; a single process needs no connection.

    Args:
        expected: the number of ranks that must have been started; 0 accepts any number.
        backend: of torch.distributed: gloo, ccl or mpi.
        timeout_s: longest wait for another rank, at start-up and in every exchange.
    Raises:
        ConnectionError: the ranks do not find each other.
        ValueError: their number is not `expected`, a variable of the launcher is wrong, the
            backend is not installed, or the ranks have different versions of torch.
    """
    global _heartbeat
    ranks = read_ranks(expected)
    is_bound = bind(ranks.local_rank)
    warn_of_idle_cpus(ranks.rank, 1 if is_bound else ranks.world)
    load_backend(backend)
    store = rendezvous(ranks, timeout_s)
    _heartbeat = heartbeat = Heartbeat(store, ranks, timeout_s)
    heartbeat.compare("installation", {"torch": torch.__version__, "backend": backend})
    if ranks.world > 1:
        start_group(backend, store, ranks, timeout_s)
    return ranks, heartbeat


# Number of this process, of all processes, and of this process on its host; the first found wins.
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # Intel MPI and MPICH
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # Slurm
)


def launcher_variables() -> dict[str, str]:
    """The variables of one launcher in VARIABLES, and their values; empty without a launcher."""
    for names in VARIABLES:
        if names[0] in os.environ and names[1] in os.environ:
            return {name: os.environ.get(name, "0") for name in names}
    return {}


def read_ranks(expected: int = 0) -> Ranks:
    """Reads the variables that torchrun, Intel MPI and MPICH, Open MPI, or Slurm set."""
    variables = launcher_variables()
    if not all(value.isdecimal() for value in variables.values()):
        raise ValueError(f"{variables}, expected numbers")
    ranks = Ranks(*map(int, variables.values())) if variables else Ranks(0, 1, 0)
    if expected not in (0, ranks.world):
        raise ValueError(f"ranks: expected {expected}, the launcher started {ranks.world}: does "
                         "mpirun belong to this environment, and does it reach every host?")
    return ranks


def bind(local_rank: int) -> bool:
    """Binds this process and its threads to their CPUs, as Intel MPI does before it starts a rank.

    I_MPI_PIN_DOMAIN=[0x3,0xc,] gives CPUs 0 and 1 to local rank 0 and CPUs 2 and 3 to local rank
    1. Its other forms (`socket`, `core` ...) are left to Intel MPI.

    Returns:
        Whether this process is bound.
    """
    domains = os.environ.get("I_MPI_PIN_DOMAIN", "")
    if not domains.startswith("[") or not hasattr(os, "sched_setaffinity"):  # macOS has none
        return False
    try:
        mask = int(domains.strip("[],").split(",")[local_rank], 16)
        os.sched_setaffinity(0, {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1})
    except (IndexError, ValueError, OSError) as error:
        raise ValueError(f"I_MPI_PIN_DOMAIN: {domains} has no CPUs of this host for local rank "
                         f"{local_rank}") from error
    return True


def warn_of_idle_cpus(rank: int, num_sharing: int) -> None:
    """Warns of one thread on many CPUs; at most `num_sharing` ranks share them.

    torchrun and many batch systems set OMP_NUM_THREADS=1 unless it is set.
    """
    if not hasattr(os, "sched_getaffinity"):
        return
    # This is read before torch's number of threads, with which OpenMP may bind this thread.
    num_cpus = len(os.sched_getaffinity(0)) // num_sharing
    if torch.get_num_threads() == 1 and num_cpus > 2:  # two may be hyper-threads of one core
        print(f"warning: rank {rank} computes with one thread on {num_cpus} CPUs; set "
              "OMP_NUM_THREADS", file=sys.stderr)


ONECCL = "oneccl_bindings_for_pytorch"  # registers "ccl" when it is imported


def load_backend(name: str) -> None:
    """Imports the module that registers ccl; torch has the other backends."""
    if name == "ccl":
        try:
            importlib.import_module(ONECCL)
        except ImportError as error:
            raise ValueError(f"backend: ccl needs {ONECCL}: {error}") from error


def rendezvous(ranks: Ranks, timeout_s: float) -> dist.Store:
    """Connects to the key-value store of rank 0, or of torchrun, at MASTER_ADDR:MASTER_PORT."""
    if ranks.world == 1:
        return dist.HashStore()
    address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    port = os.environ.setdefault("MASTER_PORT", "29500")
    variables = launcher_variables()
    given = " ".join(f"{name}={value}" for name, value in variables.items())
    if ranks.rank == 0 and "SLURM_NTASKS" in variables:
        # A batch script and a shell of salloc have these variables although they run once.
        print(f"ranks: {given}: this process is rank 0 of {ranks.world} and waits {timeout_s:g} s "
              f"for the others at MASTER_ADDR={address} MASTER_PORT={port}. srun starts one "
              "process for each task; RANK=0 WORLD_SIZE=1 makes this process the only one.",
              file=sys.stderr, flush=True)
    try:
        # Unless told, gloo takes the interface of this host's own name, often the loopback.
        interface = interface_to(address)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("CCL_KVS_IFACE", interface)
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world, timeout=timeout))
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"rank {ranks.rank} ({given}): no connection to rank 0 at "
                              f"MASTER_ADDR={address} MASTER_PORT={port}: {error}") from error
    return store


def interface_to(host: str) -> str | None:
    """Returns the network interface that leads to `host`, None if the system does not tell it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # chooses a route and sends nothing
        own_address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # this interface has no IPv4 address
                request = struct.pack("256s", name.encode())
                answer = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == own_address:
                    return name
    return None


def start_group(backend: str, store: dist.Store, ranks: Ranks, timeout_s: float) -> None:
    try:
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world,
                                timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        used = {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE")}
        raise ConnectionError(f"rank {ranks.rank}: {backend} does not connect the ranks, with "
                              f"{used}: {error}") from error


def all_sum(x: Tensor, ranks: Ranks) -> Tensor:
    """Sums a tensor of any shape over the ranks, in place."""
    if ranks.world > 1:
        dist.all_reduce(x)
    return x


# ------------------------------------------------------------------------------------ lost ranks


class Heartbeat:
    """Finds lost ranks: every rank counts up once a second and reads the counts of the others.

    A process that computes or waits counts; one that was killed or stopped does not. The counts
    are in the key-value store, which rank 0 or torchrun keeps.
    """

    def __init__(self, store: dist.Store, ranks: Ranks, timeout_s: float) -> None:
        self.store, self.ranks, self.timeout_s = store, ranks, timeout_s
        # When each rank's heartbeat last advanced, on this host's monotonic clock.
        self.last_beat = dict.fromkeys(range(ranks.world), time.monotonic())
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        if ranks.world > 1:
            self.thread.start()
            atexit.register(self.stop)  # a thread inside the store aborts a finalised interpreter

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join(5)

    def beat(self) -> None:
        """Counts up and reads all counts once a second; `timeout_s` without a beat ends the run."""
        counts = dict.fromkeys(self.last_beat, 0)  # a rank that has not started has count 0
        while not self.stopped.is_set():
            # A store that stops answering blocks this thread: faulthandler then ends the process.
            faulthandler.dump_traceback_later(self.timeout_s + 60, exit=True)
            try:
                for rank in self.last_beat:
                    count = self.store.add(f"heartbeat/{rank}", int(rank == self.ranks.rank))
                    if count != counts[rank]:
                        counts[rank], self.last_beat[rank] = count, time.monotonic()
            except RuntimeError:  # the store has ended; `watching` will find no heartbeat at all
                return
            self.end_if_silent_since(time.monotonic() - self.timeout_s, "silent for too long")
            self.stopped.wait(1)
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """If an exchange in the block fails, leaves and names the ranks without a heartbeat.

        Other errors, and those of an exchange among living ranks, are raised.
        """
        try:
            yield
        except RuntimeError as error:  # torch raises no more specific class
            if self.ranks.world > 1:
                failed_at = time.monotonic()
                time.sleep(5)
                # `beat` reads a count up to a second after the lost rank raised it.
                self.end_if_silent_since(failed_at + 2, str(error))
            raise

    def end_if_silent_since(self, moment: float, cause: str) -> None:
        lost = [rank for rank, last_beat in self.last_beat.items() if last_beat < moment]
        if not lost:
            return
        names = ", ".join(f"rank {rank}" for rank in lost)
        if self.ranks.rank in lost:  # the store does not even return this rank's own count
            names = "rank 0, or the launcher, which keeps the counts"
        program = Path(sys.argv[0]).name
        leave(1, f"{program}: rank {self.ranks.rank}: lost {names}: {cause}", wait_s=0)

    def compare(self, key: str, facts: dict[str, object]) -> None:
        """Checks that all ranks hold the same facts; `key` names them in the store.

        Raises:
            ValueError: on every rank, with the first fact that differs and both values.
            ConnectionError: a rank has not sent its facts within `timeout_s`.
        """
        mine = json.dumps(facts, default=str)
        self.store.set(f"{key}/{self.ranks.rank}", mine)
        for rank in self.last_beat:
            try:
                theirs = json.loads(self.store.get(f"{key}/{rank}"))
            except RuntimeError as error:
                raise ConnectionError(f"rank {self.ranks.rank}: rank {rank} has not sent its "
                                      f"{key}: {error}") from error
            for name, value in json.loads(mine).items():
                if theirs.get(name) != value:
                    time.sleep(1)  # the store ends with rank 0: let the others read it, too
                    raise ValueError(f"{name}: rank {self.ranks.rank} has {value!r}, "
                                     f"rank {rank} {theirs.get(name)!r}")

    def leave_together(self, limit_s: float | None) -> bool:
        """Announces that this rank leaves; returns whether all ranks did so within `limit_s`."""
        world, add = self.ranks.world, self.store.add

        def wait() -> None:
            with suppress(RuntimeError):  # the store has ended
                add("leaving", 1)
                while add("leaving", 0) < world:
                    time.sleep(0.1)
                self.stopped.set()
                add("left", 1)
                until = time.monotonic() + 5
                # The store ends with rank 0.
                while (self.ranks.rank == 0 and add("left", 0) < world
                       and time.monotonic() < until):
                    time.sleep(0.1)

        # In a thread, because a store that does not answer blocks its caller without limit.
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(limit_s)
        return not thread.is_alive()


# -------------------------------------------------------------------------------------- the end

_heartbeat: Heartbeat | None = None  # start_ranks sets it, leave reads it


def leave(status: int, message: str = "", wait_s: float | None = 5.0) -> NoReturn:
    """Prints the message on stderr and ends this process; no failure on the way keeps it alive.

    The ranks wait up to `wait_s` for each other, because rank 0 may still be writing a checkpoint.
    None sets no limit: the heartbeat ends the wait for a lost rank. If some ranks do not come, an
    error ends them too. MPI is finalised if all came. Rank 0 writes the status to the file that
    the environment variable RNNT_STATUS_FILE names, since torchrun and mpirun return another one.
    Loader workers are killed.

    The interpreter is not finalised, because a torch thread that returns to a finalised interpreter
    aborts the process. Hence functions registered with atexit do not run.
    """
    # A time limit (status 75) and signal n (128 + n) stop all ranks, an error may stop only one.
    is_error = 0 < status < 128 and status != os.EX_TEMPFAIL
    try:
        write_end(status, message)
        together = _heartbeat is not None and _heartbeat.leave_together(wait_s)
        for worker in multiprocessing.active_children():
            worker.kill()
        if is_error and not together and "PMI_FD" in os.environ:
            # Hydra, the launcher of Intel MPI and MPICH, ends the other ranks on this request only,
            # unless the failed rank has called MPI. Other launchers end them in any case.
            os.write(int(os.environ["PMI_FD"]), f"cmd=abort exitcode={status}\n".encode())
        if together:
            if not is_error and dist.is_initialized():
                dist.destroy_process_group()
            finalize_mpi()
    finally:
        os._exit(status)


def finalize_mpi() -> None:
    """Finalises MPI if a library in this process, such as oneCCL, has initialised it.

    Launchers of MPI take a rank that ends without MPI_Finalize for a crash and kill the others.
    MPI_Finalize waits for all ranks.
    """
    for name in ("libmpi.so.12", "libmpi.so.40"):  # Intel MPI and MPICH, Open MPI
        with suppress(OSError):  # this library is not loaded
            mpi = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
            is_begun, is_ended = ctypes.c_int(), ctypes.c_int()
            mpi.MPI_Initialized(ctypes.byref(is_begun))
            mpi.MPI_Finalized(ctypes.byref(is_ended))
            if is_begun.value and not is_ended.value:
                signal.alarm(60)  # ends this process if another rank is gone
                mpi.MPI_Finalize()


def write_end(status: int, message: str) -> None:
    """Writes the status file and the message, and flushes both streams."""
    # Neither a full disk nor a pipe without a reader may keep `leave` from its other duties.
    with suppress(OSError, ValueError):
        if "RNNT_STATUS_FILE" in os.environ and read_ranks().rank == 0:
            Path(os.environ["RNNT_STATUS_FILE"]).write_text(f"{status}\n")
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
