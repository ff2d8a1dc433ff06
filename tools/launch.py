# SPDX-License-Identifier: Apache-2.0
"""Decide how `run.sh` starts the ranks: cores, hosts, launcher, backend, environment, one command.

    python3 -m tools.launch check                   # are the knobs and the hosts file valid?
    python3 -m tools.launch decide FILE [FLAG ...]  # print every decision with its reason
    python3 -m tools.launch run COMMAND ...         # run a launch command, return rank 0's status

The knobs of `run.sh` (RANKS, HOSTS ...) arrive as environment variables; the flags go to train.py.
`decide` writes to FILE, with a zero byte after each: data folder, output folder, dev split, number
of usable cores, "prepare" or nothing, "score" or nothing, and the launch command, word by word. A
dry run may happen before the set-up, so this file needs only the standard library of Python 3.10.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from ctypes.util import find_library
from pathlib import Path
from typing import NamedTuple

CORPORA = {  # name: training splits, dev split, preset
    "demo": (["train-demo"], "dev-demo", "demo"),
    "mini-librispeech": (["train-clean-5"], "dev-clean-2", "mini"),
    "librispeech-100": (["train-clean-100"], "dev-clean", "democratized"),
    "librispeech-960": (["train-clean-100", "train-clean-360", "train-other-500"], "dev-clean",
                        "democratized"),
}
CHOICES = {"CORPUS": tuple(CORPORA), "LAUNCHER": ("auto", "mpirun", "torchrun", "ipex"),
           "BACKEND": ("auto", "ccl", "gloo", "mpi"), "DRY_RUN": ("0", "1")}
# Variables of the ranks that are decided here unless the user has set them.
VARIABLES = ("OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME", "LD_PRELOAD", "I_MPI_PIN_DOMAIN",
             "MASTER_ADDR", "MASTER_PORT", "CCL_WORKER_COUNT", "CCL_WORKER_AFFINITY",
             "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
OPENMP, ALLOCATORS = "iomp5", ("tcmalloc", "tcmalloc_minimal", "jemalloc")
BINDINGS = "oneccl_bindings_for_pytorch"
STATUS_FILE = "RNNT_STATUS_FILE"  # this variable names the file for rank 0's exit status
PASSED_ON = ("GLOO_", "CCL_", "FI_", "KMP_", "OMP_", "ONEDNN_", "DNNL_", "TORCH_")  # by Open MPI
AS_SET = "as you set it"
NO_ANSWER = 124  # status of a host that does not answer, as the program `timeout` returns it


# ---- cores ---------------------------------------------------------------------------------------


class Core(NamedTuple):
    """A physical core. Its hyper-threads share one matrix unit, so one CPU stands for all."""

    node: int  # NUMA node
    cpu: int


def read_cores(cpus: Iterable[int], folder: Path = Path("/sys/devices/system/cpu")) -> list[Core]:
    """The cores behind `cpus`, NUMA node by NUMA node; the first allowed CPU stands for its core.

    A CPU that the kernel's `folder` does not describe is a core of its own on node 0: containers
    and macOS may lack that folder.
    """
    cores: dict[str, Core] = {}
    for cpu in sorted(cpus):
        siblings = read_text(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        node = next((int(path.name[4:]) for path in folder.glob(f"cpu{cpu}/node[0-9]*")), 0)
        cores.setdefault(siblings.strip(), Core(node, cpu))
    return sorted(cores.values())


def read_text(path: Path) -> str:
    """The text of a file, or "" if there is no such file."""
    with suppress(OSError):
        return path.read_text()
    return ""


def cpu_quota(membership: str, mounts: Path) -> int | None:
    """The smallest limit in CPUs, rounded up, that a control group of this process or one around
    it sets; None without a limit.

    `membership` is the text of /proc/self/cgroup. A container may see its own group as the root of
    `mounts`, so the roots of both versions are always read.
    """
    groups = {".": "/", "cpu": "/"}  # version 2 stands in `mounts` itself, version 1 in its `cpu`
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            groups["cpu" if controllers else "."] = path
    limits = []
    for folder, path in groups.items():
        group = mounts / folder / path.lstrip("/")
        for level in (group, *group.parents):
            words = read_text(level / "cpu.max").split()  # quota and period, or "max" and period
            if not words:
                words = [read_text(level / f"cpu.cfs_{name}_us").strip()
                         for name in ("quota", "period")]
            if words[0] not in ("", "max", "-1"):
                limits.append(-(-int(words[0]) // int(words[1])))
    return min(limits, default=None)


def default_ranks(cores: Sequence[Core]) -> int:
    """Ranks on each of several hosts, or on a machine of more than two cores.

    One rank for each NUMA node, since memory of another node is slow; one rank for all if a
    cpuset left nodes of different sizes, since all ranks would wait for the smallest.
    """
    sizes = Counter(core.node for core in cores)
    return len(sizes) if len(set(sizes.values())) == 1 else 1


# ---- hosts ---------------------------------------------------------------------------------------


def read_hosts(text: str, source: str) -> tuple[list[str], int | None]:
    """Hosts and ranks on each (None if the file does not say). `source` names the file in errors.

    A line holds `name`, `name slots=N` or `name:N`; the rest of a line from # on is a comment.
    """
    slots: dict[str, int | None] = {}  # of each host
    for number, line in enumerate(text.split("\n"), 1):
        line, where = line.split("#")[0].strip(), f"{source}:{number}"
        if not line:
            continue
        name, count = read_host(line, where)
        if name in slots:
            raise ValueError(f"{where}: {name} stands twice; {name} slots=2 runs two ranks on it")
        slots[name] = count
        if len(set(slots.values())) > 1:
            raise ValueError(f"{where}: {line!r}, but every host runs the same number of ranks: "
                             "give all lines the same slots")
    if not slots:
        raise ValueError(f"{source} names no host")
    return list(slots), next(iter(slots.values()))


def read_host(line: str, where: str) -> tuple[str, int | None]:
    """Name and number of ranks of a line that is not empty; `where` is its file and number."""
    name, rest = re.fullmatch(r"([^\s:]*)(.*)", line).groups()
    if name.startswith("[") or line.split()[0].count(":") > 1:
        raise ValueError(f"{where}: {line!r} has an IPv6 address, but ranks connect over IPv4: "
                         "give the host's name or its IPv4 address")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{where}: {name!r} is no host name: give one name or IPv4 address a "
                         "line, without user; `scontrol show hostnames` expands Slurm's lists")
    slots = re.fullmatch(r"(?:(?:\s+slots=|:)([1-9][0-9]*))?", rest)
    if not slots:
        raise ValueError(f"{where}: {rest.strip()!r} is no number of ranks: give {name} slots=N or "
                         f"{name}:N with N of at least 1, or {name} alone")
    return name, int(slots[1]) if slots[1] else None


def read_hosts_file(path: str) -> tuple[list[str], int | None]:
    return read_hosts(Path(path).read_text(encoding="utf-8", errors="replace"), path)


def resolve(host: str) -> str:
    """The IPv4 address of a host, or "" if it is unknown."""
    with suppress(OSError, UnicodeError):
        return socket.gethostbyname(host)
    return ""


def is_this_machine(host: str) -> bool:
    """Is `host` this machine's name, with or without a domain, or one of its addresses?"""
    name, own = host.lower(), socket.gethostname().lower()
    with_domain = "." in name and "." in own
    if name in ("localhost", own) or not with_domain and name.split(".")[0] == own.split(".")[0]:
        return True
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((resolve(host) or "unknown", 0))  # fails for the addresses of other machines
        return True
    return False


