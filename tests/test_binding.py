# SPDX-License-Identifier: Apache-2.0
"""Ranks, cores, hosts and launchers that run.sh decides on: python -m pytest tests/test_binding.py

Dry runs among stand-ins (checkout.py). The expected values of two sockets of 52 cores are what
Intel's launcher set there.
"""

import itertools
import os
import socket
import time
from pathlib import Path

import pytest
from checkout import PYTHON, Checkout

VERSIONS = {
    "Intel MPI": "Intel(R) MPI Library for Linux* OS, Version 2021.18 Build 20260626",
    "Open MPI": "mpirun (Open MPI) 4.1.4",
    "MPICH": "HYDRA build details:\n    Version: 4.0.2",
}


def machine(sockets, cores, threads=1, adjacent=False):
    """Rows of lscpu. The second hyper-threads come after all cores, or each beside its core."""
    pairs = list(itertools.product(range(threads), range(sockets * cores)))
    if adjacent:
        pairs.sort(key=lambda pair: pair[1])
    return [(cpu, core, core // cores, core // cores) for cpu, (_, core) in enumerate(pairs)]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def install(checkout, mpi):
    checkout.script("stand-ins/mpirun", f"#!/bin/sh\necho '{VERSIONS[mpi]}'\n")


def dry_run(checkout, *words, **env):
    """What run.sh prints: NAME -> value of its `set` lines, other words -> rest of the line."""
    result = checkout.run(*words, DRY_RUN="1", **env)
    assert result.returncode == 0, result.stderr
    printed = {}
    for line in result.stdout.splitlines():
        word, rest = line.split(maxsplit=1)
        if word == "set":
            word, rest = rest.split("  (")[0].split("=", 1)
        printed[word] = rest
    return printed


# ---- topologies -------------------------------------------------------------------------------


def test_two_sockets_of_52_cores_as_intels_launcher(checkout):
    checkout.topology(machine(2, 52))
    install(checkout, "Intel MPI")
    (checkout.root / ".venv/lib").mkdir()
    (checkout.root / ".venv/lib/libiomp5.so").touch()
    printed = dry_run(checkout, CPUS="0-103", BACKEND="ccl", CCL_WORKER_COUNT="4")
    assert printed["MASTER_PORT"].isdigit()
    del printed["MASTER_PORT"]
    assert printed == {
        "corpus": "demo in data/demo",
        "output": "out/demo (new run)",
        "cores": "104 physical in 2 NUMA nodes behind CPUs 0-103",
        "ranks": f"2 on localhost, by Intel MPI ({checkout.root}/stand-ins/mpirun)",
        "backend": "ccl (as you set it)",
        "OMP_NUM_THREADS": "48",
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
        "KMP_BLOCKTIME": "1",
        "LD_PRELOAD": f"{checkout.root}/.venv/lib/libiomp5.so",
        "I_MPI_PIN_DOMAIN": "[0xffffffffffff0,0xffffffffffff00000000000000,]",
        "MASTER_ADDR": "127.0.0.1",
        "CCL_WORKER_COUNT": "4",
        "CCL_WORKER_AFFINITY": "0,1,2,3,52,53,54,55",
        "launch": "mpirun -n 2 -ppn 2 -hosts localhost .venv/bin/python train.py --data data/demo"
        " --train-splits train-demo --dev-split dev-demo --out out/demo --preset demo"
        " --ranks 2 --backend ccl",
    }


@pytest.mark.parametrize(
    ("rows", "cpus", "ranks", "threads", "domains"),
    [
        (machine(1, 2), "0-1", "", 2, None),
        (machine(1, 16), "0-15", "", 16, None),
        (machine(1, 16), "0-15", "2", 8, "[0xff,0xff00,]"),
        (machine(1, 5), "0-4", "2", 2, "[0x3,0xc,]"),  # one core is left over
        (machine(4, 8), "0-31", "", 8, "[0xff,0xff00,0xff0000,0xff000000,]"),
        (machine(2, 5), "0-9", "4", 2, "[0x3,0xc,0x60,0x180,]"),  # none reaches over two sockets
        (machine(2, 4, threads=2), "0-15", "", 4, "[0xf,0xf0,]"),
        (machine(2, 4, threads=2, adjacent=True), "0-15", "", 4, "[0x55,0x5500,]"),
        (machine(2, 4, threads=2), "8-15", "", 4, "[0xf00,0xf000,]"),  # second threads only
        (machine(2, 16), "0-5", "", 6, None),  # a cpuset of 6 of 32 cores, on one socket
        (machine(2, 16), "13-18", "", 3, "[0xe000,0x70000,]"),  # and on both
        (machine(2, 16), "3,20,5,7-8,29-31", "", 4, "[0x1a8,0xe0100000,]"),
        (machine(2, 16), "13-20", "", 8, None),  # three cores of one socket and five of the other
        (machine(2, 16), "0-5,16", "", 7, None),
    ],
)
def test_ranks_threads_and_masks(checkout, rows, cpus, ranks, threads, domains):
    checkout.topology(rows)
    printed = dry_run(checkout, CPUS=cpus, RANKS=ranks)
    assert printed["OMP_NUM_THREADS"] == str(threads)
    assert printed.get("I_MPI_PIN_DOMAIN") == domains
    expected = 1 if domains is None else domains.count("0x")
    assert printed["ranks"].split()[0] == str(expected)


def test_machine_without_numa_information_is_one_node(checkout):
    checkout.topology([(cpu, cpu, 0, "") for cpu in range(4)])
    assert dry_run(checkout, CPUS="0-3")["cores"] == "4 physical in 1 NUMA nodes behind CPUs 0-3"


def test_more_ranks_than_cores_share_them_unbound(checkout):
    checkout.topology(machine(1, 2))
    printed = dry_run(checkout, CPUS="0-1", RANKS="8")
    assert printed["OMP_NUM_THREADS"] == "1"
    assert not {"I_MPI_PIN_DOMAIN", "KMP_AFFINITY"} & set(printed)


@pytest.mark.parametrize(
    ("limit", "threads", "bound"),
    [("max 100000", 8, True), ("250000 100000", 3, False), ("900000 100000", 8, True)],
)
@pytest.mark.parametrize("is_parent", [False, True])
def test_quota_of_the_control_group_limits_threads(checkout, limit, threads, bound, is_parent):
    checkout.topology(machine(1, 8))
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::")), "")
    group = checkout.root / f"groups{path}"
    if is_parent:
        group = checkout.root / "groups"
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.max").write_text(f"{limit}\n")
    printed = dry_run(checkout, CPUS="0-7", CGROUPS=str(checkout.root / "groups"))
    assert printed["OMP_NUM_THREADS"] == str(threads)
    assert ("KMP_AFFINITY" in printed) == bound


def test_cpus_that_lscpu_does_not_know_are_an_error(checkout):
    result = checkout.run(DRY_RUN="1", CPUS="70-71")
    assert result.returncode == 2
    assert "no core behind the CPUs 70-71" in result.stderr


# ---- the user's environment -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", "7"),
        ("KMP_AFFINITY", "disabled"),
        ("KMP_BLOCKTIME", "0"),
        ("LD_PRELOAD", "libmine.so"),
        ("I_MPI_PIN_DOMAIN", "socket"),
        ("MASTER_ADDR", "10.1.2.3"),
        ("MASTER_PORT", "4711"),
        ("CCL_WORKER_COUNT", "2"),
        ("CCL_WORKER_AFFINITY", "auto"),
    ],
)
def test_what_the_user_has_set_wins_and_is_shown_as_theirs(checkout, name, value):
    checkout.topology(machine(2, 8))
    install(checkout, "Intel MPI")
    (checkout.root / "libraries").write_text("\tlibiomp5.so (libc6,x86-64) => /lib/libiomp5.so\n")
    env = {"DRY_RUN": "1", "CPUS": "0-15", "BACKEND": "ccl"}
    theirs = f"set     {name}={value}  (as you set it)"
    assert theirs in checkout.run(**env, **{name: value}).stdout
    assert "as you set it" not in checkout.run(**{**env, "BACKEND": "auto"}).stdout
    assert f"set     {name}=" in checkout.run(**env).stdout


