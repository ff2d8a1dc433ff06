# SPDX-License-Identifier: Apache-2.0
"""Who this process is among those that train together: binding, start-up, sums, lost ranks."""

import atexit
import faulthandler
import fcntl
import importlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """Who this process is among those that train together."""

    rank: int
    world: int
    local_rank: int  # among those on the same host


def read_ranks() -> Ranks:
    """From the variables of torchrun, of Intel MPI and MPICH, of Open MPI, or of Slurm."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if names[0] in os.environ and names[1] in os.environ:
            found = {name: os.environ.get(name, "0") for name in names}
            for name, value in found.items():
                if not value.isdecimal():
                    raise ValueError(f"{name}: {value!r}, expected a number")
            return Ranks(*map(int, found.values()))
    return Ranks(0, 1, 0)


def bind(ranks: Ranks) -> None:
    """Keeps this process and its threads on its CPUs, as Intel MPI does before it starts a rank.

    I_MPI_PIN_DOMAIN=[0x3,0xc,] gives CPUs 0 and 1 to local rank 0 and CPUs 2 and 3 to local rank
    1. Its other forms (`socket`, `core` ...) are for Intel MPI alone. Warns of cores left idle.
    """
    if not hasattr(os, "sched_setaffinity"):  # macOS
        return
    sharing = ranks.world  # at most so many ranks share the CPUs of a process that is not bound
    domains = os.environ.get("I_MPI_PIN_DOMAIN", "")
    if domains.startswith("["):
        try:
            mask = int(domains.strip("[],").split(",")[ranks.local_rank], 16)
            os.sched_setaffinity(0, {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1})
        except (IndexError, ValueError, OSError) as error:
            raise ValueError(f"I_MPI_PIN_DOMAIN: {domains} has no CPUs of this host for local rank "
                             f"{ranks.local_rank}") from error
        sharing = 1
    # Asked before torch: OpenMP may bind this thread to one CPU.
    cpus = len(os.sched_getaffinity(0)) // sharing
    if torch.get_num_threads() == 1 and cpus > 2:  # two may be hyper-threads of one core
        print(f"warning: rank {ranks.rank} computes with one thread on {cpus} CPUs; set "
              "OMP_NUM_THREADS", file=sys.stderr)


def load_backend(name: str) -> str:
    """What torch.distributed has to be asked for; the bindings of oneCCL register "ccl"."""
    if name in ("auto", "ccl"):
        try:
            importlib.import_module("oneccl_bindings_for_pytorch")
        except ImportError as error:
            if name == "ccl":
                package = "oneccl_bindings_for_pytorch"
                raise ValueError(f"backend: ccl needs {package}: {error}") from error
            return "gloo"
        return "ccl"
    if name == "mpi" and not dist.is_mpi_available():
        raise ValueError("backend: mpi needs a torch that was built with MPI; PyPI's was not")
    return name


def interface_to(host: str) -> str | None:
    """The network interface that leads to a host, or None if an IPv4 address does not tell.

    Left alone, gloo takes the interface of this machine's own name, on Debian often the loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 1))  # chooses a route and sends nothing
        except socket.gaierror:
            socket.getaddrinfo(host, 1)  # raises for a name that is unknown everywhere
            return None
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode())
                answer = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
            except OSError:  # an interface without IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def init_ranks(cfg: Any) -> tuple[Ranks, "Pulse"]:
    """Reads who we are, binds this process, and with more than one rank starts the process group.

    Raises ConnectionError if the ranks do not find each other, ValueError if their number is not
    the expected one or they disagree.
    """
    ranks = read_ranks()
    if cfg.ranks not in (0, ranks.world):
        raise ValueError(
            f"ranks: expected {cfg.ranks}, the launcher started {ranks.world}: does mpirun belong "
            "to this environment, and does it reach every host?"
        )
    bind(ranks)
    # One that is asked for and missing is an error, be it needed or not.
    backend = load_backend(cfg.backend) if ranks.world > 1 or cfg.backend != "auto" else ""
    if ranks.world == 1:
        return ranks, Pulse(dist.HashStore(), ranks, cfg.timeout_s)
    address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    port = os.environ.setdefault("MASTER_PORT", "29500")
    timeout = timedelta(seconds=cfg.timeout_s)
    try:
        interface = interface_to(address)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("CCL_KVS_IFACE", interface)
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world, timeout=timeout))
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"rank {ranks.rank}: no connection to rank 0 at MASTER_ADDR={address} "
            f"MASTER_PORT={port}: {error}"
        ) from error
    pulse = Pulse(store, ranks, cfg.timeout_s)
    pulse.compare("installation", {"torch": torch.__version__, "backend": backend})
    try:
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout
        )
    except RuntimeError as error:
        used = {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE")}
        raise ConnectionError(f"rank {ranks.rank}: {backend} does not connect the ranks, with "
                              f"{used}: {error}") from error
    return ranks, pulse


def abort_launcher(line: str) -> None:
    """Prints `line` and has Hydra (Intel MPI, MPICH) end all ranks: by itself it waits for the
    others when one ends that has not called MPI. Other launchers do not wait."""
    print(line, file=sys.stderr, flush=True)
    if "PMI_FD" in os.environ:
        with suppress(OSError):  # it is gone already
            os.write(int(os.environ["PMI_FD"]), b"cmd=abort exitcode=1\n")


class Pulse:
    """Tells which ranks are gone: each counts up every second, and follows the others' counts.

    A process that was killed or stopped no longer counts; one that computes or waits does. The
    counts are in the key-value store that rank 0 keeps, or torchrun.
    """

    def __init__(self, store: dist.Store, ranks: Ranks, timeout_s: float) -> None:
        self.store, self.ranks, self.timeout_s = store, ranks, timeout_s
        self.risen = dict.fromkeys(range(ranks.world), time.monotonic())  # rank: last seen to
        self.ended = threading.Event()
        if ranks.world > 1:
            thread = threading.Thread(target=self.beat, daemon=True)
            thread.start()
            # A thread inside the store when the interpreter goes would abort the process.
            atexit.register(thread.join, 5)
            atexit.register(self.ended.set)  # called before the one above

    def beat(self) -> None:
        counts = dict.fromkeys(self.risen, 0)  # one that has not begun has not risen
        while not self.ended.is_set():
            # If the store itself stops answering, nothing else would end a wait without limit.
            faulthandler.dump_traceback_later(self.timeout_s + 60, exit=True)
            try:
                for rank in self.risen:
                    count = self.store.add(f"pulse/{rank}", int(rank == self.ranks.rank))
                    if count != counts[rank]:
                        counts[rank], self.risen[rank] = count, time.monotonic()
            except RuntimeError:  # gone with its keeper: nobody's count will be seen to rise
                return
            self.end_if_silent_since(time.monotonic() - self.timeout_s, "silent for too long")
            self.ended.wait(1)
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Should an exchange fail, ends the run and names the ranks that do not count any more."""
        try:
            yield
        except RuntimeError as error:  # torch has no class of its own for a failed exchange
            if self.ranks.world > 1:
                asked = time.monotonic()
                time.sleep(5)
                self.end_if_silent_since(asked, str(error))
            raise

    def end_if_silent_since(self, moment: float, why: str) -> None:
        lost = [rank for rank, at in self.risen.items() if at < moment]
        if not lost:
            return
        names = ", ".join(f"rank {rank}" for rank in lost)
        if self.ranks.rank in lost:  # not even our own count is seen: the store does not answer
            names = "rank 0, or the launcher, which keeps the counts"
        abort_launcher(f"train.py: rank {self.ranks.rank}: lost {names}: {why}")
        os._exit(1)  # at once: what torch still has to close would wait for the lost rank

    def compare(self, key: str, facts: dict[str, object]) -> None:
        """Raises ValueError on every rank if a fact is not the same on all, ConnectionError if a
        rank does not tell it; `key` names the facts."""
        mine = json.dumps(facts, default=str)
        self.store.set(f"{key}/{self.ranks.rank}", mine)
        for rank in self.risen:
            try:
                theirs = json.loads(self.store.get(f"{key}/{rank}"))
            except RuntimeError as error:
                raise ConnectionError(f"rank {self.ranks.rank}: nothing of its {key} from rank "
                                      f"{rank}: {error}") from error
            for name, value in json.loads(mine).items():
                if theirs.get(name) != value:
                    time.sleep(1)  # rank 0 keeps the store, and others may not have read it yet
                    raise ValueError(f"{name}: rank {self.ranks.rank} has {value!r}, "
                                     f"rank {rank} {theirs.get(name)!r}")


def all_sum(x: Tensor, ranks: Ranks) -> Tensor:
    """Sum over the ranks, in place."""
    if ranks.world > 1:
        dist.all_reduce(x)
    return x