def check_hosts(hosts: Sequence[str], ssh: str, python: str, data: str,
                timeout_s: int = 25) -> None:
    """Raises ValueError that names every host without login, Python environment or data folder.

    All hosts are asked at once; mpirun alone may take minutes until it gives up.
    """
    wanted = f"test -x {shlex.quote(os.path.abspath(python))}"
    if os.path.isdir(data):  # the corpus is prepared, so every host has to see it
        wanted += f" && test -d {shlex.quote(os.path.abspath(data))}"
    command = [ssh, "-o", "BatchMode=yes", "-o", "ConnectTimeout=20"]
    checks = {host: subprocess.Popen([*command, host, wanted], stdin=subprocess.DEVNULL)
              for host in hosts}
    until, failed = time.monotonic() + timeout_s, []
    for host, check in checks.items():
        try:
            status = check.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            check.kill()
            status = NO_ANSWER
        if status:
            failed.append(f"{host} (status {status})")
    if failed:
        raise ValueError(f"{ssh} finds these hosts unusable: {', '.join(failed)}; status 1: "
                         f"`{wanted}` fails, {NO_ANSWER}: no answer, 255: no login")


# ---- corpus and output ---------------------------------------------------------------------------


class Run(NamedTuple):
    """Corpus and output of a run; `run.sh` prepares, scores and transcribes by these."""

    data: str
    out: str
    dev_split: str
    splits: list[str]  # for training, then for evaluation
    needs_corpus: bool
    arguments: list[str]  # for train.py
    state: str  # whether it is resumed, and why