@pytest.mark.parametrize(("folder", "is_found"), [("conda", True), ("my conda", False)])
def test_a_library_below_a_space_is_left_out(checkout, folder, is_found):
    """The loader would take its path for two."""
    library = checkout.root / folder / "lib/libiomp5.so"
    library.parent.mkdir(parents=True)
    library.touch()
    printed = dry_run(checkout, CONDA_PREFIX=str(checkout.root / folder))
    assert printed.get("LD_PRELOAD") == (str(library) if is_found else None)


@pytest.mark.parametrize(("ranks", "rank"), [("1", "0"), ("2", "")])
def test_a_rank_that_a_batch_job_has_set_reaches_no_launcher(checkout, ranks, rank):
    checkout.script(".venv/bin/python", PYTHON + 'echo "$RANK" >> ranks\n')
    assert checkout.run(RANKS=ranks, RANK="3", WORLD_SIZE="4").returncode == 0
    assert (checkout.root / "ranks").read_text().split("\n")[1] == rank  # prepare.py is before


@pytest.mark.parametrize("launcher", ["torchrun", "Intel MPI", "Open MPI"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("KMP_AFFINITY", "disabled"), ("LD_PRELOAD", "libmine.so"), ("I_MPI_PIN_DOMAIN", "socket")],
)
def test_what_the_user_has_set_wins_where_nothing_else_is_decided(checkout, name, value, launcher):
    """More ranks than cores are not bound, and no library is found."""
    if launcher != "torchrun":
        install(checkout, launcher)
    env = {"CPUS": "0-1", "RANKS": "8"}
    assert name not in dry_run(checkout, **env)
    printed = dry_run(checkout, **env, **{name: value})
    assert printed[name] == value
    assert (f" -x {name} " in printed["launch"]) == (launcher == "Open MPI")


