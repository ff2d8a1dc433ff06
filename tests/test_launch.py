# SPDX-License-Identifier: Apache-2.0
"""Decisions of tools/launch.py about cores, hosts, launcher, backend and environment.

    python -m pytest tests/test_launch.py

The functions get a machine as data; nothing is launched. Expected values for two sockets of 52
cores are those of Intel's launcher.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from launched import write_script
from tones import REPO

from tools import launch
from tools.launch import Core, Machine

KNOBS = {"RANKS": "", "LAUNCHER": "auto", "BACKEND": "auto", "SSH": "ssh", "VENV": ".venv",
         "CORPUS": "demo", "DATA": "data/demo", "OUT": "out/demo", "CGROUPS": "none",
         "DRY_RUN": "1"}
TRAIN = ("train.py --data data/demo --train-splits train-demo --dev-split dev-demo"
         " --out out/demo --preset demo")
VERSIONS = {
    "Intel MPI": "Intel(R) MPI Library for Linux* OS, Version 2021.18 Build 20260626",
    "Open MPI": "mpirun (Open MPI) 4.1.4",
    "MPICH": "HYDRA build details:\n    Version: 4.0.2",
}


@pytest.fixture(autouse=True)
def resolved(monkeypatch):
    """Host names -> addresses, instead of a name server."""
    names = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1"}
    monkeypatch.setattr(launch, "resolve", lambda host: names.get(host, ""))
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cores_of(sockets, cores, cpus=None):
    """CPU n is core n; each socket is a NUMA node."""
    return [Core(cpu // cores, cpu) for cpu in cpus or range(sockets * cores)]


def machine(cores=None, mpi="", **facts):
    cores = cores or cores_of(1, 4)
    mpirun = "/opt/mpirun" if mpi else ""
    facts = {"quota": None, "port": 4711, **facts}
    return Machine(2 * len(cores), cores, mpirun=mpirun,
                   mpi_version=VERSIONS.get(mpi, ""), **facts)


def plan_of(there, *argv, hosts="localhost\n", **env):
    Path("hosts").write_text(hosts)
    return launch.decide({**KNOBS, "HOSTS": "hosts", **env}, list(argv), there)


def decide(there, *argv, **env):
    """Maps the printed lines: NAME -> value of `set` lines, other words -> rest of the line."""
    printed = {}
    for line in plan_of(there, *argv, **env).lines:
        word, rest = line.split(maxsplit=1)
        if word == "set":
            word, rest = rest.split("  (")[0].split("=", 1)
        printed[word] = rest
    return printed


def launcher_of(there, **env):
    """The launch command up to train.py."""
    return decide(there, **env)["launch"].split(" train.py")[0]


# ---- cores ------------------------------------------------------------------------------------


def write_kernel_files(folder, rows):
    """Rows of CPU, its siblings and its NUMA node, as /sys/devices/system/cpu shows them."""
    for cpu, siblings, node in rows:
        (folder / f"cpu{cpu}/topology").mkdir(parents=True)
        (folder / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{siblings}\n")
        (folder / f"cpu{cpu}/node{node}").mkdir()


def write_quota(group, quota, is_version_1):
    """Writes how many of 100000 microseconds a control group may compute, as the kernel does."""
    group.mkdir(parents=True, exist_ok=True)
    if is_version_1:
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")
    else:
        (group / "cpu.max").write_text(f"{quota} 100000\n")


@pytest.mark.parametrize(
    ("siblings", "cpus", "expected"),
    [
        # Two sockets of four cores; second threads come after all cores, or beside their own.
        (lambda cpu: f"{cpu % 8},{cpu % 8 + 8}", range(16), [0, 1, 2, 3, 4, 5, 6, 7]),
        (lambda cpu: f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}", range(16), [0, 2, 4, 6, 8, 10, 12, 14]),
        (lambda cpu: f"{cpu % 8},{cpu % 8 + 8}", range(8, 16), [8, 9, 10, 11, 12, 13, 14, 15]),
        (lambda cpu: f"{cpu % 8},{cpu % 8 + 8}", [3, 9, 11, 12], [3, 9, 12]),
    ],
)
def test_first_allowed_cpu_stands_for_a_core(folder, siblings, cpus, expected):
    write_kernel_files(folder, [(cpu, siblings(cpu), 0) for cpu in range(16)])
    assert launch.read_cores(cpus, folder) == [Core(0, cpu) for cpu in expected]


def test_cores_come_numa_node_by_numa_node(folder):
    write_kernel_files(folder, [(0, 0, 1), (1, 1, 0), (2, 2, 1), (3, 3, 0)])
    assert launch.read_cores(range(4), folder) == [(0, 1), (0, 3), (1, 0), (1, 2)]


def test_machine_without_kernel_files_has_one_node_of_cores(folder):
    assert launch.read_cores(range(4), folder) == [Core(0, cpu) for cpu in range(4)]


def test_machine_has_the_cpus_of_its_affinity_and_the_quota_of_its_group(monkeypatch, folder):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1}, raising=False)
    write_quota(folder / "cpu", 150_000, is_version_1=True)
    machine = launch.read_machine({**KNOBS, "VENV": str(folder), "CGROUPS": str(folder)})
    assert (machine.num_cpus, [core.cpu for core in machine.cores], machine.quota) == (1, [1], 2)


def test_machine_without_affinity_has_all_cpus(monkeypatch, folder):
    """macOS has neither affinity nor /sys nor /proc."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert launch.read_machine({**KNOBS, "VENV": str(folder)}).num_cpus == 3


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "domains"),
    [
        (cores_of(1, 16), "", 16, None),
        (cores_of(1, 16), "2", 8, "[0xff,0xff00,]"),
        (cores_of(1, 5), "2", 2, "[0x3,0xc,]"),  # one core is left over
        (cores_of(4, 8), "", 8, "[0xff,0xff00,0xff0000,0xff000000,]"),
        (cores_of(2, 5), "4", 2, "[0x3,0xc,0x60,0x180,]"),  # no rank reaches over two sockets
        ([Core(cpu // 8, cpu) for cpu in range(0, 16, 2)], "", 4, "[0x55,0x5500,]"),
        (cores_of(2, 16, range(6)), "", 6, None),  # a cpuset on one socket
        (cores_of(2, 16, range(13, 19)), "", 3, "[0xe000,0x70000,]"),  # and on both
        (cores_of(2, 16, [3, 5, 7, 8, 20, 29, 30, 31]), "", 4, "[0x1a8,0xe0100000,]"),
        (cores_of(2, 16, range(13, 21)), "", 8, None),  # three cores of one, five of the other
    ],
)
def test_ranks_threads_and_masks(cores, ranks, threads, domains):
    printed = decide(machine(cores), RANKS=ranks)
    assert printed["OMP_NUM_THREADS"] == str(threads)
    assert printed.get("I_MPI_PIN_DOMAIN") == domains
    expected = 1 if domains is None else domains.count("0x")
    assert printed["ranks"].split()[0] == str(expected)


def test_more_ranks_than_cores_share_them_unbound():
    printed = decide(machine(cores_of(1, 2)), RANKS="8")
    assert printed["OMP_NUM_THREADS"] == "1"
    assert not {"I_MPI_PIN_DOMAIN", "KMP_AFFINITY"} & set(printed)


@pytest.mark.parametrize(("quota", "threads", "bound"), [(3, 3, False), (9, 8, True)])
def test_quota_limits_threads_and_leaves_them_unbound(quota, threads, bound):
    printed = decide(machine(cores_of(1, 8), quota=quota))
    assert printed["OMP_NUM_THREADS"] == str(threads)
    assert ("KMP_AFFINITY" in printed) == bound
    assert printed["cores"].endswith(f", time of {quota} granted")


@pytest.mark.parametrize(
    ("membership", "quotas", "expected"),
    [
        ("0::/job/step\n", {"job/step": "max"}, None),
        ("0::/job/step\n", {"job/step": "250000"}, 3),
        ("0::/job/step\n", {".": "400000", "job": "200000", "job/step": "500000"}, 2),
        ("0::/not/seen/from/here\n", {".": "200000"}, 2),
        ("4:cpu,cpuacct:/docker/1\n", {"cpu/docker/1": "200000"}, 2),
        # The container sees its group as the root.
        ("4:cpuacct,cpu:/docker/1\n0::/\n", {"cpu": "150000"}, 2),
        ("1:cpu:/\n", {"cpu": "-1"}, None),
        ("2:cpuset:/\n", {}, None),
        ("", {}, None),  # macOS
    ],
)
def test_quota_of_control_groups(folder, membership, quotas, expected):
    """`quotas` has the quota of each folder; those below `cpu` are of version 1."""
    for group, quota in quotas.items():
        write_quota(folder / group, quota, is_version_1=group.startswith("cpu"))
    assert launch.cpu_quota(membership, folder) == expected


# ---- all decisions of a run -------------------------------------------------------------------


def test_decisions_of_the_default():
    plan = plan_of(machine())
    assert plan.lines == [
        "corpus  train-demo dev-demo in data/demo",
        "output  out/demo (new run)",
        "cores   4 physical in 1 NUMA nodes behind 8 usable CPUs",
        "ranks   1 on localhost, by python (one process needs no launcher)",
        "set     OMP_NUM_THREADS=4  (4 cores / 1, less 0 for oneCCL)",
        "set     KMP_AFFINITY=granularity=fine,compact,1,0  (one thread a core)",
        "set     KMP_BLOCKTIME=1  (ms)",
        f"launch  .venv/bin/python {TRAIN}",
    ]
    # The variables of a batch job of several tasks would make a single process one of several.
    assert plan.command[10:14] == ["RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", ".venv/bin/python"]


def test_decisions_of_two_ranks():
    plan = plan_of(machine(), RANKS="2", MASTER_PORT="4712")
    assert plan.lines[3:] == [
        "ranks   2 on localhost, by torchrun (there is no mpirun)",
        "backend gloo (oneccl_bindings_for_pytorch is not usable in .venv)",
        "set     OMP_NUM_THREADS=2  (4 cores / 2, less 0 for oneCCL)",
        "set     KMP_AFFINITY=granularity=fine,compact,1,0  (one thread a core)",
        "set     KMP_BLOCKTIME=1  (ms)",
        "set     I_MPI_PIN_DOMAIN=[0x3,0xc,]  (cores of each rank)",
        "set     MASTER_ADDR=127.0.0.1  (host of rank 0)",
        "set     MASTER_PORT=4712  (as you set it)",
        "set     TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  (s for a step and its checkpoint; "
        "torchrun's own are 30)",
        "launch  .venv/bin/python -m tools.torchrun --nnodes 1 --nproc-per-node 2"
        f" --master-addr 127.0.0.1 --master-port 4712 {TRAIN} --ranks 2 --backend gloo",
    ]
    assert plan.command[:4] == [".venv/bin/python", "-m", "tools.launch", "run"]
    assert not [word for word in plan.command if word.startswith(("RANK=", "WORLD_SIZE="))]


@pytest.mark.parametrize("there", [
    machine(cores_of(1, 2)), machine(cores_of(2, 1), mpi="Open MPI", has_bindings=True),
])
def test_two_ranks_share_the_batch_on_two_cores(there):
    plan = plan_of(there)
    assert plan.lines[3] == ("ranks   2 on localhost, which share a batch, by torchrun "
                             "(all ranks are on this machine)")
    assert "set     OMP_NUM_THREADS=1  (2 cores / 2, less 0 for oneCCL)" in plan.lines
    assert plan.lines[-1].endswith("--ranks 2 --share-batch --backend gloo")


@pytest.mark.parametrize(("cores", "knobs", "hosts", "ranks"), [
    (2, {"RANKS": "1"}, "localhost", 1), (2, {"RANKS": "2"}, "localhost", 2),
    (2, {}, "localhost slots=2", 2), (1, {}, "localhost", 1), (3, {}, "localhost", 1),
    (2, {"OMP_NUM_THREADS": "2"}, "localhost", 1),
    (2, {}, "node1\nnode2", 2),
])
def test_ranks_have_batches_of_their_own(cores, knobs, hosts, ranks, resolved):
    resolved |= {"node1": "10.0.0.1", "node2": "10.0.0.2"}
    plan = plan_of(machine(cores_of(1, cores), mpi="Intel MPI"), hosts=hosts, **knobs)
    assert plan.group.world == ranks
    assert "--share-batch" not in plan.command


def test_two_sockets_of_52_cores_as_intels_launcher():
    there = machine(cores_of(2, 52), mpi="Intel MPI", preload="/lib/libiomp5.so")
    assert decide(there, BACKEND="ccl", CCL_WORKER_COUNT="4") == {
        "corpus": "train-demo dev-demo in data/demo",
        "output": "out/demo (new run)",
        "cores": "104 physical in 2 NUMA nodes behind 208 usable CPUs",
        "ranks": "2 on localhost, by Intel MPI (/opt/mpirun)",
        "backend": "ccl (as you set it)",
        "OMP_NUM_THREADS": "48",
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
        "KMP_BLOCKTIME": "1",
        "LD_PRELOAD": "/lib/libiomp5.so",
        "I_MPI_PIN_DOMAIN": "[0xffffffffffff0,0xffffffffffff00000000000000,]",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4711",
        "CCL_WORKER_COUNT": "4",
        "CCL_WORKER_AFFINITY": "0,1,2,3,52,53,54,55",
        "launch": f"mpirun -n 2 -ppn 2 -hosts localhost .venv/bin/python {TRAIN}"
        " --ranks 2 --backend ccl",
    }


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"CORPUS": "timit"}, "CORPUS=timit, expected demo, mini-librispeech, librispeech-100 or "),
        ({"RANKS": "0"}, "RANKS=0, expected a positive number"),
        ({"RANKS": "two"}, "RANKS=two, expected a positive number"),
        ({"LAUNCHER": "srun"}, "LAUNCHER=srun, expected auto, mpirun, torchrun or ipex"),
        ({"BACKEND": "nccl"}, "BACKEND=nccl, expected auto, ccl, gloo or mpi"),
        ({"CCL_WORKER_COUNT": "many"}, "CCL_WORKER_COUNT=many, expected a positive number"),
        ({"DRY_RUN": "true"}, "DRY_RUN=true, expected 0 or 1"),
    ],
)
def test_unknown_value_of_a_knob_is_an_error(knob, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decide(machine(), **knob)


def test_standard_library_is_enough():
    """A dry run happens before the set-up; -S hides all installed packages."""
    env = {**KNOBS, "HOSTS": str(REPO / "hosts")}
    done = subprocess.run([sys.executable, "-S", "-B", "-m", "tools.launch", "decide", os.devnull],
                          cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("launch  .venv/bin/python ")


# ---- the user's environment -------------------------------------------------------------------


@pytest.mark.parametrize("name", launch.VARIABLES)
def test_variable_that_the_user_has_set_wins_and_is_shown_as_theirs(name):
    there = machine(cores_of(2, 8), preload="/lib/libiomp5.so")
    lines = plan_of(there, BACKEND="ccl", **{name: "3"}).lines
    lines = [line for line in lines if line.startswith("set ")]
    assert {line.split()[1].split("=")[0] for line in lines} == set(launch.VARIABLES)
    assert [line for line in lines if "as you set it" in line] == [
        f"set     {name}=3  (as you set it)"]


def test_worker_of_oneccl_shares_a_core_where_none_is_to_spare():
    lines = plan_of(machine(cores_of(1, 2)), RANKS="2", BACKEND="ccl").lines
    assert "set     OMP_NUM_THREADS=1  (2 cores / 2, less 0 for oneCCL)" in lines
    assert "set     I_MPI_PIN_DOMAIN=[0x1,0x2,]  (cores of each rank)" in lines
    assert ("set     CCL_WORKER_COUNT=1  (threads of oneCCL in each rank, on cores that compute "
            "too)") in lines
    assert "set     CCL_WORKER_AFFINITY=0,1  (the first cores of each rank)" in lines


@pytest.mark.parametrize(
    ("in_environment", "in_system", "preloaded"),
    [
        ([], [], ""),
        (["libiomp5.so"], [], "{}/libiomp5.so"),
        ([], ["jemalloc"], "libjemalloc.so.2"),
        (["libiomp5.so", "libtcmalloc.so.4"], ["jemalloc"],
         "{0}/libiomp5.so:{0}/libtcmalloc.so.4"),
    ],
)
def test_openmp_and_one_allocator_are_preloaded(folder, monkeypatch, in_environment, in_system,
                                                preloaded):
    (folder / "lib").mkdir()
    for name in in_environment:
        (folder / "lib" / name).touch()
    monkeypatch.setattr(launch, "find_library",
                        lambda name: f"lib{name}.so.2" if name in in_system else None)
    assert launch.find_preload([str(folder), None]) == preloaded.format(folder / "lib")


def test_backend_is_ccl_where_its_bindings_can_be_imported():
    assert decide(machine(), RANKS="2")["launch"].endswith("--backend gloo")
    there = machine(has_bindings=True)
    assert decide(there, RANKS="2")["backend"] == (
        "ccl (oneccl_bindings_for_pytorch is usable in .venv)")
    assert decide(there, RANKS="2", BACKEND="gloo")["backend"] == "gloo (as you set it)"


@pytest.mark.parametrize("status", [0, 1])
def test_bindings_are_imported_to_see_whether_they_fit(folder, status):
    assert not launch.try_bindings(folder)
    (folder / "lib/python3.11/site-packages/oneccl_bindings_for_pytorch").mkdir(parents=True)
    write_script(folder / "bin/python", f"#!/bin/sh\nexit {status}\n")
    assert launch.try_bindings(folder) == (status == 0)


def test_backend_that_one_rank_does_not_need_reaches_train_py():
    """train.py says what is missing."""
    assert "--backend" not in decide(machine())["launch"]
    assert decide(machine(), BACKEND="ccl")["launch"].endswith(" --preset demo --backend ccl")


# ---- launchers --------------------------------------------------------------------------------


@pytest.mark.parametrize("mpi", ["Intel MPI", "MPICH"])
def test_hydra_takes_hosts_and_ranks_per_host(mpi):
    printed = decide(machine(mpi=mpi), hosts="node1\nnode2\n", RANKS="2")
    assert printed["launch"].startswith(
        "mpirun -n 4 -ppn 2 -hosts node1,node2 .venv/bin/python train.py ")
    assert printed["launch"].endswith(" --ranks 4 --backend gloo")
    assert printed["MASTER_ADDR"] == "node1"
    command = launcher_of(machine(mpi=mpi), hosts="node1\nnode2\n", RANKS="2", SSH="./my-ssh")
    assert command.endswith(" -bootstrap ssh -bootstrap-exec ./my-ssh .venv/bin/python")


def test_open_mpi_takes_slots_and_the_name_of_every_variable():
    there, hosts = machine(mpi="Open MPI"), "node1 slots=2\nnode2 slots=2\n"
    assert launcher_of(there, hosts=hosts) == (
        "mpirun -n 4 --host node1:2,node2:2 --map-by ppr:2:node --bind-to none"
        " --mca plm_rsh_agent ssh -x OMP_NUM_THREADS -x KMP_AFFINITY -x KMP_BLOCKTIME"
        " -x I_MPI_PIN_DOMAIN -x MASTER_ADDR -x MASTER_PORT -x RNNT_STATUS_FILE .venv/bin/python"
    )
    env = {"GLOO_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "1", "OTHER": "1"}
    command = launcher_of(there, hosts=hosts, **env)
    assert command.endswith(" -x RNNT_STATUS_FILE -x GLOO_SOCKET_IFNAME .venv/bin/python")


def test_missing_or_unknown_mpirun_is_an_error():
    with pytest.raises(ValueError, match="LAUNCHER=mpirun, but there is no mpirun on the PATH"):
        decide(machine(), RANKS="2", LAUNCHER="mpirun")
    with pytest.raises(ValueError, match="mpirun is neither Intel MPI nor Open MPI nor MPICH"):
        decide(machine()._replace(mpirun="/opt/mpirun", mpi_version="mpirun 0.1"), RANKS="2")


def test_torchrun_although_there_is_an_mpirun():
    """torchrun would take this machine's own name, which may take minutes to look up."""
    there = machine(mpi="Intel MPI")
    assert launcher_of(there, LAUNCHER="torchrun", RANKS="2", MASTER_ADDR="10.1.1.1") == (
        ".venv/bin/python -m tools.torchrun --nnodes 1 --nproc-per-node 2"
        " --master-addr 10.1.1.1 --master-port 4711")


@pytest.mark.parametrize(
    ("ranks", "options"), [("1", ""), ("2", " --nnodes 1 --nprocs-per-node 2 --ccl-worker-count 0")]
)
def test_ipexrun(ranks, options):
    """ipexrun gives its arguments to a shell."""
    plan = plan_of(machine(), "--out", "my run", LAUNCHER="ipex", RANKS=ranks)
    assert f"launch  ipexrun{options} train.py --data" in plan.lines[-1]
    assert plan.command[-2:] == ["--out", "'my run'"]


# ---- status of training -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recorded", "launcher", "expected"),
    [
        ("0", 0, 0),
        ("75", 1, 75),  # torchrun makes 1 of any error
        ("143", 0, 143),  # ipexrun makes 0 of everything
        ("0", 7, 7),  # another rank failed
        ("", 5, 5),  # rank 0 never got to its end
        ("", -9, 137),
    ],
)
def test_status_of_rank_0_survives_its_launcher(folder, monkeypatch, recorded, launcher, expected):
    monkeypatch.setattr(launch.tempfile, "tempdir", str(folder))
    end = f"os.kill(os.getpid(), {-launcher})" if launcher < 0 else f"sys.exit({launcher})"
    script = ("import os, sys\n"
              f"if '{recorded}': open(os.environ['RNNT_STATUS_FILE'], 'w').write('{recorded}')\n"
              f"{end}")
    assert launch.run_command([sys.executable, "-c", script]) == expected
    assert list(folder.iterdir()) == []


# ---- hosts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost\n", (["localhost"], None)),
        ("# all\n\n a \nb   # the second\n", (["a", "b"], None)),
        ("a slots=3\nb slots=3", (["a", "b"], 3)),  # no newline at the end
        ("a:3\nb slots=3\n", (["a", "b"], 3)),
        ("a slots=2\r\nb slots=2\r\n", (["a", "b"], 2)),
        ("10.0.0.7:2\nnode-1.example.org slots=2\n", (["10.0.0.7", "node-1.example.org"], 2)),
    ],
)
def test_hosts_file(text, expected):
    assert launch.read_hosts(text, "hosts") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nobody\n", "hosts names no host"),
        ("a\nb,c\n", "hosts:2: 'b,c' is no host name: give one name or IPv4 address a line, "),
        (":2\n", "hosts:1: '' is no host name"),
        ("me@a\n", "hosts:1: 'me@a' is no host name: give one name or IPv4 address a line, without "
         "user; `scontrol show hostnames` expands Slurm's lists"),
        ("node[1-2]\n", "hosts:1: 'node[1-2]' is no host name"),
        ("a slots=0\n", "hosts:1: 'slots=0' is no number of ranks: give a slots=N or a:N with N "
         "of at least 1, or a alone"),
        ("a:0\n", "hosts:1: ':0' is no number of ranks"),
        ("a slots=2 max_slots=2\n", "hosts:1: 'slots=2 max_slots=2' is no number of ranks"),
        ("a slots = 2\n", "hosts:1: 'slots = 2' is no number of ranks"),
        ("fd00::1\n", "hosts:1: 'fd00::1' has an IPv6 address, but ranks connect over IPv4: give "
         "the host's name or its IPv4 address"),
        ("a\n[fd00::1]:2\n", "hosts:2: '[fd00::1]:2' has an IPv6 address"),
        ("a\n\nb\na\n", "hosts:4: a stands twice; a slots=2 runs two ranks on it"),
        ("a slots=2\nb slots=3\n", "hosts:2: 'b slots=3', but every host runs the same number"),
        ("a slots=2\nb\n", "hosts:2: 'b', but every host runs the same number of ranks"),
    ],
)
def test_wrong_hosts_file_is_an_error_that_names_the_line(text, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        launch.read_hosts(text, "hosts")


@pytest.mark.parametrize("hosts", ["localhost\nb\n", "b\n127.0.0.1\n"])
def test_loopback_among_several_hosts_is_an_error(hosts):
    with pytest.raises(ValueError, match="hosts: (localhost|127.0.0.1) is 127.0.0.1 here"):
        decide(machine(mpi="Intel MPI"), hosts=hosts)


def test_ranks_win_over_other_slots_and_the_line_says_so():
    for ranks in ("", "2"):
        assert decide(machine(), hosts="localhost:2\n", RANKS=ranks)["ranks"] == (
            "2 on localhost, by torchrun (there is no mpirun)")
    assert decide(machine(), hosts="localhost:2\n", RANKS="3")["ranks"] == (
        "3 on localhost (RANKS=3 wins over slots=2 in hosts), by torchrun (there is no mpirun)")


@pytest.mark.parametrize("name", ["own", "OWN", "own.cluster.local", "127.0.0.1", "LOCALHOST",
                                  "alias"])
def test_this_machine_by_any_of_its_names_needs_no_mpirun(monkeypatch, resolved, name):
    monkeypatch.setattr(socket, "gethostname", lambda: "own")
    resolved["alias"] = "127.0.0.1"
    printed = decide(machine(), hosts=f"{name}\n", RANKS="2")
    assert printed["ranks"] == f"2 on {name}, by torchrun (there is no mpirun)"
    assert printed["MASTER_ADDR"] == "127.0.0.1"


def test_a_host_of_the_same_name_in_another_domain_is_another_one(monkeypatch, resolved):
    monkeypatch.setattr(socket, "gethostname", lambda: "node1.here.example")
    resolved["node1.there.example"] = "203.0.113.7"  # an address that no machine has
    assert launch.is_this_machine("NODE1")
    assert launch.is_this_machine("node1.here.example")
    assert not launch.is_this_machine("node1.there.example")


def test_other_hosts_need_an_mpirun(resolved):
    resolved["10.0.0.7"] = "203.0.113.7"  # an address for documentation, which no machine has
    with pytest.raises(ValueError, match="^torchrun starts ranks on this machine alone"):
        decide(machine(), hosts="10.0.0.7:2\n")
    printed = decide(machine(mpi="Intel MPI"), hosts="10.0.0.7:2\n")
    assert " -hosts 10.0.0.7 " in printed["launch"]
    assert printed["MASTER_ADDR"] == "10.0.0.7"


def test_first_host_whose_name_leads_to_its_loopback_is_an_error(resolved):
    """Debian's /etc/hosts is like that; the others would look for rank 0 on themselves."""
    resolved.update({"a": "127.0.1.1", "b": "10.0.0.2", "a-eth0": "10.0.0.1"})
    there = machine(mpi="Intel MPI")
    with pytest.raises(ValueError, match="hosts: a is 127.0.1.1 here, where no other host reaches"):
        decide(there, hosts="a\nb\n")
    assert decide(there, hosts="a\nb\n", MASTER_ADDR="a-eth0")["MASTER_ADDR"] == "a-eth0"


@pytest.mark.parametrize("has_corpus", [False, True])
def test_hosts_that_cannot_be_used_are_named(folder, monkeypatch, has_corpus):
    if has_corpus:
        (folder / "my data").mkdir()
    write_script(
        folder / "my-ssh",
        "#!/bin/sh\nhost=$5; shift 5\ncase $host in silent) exec sleep 60 ;; mistyped) exit 255 ;;"
        ' bare) exit 1 ;; empty) set -- $(echo "$*" | sed s,/my,/no,) ;; esac\n'
        'exec sh -c "$*"\n'
    )
    hosts = ["good", "silent", "mistyped", "bare", "empty"]
    failed = "silent (status 124), mistyped (status 255), bare (status 1)"
    failed += ", empty (status 1)" if has_corpus else ""
    # The start, then the time when each host is waited for: none is left for the silent one.
    clock = iter([0, 0, 100, 0, 0, 0])
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(ValueError, match=re.escape(f"finds these hosts unusable: {failed}; ")):
        launch.check_hosts(hosts, "./my-ssh", sys.executable, "my data", timeout_s=100)


# ---- tasks of Slurm ---------------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
       "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[01-02]"}