def choose_run(env: Mapping[str, str], argv: Sequence[str]) -> Run:
    """Corpus and output by the knobs; train.py's flags among `argv` win.

    A run that begins from a checkpoint has the preset of that checkpoint, unless `argv` names one.
    """
    parser = argparse.ArgumentParser(prog="run.sh", allow_abbrev=False, add_help=False)
    for name in ("--data", "--out", "--dev-split", "--init"):
        parser.add_argument(name)
    parser.add_argument("--train-splits", nargs="+")
    flags, _ = parser.parse_known_args(argv)
    train_splits, dev_split, preset = CORPORA[env["CORPUS"]]
    known = {*train_splits, dev_split}
    data, out = flags.data or env["DATA"], flags.out or env["OUT"]
    dev_split = flags.dev_split or dev_split

    # train.py refuses to overwrite a run, so a second call continues it.
    resume, state = [], "new run"
    checkpoints = Path(out).glob(f"checkpoint-{'[0-9]' * 8}.pt")
    if any(checkpoints) or Path(out, "best.pt").exists():
        resume, state = ["--resume"], "has a checkpoint, so --resume"
    for word in argv:
        if word in ("--resume", "--no-resume", "--restart"):
            resume, state = [], f"{word} as you say"

    # The user's own splits are taken as they are, and so are own folders of CORPORA's splits if all
    # exist. Otherwise prepare.py checks whether the corpus is complete.
    splits = [*(flags.train_splits or train_splits), dev_split]
    is_there = all(Path(data, split).is_dir() for split in splits)
    is_own = flags.data or flags.train_splits or flags.dev_split
    needs_corpus = not known.isdisjoint(splits) and not (is_there and is_own)
    arguments = ["--data", data, "--train-splits", *train_splits, "--dev-split", dev_split,
                 "--out", out, *([] if flags.init else ["--preset", preset]), *resume]
    return Run(data, out, dev_split, splits, needs_corpus, arguments, state)


# ---- machine and launcher ------------------------------------------------------------------------


class Machine(NamedTuple):
    """Facts about this machine and its software."""

    num_cpus: int  # that this process may use; batch systems and containers narrow them
    cores: list[Core]
    quota: int | None  # see cpu_quota
    mpirun: str = ""  # path, "" if there is none
    mpi_version: str = ""
    has_bindings: bool = False  # of oneCCL
    preload: str = ""
    port: int = 29500


def read_machine(env: Mapping[str, str]) -> Machine:
    cpus = list(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        cpus = list(os.sched_getaffinity(0))
    venv = env["VENV"]
    mpirun = shutil.which("mpirun", path=env.get("PATH")) or ""
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True,
                             errors="replace").stdout if mpirun else ""
    return Machine(
        len(cpus), read_cores(cpus),
        cpu_quota(read_text(Path("/proc/self/cgroup")), Path(env.get("CGROUPS", "/sys/fs/cgroup"))),
        mpirun=mpirun, mpi_version=version,
        has_bindings=env["BACKEND"] == "auto" and try_bindings(Path(venv)),
        preload=find_preload([venv, env.get("CONDA_PREFIX"), env.get("CMPLR_ROOT")]),
        port=random.randrange(20000, 30000),  # below the ports that Linux gives to connections
    )


def try_bindings(venv: Path) -> bool:
    """Can oneCCL's bindings be imported? They fit one version of torch only."""
    is_installed = any(venv.glob(f"lib/python3*/site-packages/{BINDINGS}"))
    command = [f"{venv}/bin/python", "-c", f"import torch, {BINDINGS}"]
    return is_installed and subprocess.run(command).returncode == 0