def test_two_workers_of_oneccl_leave_six_of_eight_cores(checkout):
    checkout.topology(machine(2, 8))
    printed = dry_run(checkout, CPUS="0-15", BACKEND="ccl", CCL_WORKER_COUNT="2")
    assert printed["OMP_NUM_THREADS"] == "6"
    assert printed["CCL_WORKER_AFFINITY"] == "0,1,8,9"
    assert printed["I_MPI_PIN_DOMAIN"] == "[0xfc,0xfc00,]"


def test_workers_of_oneccl_need_cores(checkout):
    checkout.topology(machine(1, 2))
    result = checkout.run(DRY_RUN="1", CPUS="0-1", RANKS="2", BACKEND="ccl")
    assert result.returncode == 2
    assert "CCL_WORKER_COUNT=1 leaves no core" in result.stderr


@pytest.mark.parametrize(
    ("present", "preloaded"),
    [
        (["libiomp5.so"], "/lib/libiomp5.so"),
        (["libjemalloc.so.2"], "/lib/libjemalloc.so.2"),
        (["libiomp5.so", "libjemalloc.so.2", "libtcmalloc.so.4"],
         "/lib/libiomp5.so:/lib/libtcmalloc.so.4"),
    ],
)
def test_openmp_and_one_allocator_are_preloaded(checkout, present, preloaded):
    lines = [f"\t{name} (libc6,x86-64) => /lib/{name}\n" for name in present]
    (checkout.root / "libraries").write_text("".join(lines))
    assert dry_run(checkout)["LD_PRELOAD"] == preloaded


def test_backend_is_ccl_where_its_bindings_are(checkout):
    assert dry_run(checkout, RANKS="2")["launch"].endswith("--backend gloo")
    package = ".venv/lib/python3.11/site-packages/oneccl_bindings_for_pytorch"
    (checkout.root / package).mkdir(parents=True)
    assert dry_run(checkout, RANKS="2")["launch"].endswith("--backend ccl")
    printed = dry_run(checkout, RANKS="2", FAIL="import torch, oneccl_bindings_for_pytorch")
    assert printed["backend"] == "gloo (oneccl_bindings_for_pytorch in .venv cannot be imported)"