def test_each_task_of_srun_is_a_rank_on_cpus_of_its_own():
    there = machine(cores_of(2, 8, range(8, 16)), mpi="Intel MPI", has_bindings=True)
    plan = plan_of(there, hosts="not:read:here\n", **JOB, SLURM_STEP_ID="0")
    assert plan.lines[3:] == [
        "ranks   4 on node[01-02], by srun (each of its tasks is a rank; hosts is not read)",
        "backend gloo (oneCCL needs an mpirun)",
        "set     OMP_NUM_THREADS=8  (8 cores / 1, less 0 for oneCCL)",
        "set     KMP_AFFINITY=granularity=fine,compact,1,0  (one thread a core)",
        "set     KMP_BLOCKTIME=1  (ms)",
        "set     MASTER_ADDR=node01  (host of rank 0)",
        "set     MASTER_PORT=20217  (where rank 0 listens)",
        f"launch  .venv/bin/python {TRAIN} --ranks 4 --backend gloo",
    ]
    assert {"RANK=2", "WORLD_SIZE=4", "LOCAL_RANK=0"} < set(plan.command)
    assert plan.command[0] == "env"
    assert not plan.is_first
    assert plan_of(there, **{**JOB, "SLURM_PROCID": "0"}, SLURM_STEP_ID="0").is_first