def find_preload(folders: Sequence[str | None]) -> str:
    """LD_PRELOAD: Intel's OpenMP and one allocator, as far as `folders` or the system has them."""

    def find(name: str) -> str:
        for folder in filter(None, folders):
            for path in sorted(Path(folder, "lib").glob(f"lib{name}.so*")):
                return str(path.resolve())
        return find_library(name) or ""

    allocators = filter(None, map(find, ALLOCATORS))
    return ":".join(filter(None, (find(OPENMP), next(allocators, ""))))


def check_addresses(names: Iterable[str], source: str) -> None:
    """Raises ValueError if a name leads to a loopback address, as Debian's /etc/hosts does for a
    machine's own name."""
    for name in names:
        if (found := resolve(name)).startswith("127."):
            raise ValueError(f"{source}: {name} is {found} here, where no other host reaches it; "
                             "give its address")


class Group(NamedTuple):
    """The ranks of one run and what they may use of each host."""

    hosts: list[str]
    ranks: int  # that share the cores of a host
    world: int  # all ranks
    is_single: bool  # all ranks are on this machine
    shares_batch: bool  # all ranks together take the batch of one
    address: str  # of rank 0
    port: int  # where rank 0 listens
    usable: int  # cores of each host
    summary: str  # number of ranks and hosts, for the reader
    place: dict[str, str]  # variables of the rank that this process becomes, if it is only one


def choose_ranks(env: Mapping[str, str], machine: Machine) -> Group:
    """Hosts and ranks by the knobs and the hosts file; address of rank 0."""
    hosts, slots = read_hosts_file(env["HOSTS"])
    is_single = len(hosts) == 1 and is_this_machine(hosts[0])
    # A quota limits how many cores the ranks may use, but does not say which.
    usable = min(machine.quota or len(machine.cores), len(machine.cores))
    wanted = int(env["RANKS"] or 0) or slots
    # The threads of one rank would wait for each other at every frame of an LSTM, and for a long
    # time beside another process. Two ranks wait once a step.
    is_free = not wanted and not env.get("OMP_NUM_THREADS")
    shares_batch = is_free and is_single and usable == len(machine.cores) == 2
    ranks = wanted or (2 if shares_batch else default_ranks(machine.cores))
    summary = f"{ranks} on {', '.join(hosts)}" + (", which share a batch" if shares_batch else "")
    if slots not in (None, ranks):
        summary += f" (RANKS={ranks} wins over slots={slots} in {env['HOSTS']})"
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if is_single else hosts[0])
    if not is_single:
        check_addresses((address, *hosts[1:]), env["HOSTS"])
    world = ranks * len(hosts)
    # The variables of a batch job of several tasks would make a single process one of several.
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} if world == 1 else {}
    return Group(hosts, ranks, world, is_single, shares_batch, address, machine.port, usable,
                 summary, place)


def count_tasks(env: Mapping[str, str]) -> int:
    """Number of tasks of the Slurm step that this process belongs to; 1 outside of a step.

    A batch script knows the number of its job's tasks, but runs once: it belongs to no step.
    """
    if "SLURM_STEP_ID" not in env:
        return 1
    return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)


def choose_slurm_ranks(env: Mapping[str, str], machine: Machine) -> Group:
    """`srun bash run.sh` has started this process in each of its tasks: each task is a rank."""
    tasks = count_tasks(env)
    for name, default in (("LAUNCHER", "auto"), ("RANKS", "")):
        if env[name] != default:
            raise ValueError(f"{name}={env[name]}, but srun started {tasks} tasks, each of which "
                             f"is a rank: leave {name} unset, or start run.sh as one task")
    # Slurm writes lists such as node[01-03,07]-ib,other.
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
    first = "".join(re.match(r"([^,\[]+)(?:\[(\d+)[^]]*\]([^,\[]*))?", nodes).groups(default=""))
    is_single = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1) == 1
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if is_single else first)
    if not is_single:
        check_addresses([address], "MASTER_ADDR")
    # All tasks have to find the same port.
    port = 20000 + (31 * int(env.get("SLURM_JOB_ID") or 0) + int(env["SLURM_STEP_ID"])) % 10000
    # Slurm need not bind a task to its CPUs.
    limits = (machine.quota, int(env.get("SLURM_CPUS_PER_TASK") or 0), len(machine.cores))
    place = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": str(tasks),
             "LOCAL_RANK": env.get("SLURM_LOCALID", "0")}
    return Group([nodes], 1, tasks, is_single, False, address, port, min(filter(None, limits)),
                 f"{tasks} on {nodes}", place)