def test_train_hears_of_a_backend_that_one_rank_does_not_need(checkout):
    """It says what is missing."""
    checkout.topology(machine(1, 2))
    assert "--backend" not in dry_run(checkout)["launch"]
    assert dry_run(checkout, BACKEND="ccl")["launch"].endswith(" --preset demo --backend ccl")


# ---- launchers --------------------------------------------------------------------------------


def launcher_of(checkout, **env):
    """The launch command up to train.py."""
    return dry_run(checkout, **env)["launch"].split(" train.py")[0]


@pytest.mark.parametrize("mpi", ["Intel MPI", "MPICH"])
def test_hydra_takes_hosts_and_ranks_per_host(checkout, mpi):
    install(checkout, mpi)
    (checkout.root / "hosts").write_text("node1\nnode2\n")
    command = launcher_of(checkout, RANKS="2")
    assert command == "mpirun -n 4 -ppn 2 -hosts node1\\,node2 .venv/bin/python"
    printed = dry_run(checkout, RANKS="2", SSH="./my-ssh")
    assert " -bootstrap ssh -bootstrap-exec ./my-ssh .venv/bin/python " in printed["launch"]
    assert printed["launch"].endswith(" --ranks 4 --backend gloo")
    assert printed["MASTER_ADDR"] == "node1"