def test_tasks_of_one_step_take_one_port_and_other_steps_another():
    ports = [decide(machine(), **{**JOB, "SLURM_PROCID": task}, SLURM_STEP_ID=step)["MASTER_PORT"]
             for task, step in (("0", "0"), ("3", "0"), ("0", "1"))]
    assert ports == ["20217", "20217", "20218"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[01-03,07],other", "node01"), ("n7,n8", "n7"), ("c[3,5]-ib", "c3-ib"), ("a-1", "a-1")],
)
def test_rank_0_of_srun_is_on_the_first_node(nodes, first):
    env = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": nodes}
    assert decide(machine(), **env)["MASTER_ADDR"] == first
    assert decide(machine(), **env, SLURM_STEP_NUM_NODES="1")["MASTER_ADDR"] == "127.0.0.1"


def test_first_node_that_is_a_loopback_address_is_an_error(resolved):
    resolved["node01"] = "127.0.1.1"
    with pytest.raises(ValueError, match="^MASTER_ADDR: node01 is 127.0.1.1 here"):
        decide(machine(), **JOB, SLURM_STEP_ID="0")


def test_task_of_srun_that_is_not_bound_takes_the_cpus_that_it_asked_for():
    printed = decide(machine(cores_of(1, 16)), **JOB, SLURM_STEP_ID="0", SLURM_CPUS_PER_TASK="4")
    assert printed["OMP_NUM_THREADS"] == "4"
    assert "KMP_AFFINITY" not in printed


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}])
def test_batch_script_and_a_step_of_one_task_launch_ranks_themselves(step):
    printed = decide(machine(), **JOB, **step, RANKS="2")
    assert printed["ranks"] == "2 on localhost, by torchrun (there is no mpirun)"