def choose_launcher(requested: str, group: Group, machine: Machine) -> tuple[str, str]:
    """Launcher (python, torchrun, ipex or the name of an MPI) and reason."""
    launcher, reason = requested, AS_SET
    if requested == "auto":
        if group.world == 1 and group.is_single:
            return "python", "one process needs no launcher"
        if group.shares_batch:  # a foreign mpirun must not stop the default
            return "torchrun", "all ranks are on this machine"
        launcher, reason = "mpirun", machine.mpirun
        if not machine.mpirun:
            launcher, reason = "torchrun", "there is no mpirun"
    if launcher == "mpirun" and not machine.mpirun:
        raise ValueError("LAUNCHER=mpirun, but there is no mpirun on the PATH; pip install impi-rt "
                         "brings one")
    if launcher != "mpirun":
        if not group.is_single:
            raise ValueError(f"{launcher} starts ranks on this machine alone; other hosts need an "
                             "mpirun, and pip install impi-rt brings one")
        return launcher, reason
    for mark, kind in (("Intel(R) MPI", "Intel MPI"), ("Open MPI", "Open MPI"),
                       ("OpenRTE", "Open MPI"), ("HYDRA", "MPICH")):
        if mark in machine.mpi_version:
            return kind, reason
    raise ValueError("mpirun is neither Intel MPI nor Open MPI nor MPICH")


def choose_backend(env: Mapping[str, str], machine: Machine, group: Group,
                   launcher: str) -> tuple[str, str]:
    """Backend of torch.distributed and reason."""
    if env["BACKEND"] != "auto":
        return env["BACKEND"], AS_SET
    if launcher == "srun":
        return "gloo", "oneCCL needs an mpirun"
    if group.shares_batch:
        return "gloo", "a worker of oneCCL would take a core"
    if machine.has_bindings:
        return "ccl", f"{BINDINGS} is usable in {env['VENV']}"
    return "gloo", f"{BINDINGS} is not usable in {env['VENV']}"


# ---- the launch ----------------------------------------------------------------------------------