def test_open_mpi_takes_slots_and_the_name_of_every_variable(checkout):
    install(checkout, "Open MPI")
    (checkout.root / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    assert launcher_of(checkout) == (
        "mpirun -n 4 --host node1:2\\,node2:2 --map-by ppr:2:node --bind-to none"
        " --mca plm_rsh_agent ssh -x OMP_NUM_THREADS -x KMP_AFFINITY -x KMP_BLOCKTIME"
        " -x I_MPI_PIN_DOMAIN -x MASTER_ADDR -x MASTER_PORT .venv/bin/python"
    )
    command = launcher_of(checkout, GLOO_SOCKET_IFNAME="ib0", OMP_NUM_THREADS="1", OTHER="1")
    assert command.endswith(" -x MASTER_PORT -x GLOO_SOCKET_IFNAME .venv/bin/python")


def test_unknown_mpirun_is_an_error(checkout):
    checkout.script("stand-ins/mpirun", "#!/bin/sh\necho 'mpirun 0.1'\n")
    result = checkout.run(DRY_RUN="1", RANKS="2")
    assert result.returncode == 2
    assert "mpirun is neither Intel MPI nor Open MPI nor MPICH" in result.stderr


def test_missing_launcher_is_an_error(checkout):
    for name in ("mpirun", "ipex"):
        result = checkout.run(DRY_RUN="1", RANKS="2", LAUNCHER=name)
        assert result.returncode == 2
        assert f"LAUNCHER={name}, but" in result.stderr


def test_torchrun_although_there_is_an_mpirun(checkout):
    install(checkout, "Intel MPI")
    printed = dry_run(checkout, LAUNCHER="torchrun", RANKS="2")
    assert "-m torch.distributed.run --nnodes 1 --nproc-per-node 2" in printed["launch"]
    # It would take this machine's own name, which a dead resolver may take minutes to look up.
    assert f" --master-addr 127.0.0.1 --master-port {printed['MASTER_PORT']} " in printed["launch"]
    env = {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "4711"}
    printed = dry_run(checkout, LAUNCHER="torchrun", RANKS="2", **env)
    assert " --master-addr 10.1.1.1 --master-port 4711 " in printed["launch"]


def test_one_process_in_a_batch_job_of_several_is_alone(checkout):
    checkout.topology(machine(1, 2))
    checkout.script(".venv/bin/python", '#!/bin/sh\necho "<$1 $RANK of $WORLD_SIZE>"\n')
    result = checkout.run(CPUS="0-1", SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_LOCALID="0")
    assert "<train.py 0 of 1>" in result.stdout


@pytest.mark.parametrize(
    ("ranks", "options"), [("1", ""), ("2", " --nnodes 1 --nprocs-per-node 2 --ccl-worker-count 0")]
)
def test_ipexrun(checkout, ranks, options):
    checkout.script(".venv/bin/ipexrun", "#!/bin/sh\n")
    assert launcher_of(checkout, LAUNCHER="ipex", RANKS=ranks) == f"ipexrun{options}"


@pytest.mark.parametrize(("ends", "reason", "status"), [
    (1, "epochs", 0), (0, "epochs", 2), (1, "error: full", 1),
])
def test_ipexrun_fails_if_no_run_ended_well(checkout, ends, reason, status):
    """ipexrun succeeds whatever becomes of its ranks."""
    log = "out/demo/log.jsonl"
    end = f'echo \'{{"event": "end", "reason": "{reason}"}}\' >> {log}\n'
    checkout.script(log, '{"event": "end", "reason": "epochs"}\n')
    checkout.script(".venv/bin/ipexrun", f"#!/bin/sh\n{end * ends}")
    result = checkout.run(LAUNCHER="ipex", RANKS="2")
    assert result.returncode == status, result.stderr
    assert bool(checkout.calls("decode.py")) == (status == 0)


@pytest.mark.parametrize(("reason", "status"), [
    ("epochs", 7), ("time limit", 75), ("SIGINT", 130), ("SIGUSR1", 138), ("SIGTERM", 143),
    ("error: full", 7),
])
def test_the_status_of_train_survives_its_launcher(checkout, reason, status):
    """torchrun makes 1 of whatever status its ranks ended with; here it is 7."""
    install(checkout, "Intel MPI")
    log = "out/demo/log.jsonl"
    checkout.script(log, '{"event": "end", "reason": "SIGTERM", "step": 1}\n')  # of an earlier run
    checkout.script("stand-ins/mpirun", "#!/bin/sh\ncase $1 in --version) echo 'Intel(R) MPI' ;; *)"
                    f""" echo '{{"event": "end", "reason": "{reason}", "step": 9}}' >> {log}\n"""
                    "exit 7 ;; esac\n")
    assert checkout.run(RANKS="2").returncode == status
    os.utime(checkout.root / log, (2**31, 2**31))  # of a file server whose clock is ahead
    checkout.script("stand-ins/mpirun", "#!/bin/sh\ncase $1 in --version) echo 'Intel(R) MPI' ;; *)"
                    " exit 5 ;; esac\n")
    assert checkout.run(RANKS="2").returncode == 5  # nothing new in the log


def test_words_reach_ipexrun_quoted_for_its_shell(checkout):
    checkout.script(".venv/bin/ipexrun", '#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    result = checkout.run("--out", "my run", LAUNCHER="ipex", RANKS="2")
    assert "<my\\ run>" in result.stdout


def test_port_is_a_free_one(checkout):
    install(checkout, "Intel MPI")
    first = int(dry_run(checkout, RANKS="2")["MASTER_PORT"])
    assert 20000 <= first < 30000
    script = checkout.root / "run.sh"
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        # As if the process id had led to the port that is taken.
        script.write_text(script.read_text().replace("20000 + $$ % 10000", str(taken)))
        assert int(dry_run(checkout, RANKS="2")["MASTER_PORT"]) > taken
    assert int(dry_run(checkout, RANKS="2")["MASTER_PORT"]) == taken


# ---- hosts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ranks", "hosts"),
    [
        ("localhost\n", "1 on localhost", "localhost"),
        ("# all\n\n a \nb   # the second\n", "1 on a, b", "a,b"),
        ("a slots=3\nb slots=3", "3 on a, b", "a,b"),  # no newline at the end
        ("10.0.0.7 slots=2\n", "2 on 10.0.0.7", "10.0.0.7"),
        ("node-1.example.org slots=2\n", "2 on node-1.example.org", "node-1.example.org"),
    ],
)
def test_hosts_file(checkout, text, ranks, hosts):
    install(checkout, "Intel MPI")
    (checkout.root / "machines").write_text(text)
    printed = dry_run(checkout, HOSTS="machines")
    assert printed["ranks"].startswith(f"{ranks}, by ")
    if hosts != "localhost":
        assert f" -hosts {hosts} ".replace(",", "\\,") in printed["launch"]
        assert printed["MASTER_ADDR"] == hosts.split(",")[0]


def test_slots_that_equal_ranks_are_accepted(checkout):
    (checkout.root / "hosts").write_text("localhost slots=2\n")
    assert dry_run(checkout, RANKS="2")["ranks"].startswith("2 on localhost")
    result = checkout.run(DRY_RUN="1", RANKS="3")
    assert result.returncode == 2
    assert "RANKS=3, but hosts says slots=2" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "hosts names no host"),
        ("# nobody\n", "hosts names no host"),
        ("a\nb,c\n", "hosts:2: 'b,c' is no host name"),
        ("-a\n", "hosts:1: '-a' is no host name"),
        ("a slots=0\n", "hosts:1: 'slots=0', expected slots=N"),
        ("a slot=2\n", "hosts:1: 'slot=2', expected slots=N"),
        ("a slots=2 b\n", "hosts:1: 'slots=2 b', expected slots=N"),
        ("a\n\nb\na\n", "hosts:4: a stands twice"),
        ("a slots=2\nb slots=3\n", "hosts:2: 'slots=3' after 'slots=2'"),
        ("a slots=2\nb\n", "hosts:2: '' after 'slots=2'"),
        ("localhost\nb\n", "hosts: localhost is another machine on every host"),
        ("b\n127.0.0.1\n", "hosts: 127.0.0.1 is another machine on every host"),
    ],
)
def test_wrong_hosts_file_is_an_error_that_names_the_line(checkout, text, message):
    install(checkout, "Intel MPI")
    (checkout.root / "hosts").write_text(text)
    result = checkout.run()
    assert result.returncode == 2
    assert message in result.stderr
    assert checkout.calls() == []