@pytest.mark.parametrize(("knob", "value"), [("LAUNCHER", "torchrun"), ("RANKS", "2")])
def test_knobs_that_contradict_srun_are_an_error(knob, value):
    with pytest.raises(ValueError, match=f"^{knob}={value}, but srun started 4 tasks, each of "):
        decide(machine(), **JOB, SLURM_STEP_ID="0", **{knob: value})


def test_the_hosts_file_is_checked_unless_srun_chooses_the_hosts(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("not:a host\n")
    knobs = {name: choices[0] for name, choices in launch.CHOICES.items()}
    monkeypatch.setattr(os, "environ", {**knobs, "RANKS": "", "HOSTS": str(tmp_path / "hosts")})
    with pytest.raises(ValueError, match="hosts:1: "):
        launch.main(["check"])
    os.environ.update(JOB, SLURM_STEP_ID="0")
    assert launch.main(["check"]) == 0


# ---- corpus and output ------------------------------------------------------------------------


def test_three_training_splits_reach_train_py():
    printed = decide(machine(), CORPUS="librispeech-960", DATA="/mnt/speech")
    assert (
        "--data /mnt/speech --train-splits train-clean-100 train-clean-360 train-other-500"
        " --dev-split dev-clean --out out/demo --preset democratized"
    ) in printed["launch"]


@pytest.mark.parametrize(
    ("there", "flags", "is_prepared"),
    [
        (["a", "b", "dev-demo"], ["--train-splits", "a", "b", "--epochs", "1"], False),
        (["a", "dev-demo"], ["--train-splits", "a", "b", "--epochs", "1"], True),
        (["a", "b"], ["--train-splits=a", "--dev-split", "b"], False),
        (["a"], ["--train-splits", "a", "--dev-split", "typo"], False),  # train.py names the typo
        (["train-demo", "dev-demo"], [], False),  # --data alone says whose corpus it is
        (["train-demo"], [], True),
    ],
)
def test_corpus_of_the_user_is_not_prepared(there, flags, is_prepared):
    for name in there:
        Path("corpus", name).mkdir(parents=True)
    assert launch.choose_run(KNOBS, ["--data", "corpus", *flags]).needs_corpus == is_prepared
    # prepare.py knows whether a corpus of its own is complete.
    assert launch.choose_run({**KNOBS, "DATA": "corpus"}, []).needs_corpus


def test_a_run_that_begins_from_a_checkpoint_gets_the_flag():
    command = plan_of(machine(), "--init", "out/other/best.pt").command
    assert command[-2:] == ["--init", "out/other/best.pt"]
    assert not {"--resume", "--preset"} & set(command)  # the preset is the checkpoint's
    Path("out/demo").mkdir(parents=True)
    Path("out/demo/best.pt").touch()
    command = plan_of(machine(), "--init=out/other/best.pt").command
    assert command[-2:] == ["--resume", "--init=out/other/best.pt"]


@pytest.mark.parametrize("name", ["best.pt", "checkpoint-00000012.pt"])
def test_run_with_a_checkpoint_is_resumed(name):
    assert launch.choose_run(KNOBS, []).state == "new run"
    Path("out/demo").mkdir(parents=True)
    Path("out/demo", name).touch()
    run = launch.choose_run(KNOBS, [])
    assert run.state == "has a checkpoint, so --resume"
    assert run.arguments[-1] == "--resume"
    assert launch.choose_run(KNOBS, ["--out", "other"]).state == "new run"
    for flag in ("--resume", "--no-resume", "--restart"):
        run = launch.choose_run(KNOBS, [flag])
        assert run.state == f"{flag} as you say"
        assert "--resume" not in run.arguments