def rank_variables(env: Mapping[str, str], machine: Machine, group: Group, launcher: str,
                   backend: str) -> list[tuple[str, str, str]]:
    """Name, value and reason of each variable of the ranks. A value that the user has set wins; a
    variable without any value is left out."""
    ranks, usable = group.ranks, group.usable
    # Rank i begins at core i * usable / ranks, so that with one rank for each of equal NUMA nodes
    # no rank reaches over two.
    firsts = [rank * usable // ranks for rank in range(ranks)]
    own = [[core.cpu for core in machine.cores[first:first + max(usable // ranks, 1)]]
           for first in firsts]  # CPUs of each rank
    # Ranks that a quota bound to the first cores would collide with those of other containers.
    is_bound = usable == len(machine.cores) and ranks <= usable
    workers = 0
    if group.world > 1 and backend == "ccl":
        workers = int(env.get("CCL_WORKER_COUNT") or 1)
    # oneCCL's threads get the first cores of a rank, and the others compute; a rank that has too
    # few cores for that computes on all of them.
    reserved = workers if workers < len(own[0]) else 0
    computing = [cpus[reserved:] for cpus in own]
    masks = "".join(hex(sum(1 << cpu for cpu in cpus)) + "," for cpus in computing)
    if not is_bound or launcher == "srun":  # which gives each task CPUs of its own
        masks = ""
    # Only Intel's OpenMP reads KMP_*; Intel's launcher sets the same values. A waiting thread goes
    # to sleep after 1 ms, because other threads need its core.
    variables = [
        ("OMP_NUM_THREADS", len(computing[0]),
         f"{usable} cores / {ranks}, less {reserved} for oneCCL"),
        ("KMP_AFFINITY", "granularity=fine,compact,1,0" if is_bound else "", "one thread a core"),
        ("KMP_BLOCKTIME", 1, "ms"),
        ("LD_PRELOAD", machine.preload, "found"),
    ]
    if group.world > 1:
        variables += [
            # Intel MPI binds each rank to its mask; ranks.py does so under other launchers.
            ("I_MPI_PIN_DOMAIN", masks and f"[{masks}]", "cores of each rank"),
            ("MASTER_ADDR", group.address, "host of rank 0"),
            ("MASTER_PORT", group.port, "where rank 0 listens"),
        ]
    if workers:
        cpus = ",".join(str(cpu) for cpus in own for cpu in (cpus * workers)[:workers])
        shared = "" if reserved else ", on cores that compute too"
        variables += [
            ("CCL_WORKER_COUNT", workers, f"threads of oneCCL in each rank{shared}"),
            ("CCL_WORKER_AFFINITY", cpus, "the first cores of each rank"),
        ]
    if launcher == "torchrun":
        variables.append(("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 110,
                          "s for a step and its checkpoint; torchrun's own are 30"))
    decided = [(name, env[name], AS_SET) if env.get(name) else (name, str(value), reason)
               for name, value, reason in variables]
    return [row for row in decided if row[1]]


def start_command(launcher: str, env: Mapping[str, str], group: Group, port: str,
                  variables: Mapping[str, str]) -> list[str]:
    """The launch command up to train.py."""
    python, ssh = f"{env['VENV']}/bin/python", env["SSH"]
    world, ranks = str(group.world), str(group.ranks)
    hosts = ["localhost"] if group.is_single else group.hosts
    if launcher == "torchrun":
        # --standalone would look up this machine's own name, which may take minutes.
        return [python, "-m", "tools.torchrun", "--nnodes", "1", "--nproc-per-node", ranks,
                "--master-addr", group.address, "--master-port", port]
    if launcher == "ipex":
        workers = variables.get("CCL_WORKER_COUNT", "0")
        options = ["--nnodes", "1", "--nprocs-per-node", ranks, "--ccl-worker-count", workers]
        return ["ipexrun", *(options if group.world > 1 else [])]
    if launcher in ("Intel MPI", "MPICH"):
        bootstrap = [] if ssh == "ssh" else ["-bootstrap", "ssh", "-bootstrap-exec", ssh]
        return ["mpirun", "-n", world, "-ppn", ranks, "-hosts", ",".join(hosts), *bootstrap, python]
    if launcher == "Open MPI":
        # Open MPI passes on only the variables that it is told to.
        names = [*variables, STATUS_FILE]
        names += [name for name in sorted(env) if name.startswith(PASSED_ON) and name not in names]
        return ["mpirun", "-n", world, "--host", ",".join(f"{host}:{ranks}" for host in hosts),
                "--map-by", f"ppr:{ranks}:node", "--bind-to", "none", "--mca", "plm_rsh_agent", ssh,
                *(argument for name in names for argument in ("-x", name)), python]
    return [python]


class Plan(NamedTuple):
    lines: list[str]  # every decision with its reason
    run: Run
    group: Group
    command: list[str]  # the launch with its environment, for run.sh to start
    is_first: bool  # False for the tasks of srun that neither print nor score


def decide(env: Mapping[str, str], argv: Sequence[str], machine: Machine) -> Plan:
    """All decisions between the knobs and the launch command; `argv` is for train.py.

    Raises ValueError if the knobs ask for something that cannot be.
    """
    check_knobs(env)
    run = choose_run(env, argv)
    if count_tasks(env) > 1:
        group = choose_slurm_ranks(env, machine)
        launcher, why_launcher = "srun", f"each of its tasks is a rank; {env['HOSTS']} is not read"
    else:
        group = choose_ranks(env, machine)
        launcher, why_launcher = choose_launcher(env["LAUNCHER"], group, machine)
    backend, why_backend = choose_backend(env, machine, group, launcher)
    rows = rank_variables(env, machine, group, launcher, backend)
    variables = {name: value for name, value, _ in rows}

    port = env.get("MASTER_PORT") or str(group.port)
    launch = start_command(launcher, env, group, port, variables) + ["train.py", *run.arguments]
    if group.world > 1:
        launch += ["--ranks", str(group.world)]
    if group.shares_batch:
        launch += ["--share-batch"]
    if group.world > 1 or why_backend == AS_SET:
        launch += ["--backend", backend]
    launch += argv
    if launcher == "ipex":  # ipexrun gives its arguments to a shell
        launch = [shlex.quote(word) for word in launch]

    num_nodes = len({core.node for core in machine.cores})
    granted = "" if machine.quota is None else f", time of {machine.quota} granted"
    lines = [f"corpus  {' '.join(run.splits)} in {run.data}",
             f"output  {run.out} ({run.state})",
             f"cores   {len(machine.cores)} physical in {num_nodes} NUMA nodes behind "
             f"{machine.num_cpus} usable CPUs{granted}",
             f"ranks   {group.summary}, by {launcher} ({why_launcher})",
             *([f"backend {backend} ({why_backend})"] if group.world > 1 else []),
             *(f"set     {name}={value}  ({reason})" for name, value, reason in rows),
             f"launch  {shlex.join(launch)}"]

    variables |= group.place
    # A batch job may set one rank for all processes that it starts.
    command = ["env", "-u", "RANK", "-u", "WORLD_SIZE", "-u", "LOCAL_RANK",
               *(f"{name}={value}" for name, value in variables.items()), *launch]
    if launcher not in ("python", "srun"):  # these return the status of training
        command = [f"{env['VENV']}/bin/python", "-m", "tools.launch", "run", *command]
    return Plan(lines, run, group, command, group.place.get("RANK", "0") == "0")


def run_command(command: Sequence[str]) -> int:
    """Runs a launch command and returns the exit status of training.

    Launchers change that status: torchrun returns 1 after any error, ipexrun always returns 0. So
    rank 0 writes it to a file; the launcher's status counts if rank 0 wrote none or 0.
    """
    # run.sh signals this process together with the launcher; this process waits for the launcher.
    # The launcher would inherit SIG_IGN, but it does not inherit a handler.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    # mpirun may end before rank 0 does, which then finds no folder to leave a file in.
    with tempfile.TemporaryDirectory(prefix="rnnt-") as folder:
        path = Path(folder, "status")
        status = subprocess.run(command, env=os.environ | {STATUS_FILE: str(path)}).returncode
        recorded = read_text(path).strip()
    if not recorded and status == 0:
        print("run.sh: the launcher ended with status 0, but rank 0 wrote no exit status on this "
              "host", file=sys.stderr)
        return 1
    return int(recorded or 0) or (status if status >= 0 else 128 - status)


def check_knobs(env: Mapping[str, str]) -> None:
    for name, choices in CHOICES.items():
        if env[name] not in choices:
            expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ValueError(f"{name}={env[name]}, expected {expected}")
    for name in ("RANKS", "CCL_WORKER_COUNT"):
        if not re.fullmatch("([1-9][0-9]*)?", env.get(name, "")):
            raise ValueError(f"{name}={env[name]}, expected a positive number")


def main(argv: Sequence[str]) -> int:
    task, *rest = argv
    env = dict(os.environ)
    if task == "run":
        return run_command(rest)
    if task == "check":
        check_knobs(env)
        if count_tasks(env) == 1:  # the tasks of srun run where the batch system says
            read_hosts_file(env["HOSTS"])
        return 0
    path, *flags = rest
    plan = decide(env, flags, read_machine(env))
    if plan.is_first:
        print("\n".join(plan.lines), flush=True)
    # A batch system may start processes on hosts that ssh may not reach.
    is_ssh = env.get("I_MPI_HYDRA_BOOTSTRAP", "ssh") == "ssh" and count_tasks(env) == 1
    if env["DRY_RUN"] == "0" and is_ssh and not plan.group.is_single:
        check_hosts(plan.group.hosts, env["SSH"], f"{env['VENV']}/bin/python", plan.run.data)
    run = plan.run
    fields = [run.data, run.out, run.dev_split, str(plan.group.usable),
              "prepare" if run.needs_corpus else "", "score" if plan.is_first else "",
              *plan.command]
    Path(path).write_bytes(b"".join(os.fsencode(field) + b"\0" for field in fields))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:
        raise  # tools/__init__.py ends the process
    except (OSError, ValueError) as error:
        print(f"run.sh: {error}", file=sys.stderr)
        sys.exit(2)