def test_first_host_whose_name_leads_to_its_loopback_is_an_error(checkout):
    """As Debian's /etc/hosts has it; the others would look for rank 0 on themselves."""
    install(checkout, "Intel MPI")
    (checkout.root / "hosts").write_text("a\nb\n")
    (checkout.root / "addresses").write_text("127.0.1.1 a\n10.0.0.2 b\n10.0.0.1 a-eth0\n")
    result = checkout.run(DRY_RUN="1")
    assert result.returncode == 2
    assert "hosts: a is 127.0.1.1 here, where no other host reaches it" in result.stderr
    assert dry_run(checkout, MASTER_ADDR="a-eth0")["MASTER_ADDR"] == "a-eth0"
    (checkout.root / "hosts").write_text("b\na\n")
    assert dry_run(checkout)["MASTER_ADDR"] == "b"


def test_other_hosts_need_an_mpirun(checkout):
    (checkout.root / "hosts").write_text("a\nb\n")
    result = checkout.run(DRY_RUN="1")
    assert result.returncode == 2
    assert "torchrun starts ranks on this machine alone, and hosts names a,b" in result.stderr


@pytest.mark.parametrize("has_corpus", [False, True])
def test_hosts_that_cannot_be_used_are_named_before_anything_starts(checkout, has_corpus):
    install(checkout, "Intel MPI")
    (checkout.root / "hosts").write_text("good\nsilent\nmistyped\nbare\nempty\n")
    if has_corpus:
        (checkout.root / "my data").mkdir()
    checkout.script(
        "my-ssh",
        "#!/bin/sh\nhost=$5; shift 5\ncase $host in silent) exec sleep 60 ;; mistyped) exit 255 ;;"
        ' bare) exit 1 ;; empty) set -- $(echo "$*" | sed s,/my,/no,) ;; esac\n'
        'exec sh -c "$*"\n',
    )
    script = checkout.root / "run.sh"
    script.write_text(script.read_text().replace("timeout 25", "timeout 2"))
    started = time.monotonic()
    result = checkout.run(SSH="./my-ssh", DATA="my data")
    assert time.monotonic() - started < 30
    assert result.returncode == 2
    named = "silent (status 124) mistyped (status 255) bare (status 1)"
    if has_corpus:
        named += " empty (status 1)"
        assert f"and my data reached by ./my-ssh on {named};" in result.stderr
    else:
        assert f"python reached by ./my-ssh on {named};" in result.stderr
    assert checkout.calls() == []
