# SPDX-License-Identifier: Apache-2.0
"""The real run.sh: its steps, statuses, signals, set-up, lost ranks, and training on four hosts.

    python -m pytest tests/test_run.py -m "not slow"
    sudo python -m pytest tests/test_run.py     # four hosts need network namespaces

Quick tests replace Python by a stand-in that records its calls. Slow ones train on a corpus of
tones, with torchrun and with mpirun if there is one.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import FLAGS, PATH, PYTHON, Run, StandIn, kill_processes, write_script
from tones import REPO, SIMPLE, events

from checkpoint import load_checkpoint
from tools import launch


@pytest.fixture
def project(tmp_path):
    return StandIn(tmp_path)


def test_both_environments_differ_in_torch_and_intels_packages_alone():
    plain, intel = (
        {line.split("#")[0].strip() for line in (REPO / name).read_text().splitlines()} - {""}
        for name in ("requirements.txt", "requirements-intel.txt")
    )
    assert {line.split("==")[0] for line in plain - intel} == {"torch"}
    assert {line.split("==")[0].split(">=")[0] for line in intel - plain} == {
        "torch", "intel_extension_for_pytorch", "impi-rt", "intel-openmp"
    }


def test_cluster_page_lists_every_setting_and_its_default():
    page = (REPO / "docs/cluster.md").read_text()
    knobs = re.findall(r"^([A-Z_]+)=\$\{\1:-(.*?)\}", (REPO / "run.sh").read_text(), re.M)
    assert len(knobs) == 11
    for name, default in knobs:
        assert f"| `{name}` | `{default}` |" in page or (name, default) == ("RANKS", "")
    for name in ("RANKS", *launch.VARIABLES):
        assert f"\n| `{name}` | " in page


# ---- dry run, help, wrong knobs ---------------------------------------------------------------


@pytest.mark.parametrize("has_environment", [True, False])
def test_dry_run_prints_every_decision_and_writes_no_file(project, has_environment):
    if not has_environment:
        shutil.rmtree(project.folder / ".venv")
    before = sorted(project.folder.rglob("*"))
    result = project.run("--epochs", "3", DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    assert list(dict.fromkeys(line.split()[0] for line in result.stdout.splitlines())) == [
        "corpus", "output", "cores", "ranks", "set", "launch"]
    assert result.stdout.endswith(
        "launch  .venv/bin/python train.py --data data/demo --train-splits train-demo"
        " --dev-split dev-demo --out out/demo --preset demo --epochs 3\n")
    result = project.run("test", "-k", "a b", DRY_RUN="1")
    assert result.stdout == "launch  .venv/bin/python -m pytest -m not\\ slow -k a\\ b\n"
    assert sorted(project.folder.rglob("*")) == before


def test_dry_run_needs_no_tool_but_bash_and_python(project, tmp_path):
    """macOS has no lscpu, taskset, getent or realpath."""
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("bash", "dirname", "sh"):
        (folder / name).symlink_to(shutil.which(name))
    result = project.run(DRY_RUN="1", PATH=str(folder))
    assert result.returncode == 0, result.stderr
    assert "launch  .venv/bin/python train.py" in result.stdout


def test_wrong_knob_is_named_before_the_set_up(project):
    shutil.rmtree(project.folder / ".venv")
    result = project.run(CORPUS="timit")
    assert result.returncode == 2
    assert result.stderr.startswith("run.sh: CORPUS=timit, expected demo, ")
    assert project.calls() == []


def test_help_among_the_flags_is_for_the_reader(project):
    result = project.run("--epochs", "1", "--help")
    assert result.returncode == 0
    assert "RANKS=2 bash run.sh --epochs 20" in result.stdout
    assert project.calls() == []


# ---- steps ------------------------------------------------------------------------------------


def test_steps_run_in_order_and_scoring_takes_every_core(project):
    result = project.run(RANKS="2")
    assert result.returncode == 0, result.stderr
    prepare, train, score = project.calls()
    assert prepare.startswith("-m|tools.prepare|demo|data/demo|")
    assert train.startswith("-m|tools.torchrun|--nnodes|1|--nproc-per-node|2|--master-addr|")
    cores = len(launch.read_cores(os.sched_getaffinity(0)))
    assert f"|threads={max(cores // 2, 1)} " in train
    assert score.startswith("decode.py|--checkpoint|out/demo/best.pt|--data|data/demo|--split|"
                            f"dev-demo|--hypotheses|out/demo/dev-demo.tsv|threads={cores} ")


def test_first_three_transcripts_stand_above_their_references(project):
    result = project.run()
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(
        "7-9-0\n  hypothesis  HEARD\n  reference   SAID\n"
        "7-9-1\n  hypothesis  \n  reference   SO\n"
        "7-9-2\n  hypothesis  A\n  reference   B\n"
        "transcribe a file of your own instead of my.wav, or five seconds from the microphone:\n"
        "  .venv/bin/python decode.py --checkpoint out/demo/best.pt my.wav\n"
        "  arecord -q -f S16_LE -r 16000 -c 1 -d 5 | "
        ".venv/bin/python decode.py --checkpoint out/demo/best.pt -\n"
    )


def test_flags_reach_train_py_intact_and_last(project):
    assert project.run("--note", "two words", "", "a*b", "--preset=baseline").returncode == 0
    (train,) = project.calls("train.py")
    assert "|--preset|demo|--note|two words||a*b|--preset=baseline|threads=" in train


def test_folders_among_the_flags_are_prepared_and_scored(project):
    flags = ["--out=my run", "--dev-split", "dev-other", "--data", "a corpus"]
    assert project.run(*flags, CORPUS="mini-librispeech").returncode == 0
    (prepare,) = project.calls("-m|tools.prepare")
    assert prepare.startswith("-m|tools.prepare|mini-librispeech|a corpus|")
    (score,) = project.calls("decode.py")
    assert score.startswith(
        "decode.py|--checkpoint|my run/best.pt|--data|a corpus|--split|dev-other|")


def test_corpus_of_the_user_is_not_prepared(project):
    for name in ("train-demo", "dev-demo"):
        (project.folder / "corpus" / name).mkdir(parents=True)
    assert project.run("--data", "corpus").returncode == 0
    assert project.calls("-m|tools.prepare") == []


def test_omp_num_threads_of_the_user_wins_in_every_step(project):
    assert project.run(OMP_NUM_THREADS="3").returncode == 0
    assert len(project.calls()) == 3
    assert all("|threads=3 " in call for call in project.calls())


@pytest.mark.parametrize(("ranks", "rank"), [("1", "0"), ("2", "")])
def test_rank_that_a_batch_job_has_set_reaches_no_launcher(project, ranks, rank):
    job = {"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert project.run(RANKS=ranks, **job).returncode == 0
    assert project.calls()[1].endswith(f" rank={rank}")


# ---- tasks of Slurm ---------------------------------------------------------------------------

TASKS = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1",
         "RANKS": "", "LAUNCHER": "auto"}


@pytest.mark.parametrize(("task", "num_steps"), [("0", 3), ("1", 2)])
def test_first_task_of_srun_scores_and_every_task_trains(project, task, num_steps):
    result = project.run(**TASKS, SLURM_PROCID=task, SLURM_LOCALID=task)
    assert result.returncode == 0, result.stderr
    calls = project.calls()
    assert len(calls) == num_steps
    assert calls[1].startswith("train.py|")
    assert calls[1].endswith(f" rank={task}")
    assert (result.stdout == "") == (task == "1")


def test_batch_script_of_the_cluster_page_requeues_a_job_whose_time_is_over(project):
    page = (REPO / "docs/cluster.md").read_text()
    (script,) = re.findall(r"^    #!/bin/bash\n(?:    .*\n)+", page, re.M)
    for name, status in (("srun", 75), ("scontrol", 0)):
        write_script(project.folder / "stand-ins" / name,
                     f'#!/bin/sh\necho "{name} $*" >> calls\nexit {status}\n')
    env = {**project.env, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(project.folder),
           "SLURM_CPUS_PER_TASK": "32"}
    assert subprocess.run(["bash", "-c", script], env=env).returncode == 75
    assert project.calls() == [
        "srun --cpus-per-task=32 --wait=0 bash run.sh --time-limit-s 41000", "scontrol requeue 7"]


def test_tasks_of_srun_set_up_once(project):
    shutil.rmtree(project.folder / ".venv")
    tasks = [project.start(**TASKS, SLURM_PROCID=task, SLURM_LOCALID=task) for task in "01"]
    assert [task.wait(timeout=300) for task in tasks] == [0, 0]
    assert len(project.calls("-m|pip|install|")) == 1


# ---- failures and signals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "calls", "ranks"),
    [("tools.prepare", 1, "1"), ("train.py", 2, "1"), ("train.py", 2, "2"), ("--split", 3, "1")],
)
def test_status_of_a_failing_step_is_that_of_run_sh(project, step, calls, ranks):
    assert project.run(FAIL=step, RANKS=ranks).returncode == 3
    assert len(project.calls()) == calls


def test_launcher_that_starts_no_rank_fails_the_run(project):
    """ipexrun succeeds whatever becomes of its ranks."""
    write_script(project.folder / ".venv/bin/ipexrun", "#!/bin/sh\n")
    result = project.run(RANKS="2", LAUNCHER="ipex")
    assert result.returncode == 1
    assert result.stderr == ("run.sh: the launcher ended with status 0, but rank 0 wrote no exit "
                             "status on this host\n")
    assert project.calls("decode.py") == []


@pytest.mark.parametrize(
    ("step", "number", "status", "ranks"),
    [
        ("-m pip install", signal.SIGINT, 130, "1"),
        ("tools.prepare", signal.SIGTERM, 143, "1"),
        ("train.py", signal.SIGINT, 130, "1"),
        ("train.py", signal.SIGTERM, 143, "2"),
        ("train.py", signal.SIGHUP, 129, "1"),
        ("train.py", signal.SIGUSR1, 138, "1"),
    ],
)
def test_signal_ends_the_step_and_its_processes(project, step, number, status, ranks):
    """The second of its processes ignores SIGINT, as background processes of shells do."""
    (project.folder / ".venv/requirements.txt").unlink()
    hang = f'case "$*" in *"{step}"*) sleep 600 & echo "$$ $!" >> pids; wait ;; esac\n'
    real, rest = PYTHON.split("esac\n", 1)
    write_script(project.folder / ".venv/bin/python", f"{real}esac\n{hang}{rest}")
    child = project.start(RANKS=ranks)
    expect_end_by_signal(project, child, number, status)


def test_signal_ends_the_wait_for_hosts(project):
    write_script(project.folder / "stand-ins/mpirun", "#!/bin/sh\necho 'Intel(R) MPI'\n")
    (project.folder / "hosts").write_text("203.0.113.1\n203.0.113.2\n")  # documentation's addresses
    write_script(project.folder / "my-ssh", '#!/bin/sh\necho "$$" >> pids\nexec sleep 600\n')
    child = project.start(SSH="./my-ssh")
    expect_end_by_signal(project, child, signal.SIGINT, 130)


def expect_end_by_signal(project, child, number, status):
    """Sends the signal when two processes wrote their ids; neither they nor files may be left."""
    pids = project.folder / "pids"
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(number)
    assert child.wait(timeout=300) == status
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert list((project.folder / "tmp").iterdir()) == []


# ---- set-up and tests -------------------------------------------------------------------------


def test_set_up_makes_the_environment_once(project):
    shutil.rmtree(project.folder / ".venv")
    for _ in range(2):
        assert project.run().returncode == 0
        assert project.calls("python3") == ["python3|-m venv .venv"]
        assert len(project.calls("-m|pip|install|")) == 1


def test_a_system_without_python_is_named(project, tmp_path):
    shutil.rmtree(project.folder / ".venv")
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("bash", "dirname"):
        (folder / name).symlink_to(shutil.which(name))
    result = project.run(PATH=str(folder))
    assert result.returncode == 2
    assert result.stderr == "run.sh: there is no python3; install 3.10 or later\n"


@pytest.mark.parametrize("argv", [(), ("test", "--version")])
def test_python_that_is_too_old_is_named(project, argv):
    shutil.rmtree(project.folder / ".venv")
    write_script(project.folder / "stand-ins/python3", f"""#!/bin/sh
exec "{sys.executable}" -c "import sys; sys.version_info = (3, 9); exec(sys.argv[1])" "$2"
""")
    result = project.run(*argv)
    assert result.returncode == 2
    assert result.stderr == ("run.sh: python3 is older than 3.10; make the environment with a "
                             "newer one, for example python3.12 -m venv .venv\n")


def test_changed_requirements_are_installed_into_the_same_environment(project):
    with (project.folder / "requirements.txt").open("a") as file:
        file.write("another-package\n")
    assert project.run().returncode == 0
    assert project.calls("python3") == []
    assert "|--requirement|requirements.txt|" in project.calls("-m|pip|install|")[0]


def test_failed_installation_ends_the_run_and_is_repeated(project):
    (project.folder / ".venv/requirements.txt").unlink()
    assert project.run(FAIL="pip install").returncode == 3
    assert project.calls("-m|tools.prepare") == []
    assert project.run().returncode == 0
    assert len(project.calls("-m|pip|install|")) == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "-m|pytest|-m|not slow|"),
        (["--slow"], "-m|pytest|"),
        (["-x", "-k", "a b", "--slow", ""], "-m|pytest|-x|-k|a b||"),
    ],
)
def test_test_runs_pytest(project, flags, expected):
    assert project.run("test", *flags, OMP_NUM_THREADS="1").returncode == 0
    assert project.calls() == [f"{expected}threads=1 rank="]


def test_test_sets_up_and_returns_the_status_of_pytest(project):
    (project.folder / ".venv/requirements.txt").unlink()
    assert project.run("test", FAIL="pytest -m").returncode == 3
    assert len(project.calls("-m|pip|install|")) == 1


# ---- real training: lost ranks, signals -------------------------------------------------------

NEEDS_MPIRUN = pytest.mark.skipif(
    shutil.which("mpirun", path=PATH) is None,
    reason="there is no mpirun; pip install impi-rt brings one",
)
LAUNCHERS = ["torchrun", pytest.param("mpirun", marks=NEEDS_MPIRUN)]


@pytest.fixture
def run(tmp_path):
    yield Run(tmp_path)
    kill_processes(tmp_path)


def insert(run, name, marker, code):
    """Inserts code behind a marker in a file of the run."""
    source = (run.folder / name).read_text()
    assert source.count(marker) == 1
    (run.folder / name).write_text(source.replace(marker, marker + code))


def raise_in_step_3(run, rank, error):
    insert(run, "step.py", "    trainer.parallel.train()\n",
           f"    if step == 3 and trainer.ranks.rank == {rank}: raise {error}\n")


def names_rank(text, rank):
    """In our own messages, or in Hydra's or Open MPI's."""
    return re.search(rf"lost rank {rank}\b|torchrun: rank {rank} was killed by SIGKILL|"
                     rf"RANK {rank} PID|process rank {rank} ", text)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_rank_ends_the_run_which_can_be_resumed(run, launcher, rank):
    run.start(LAUNCHER=launcher).wait_for_steps(3)
    os.kill(run.rank(rank), signal.SIGKILL)
    assert run.expect_end(300) not in (0, 2)
    assert names_rank(run.output(), rank), run.output()
    paths = list(run.out.glob("checkpoint-*.pt"))
    assert paths
    for path in paths:
        load_checkpoint(path)
    if (launcher, rank) == ("torchrun", 1):
        before = run.num_steps()
        run.start(LAUNCHER=launcher).wait_for_steps(before + 3)
        assert "resumed" in run.output()
        run.child.terminate()
        run.expect_end(300)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_raising_rank_ends_the_run(run, launcher):
    raise_in_step_3(run, 1, "KeyError('deliberate')")
    assert run.start(LAUNCHER=launcher).expect_end(300) not in (0, 2)
    assert "KeyError: 'deliberate'" in run.output()
    assert run.num_steps() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank"),
    [("torchrun", 1), *(pytest.param("mpirun", rank, marks=NEEDS_MPIRUN) for rank in (0, 1))],
)
def test_stopped_rank_is_named_and_ended(run, launcher, rank):
    """Under mpirun rank 0 keeps the heartbeats of all ranks."""
    run.start("--timeout-s", "10", LAUNCHER=launcher).wait_for_steps(3)
    os.kill(run.rank(rank), signal.SIGSTOP)
    assert run.expect_end(300) not in (0, 2)
    assert f"rank {1 - rank}: lost rank {rank}" in run.output()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("launcher", ["python", *LAUNCHERS])
def test_signal_leaves_no_process_and_no_status_file(run, launcher, number, status):
    chosen = {"RANKS": "1"} if launcher == "python" else {"LAUNCHER": launcher}
    folder = run.folder / "tmp"
    folder.mkdir()
    run.start("--loader-workers", "1", TMPDIR=str(folder), **chosen).wait_for_steps(2)
    run.child.send_signal(number)
    assert run.expect_end(300) == status
    assert list(folder.glob("rnnt-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_time_limit_ends_every_launcher_with_75(run, launcher):
    assert run.start("--time-limit-s", "1", LAUNCHER=launcher).expect_end(300) == 75, run.output()


# Two processes with the variables that Slurm gives to two tasks of a step.
SRUN = """
export SLURM_JOB_ID=$$ SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_NNODES=1
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  tasks="$tasks $!"
done
status=0
for task in $tasks; do wait "$task" || status=$?; done
exit "$status"
"""


@pytest.mark.slow
def test_tasks_of_srun_train_together(run):
    srun = ("bash", "-c", SRUN, "srun", "bash", "run.sh")
    run.start("--epochs", "1", command=srun, RANKS="")
    assert run.expect_end(300) == 0, run.output()
    (start,) = events(run.out, "start")
    assert start["ranks"] == 2
    assert run.output().count("\ntranscribe a file of your own") == 1


# ---- ranks that have called MPI_Init, as oneCCL does ------------------------------------------


@pytest.fixture
def mpi_run(run, monkeypatch):
    """A run whose ranks call MPI_Init of Intel MPI when they connect. Rank 0 ends 3 s after rank 1,
    in which Hydra would kill it if rank 1 had not called MPI_Finalize."""
    mpirun = shutil.which("mpirun", path=PATH)
    library = mpirun and Path(mpirun).resolve().parent.parent / "lib/libmpi.so.12"
    if not library or not library.exists():
        pytest.skip("there is no Intel MPI; pip install impi-rt brings one")
    insert(run, "ranks.py", "def start_group(backend: str, store: dist.Store, ranks: Ranks, "
           "timeout_s: float) -> None:\n",
           f"    assert ctypes.CDLL({str(library)!r}).MPI_Init(None, None) == 0\n")
    insert(run, "ranks.py", "            finalize_mpi()\n    finally:\n",
           "        time.sleep(3 * (read_ranks().rank == 0))\n")
    monkeypatch.setenv("LAUNCHER", "mpirun")
    monkeypatch.setenv("I_MPI_FABRICS", "shm")
    return run


@pytest.mark.slow
def test_ranks_that_use_mpi_end_with_status_0(mpi_run):
    """Rank 1 has finished long before rank 0 has written best.pt."""
    insert(mpi_run, "train.py", "        reason = run_and_log_end(run, state, stopper)\n",
           "    if ranks.rank == 0:\n        time.sleep(8)\n        save(run, state, True)\n")
    assert mpi_run.start("--epochs", "1").expect_end(300) == 0, mpi_run.output()
    load_checkpoint(mpi_run.out / "best.pt")
    assert "\ntranscribe a file of your own" in mpi_run.output()


@pytest.mark.slow
def test_time_limit_ends_ranks_that_use_mpi_with_75(mpi_run):
    assert mpi_run.start("--time-limit-s", "1").expect_end(300) == 75, mpi_run.output()


@pytest.mark.slow
def test_signal_ends_ranks_that_use_mpi_with_its_status(mpi_run):
    mpi_run.start().wait_for_steps(2)
    mpi_run.child.terminate()
    assert mpi_run.expect_end(300) == 143, mpi_run.output()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_one_rank_ends_all_that_use_mpi(mpi_run, rank):
    raise_in_step_3(mpi_run, rank, "ValueError('deliberate')")
    assert mpi_run.start().expect_end(300) == 1, mpi_run.output()
    assert "train.py: deliberate" in mpi_run.output()
    assert mpi_run.num_steps() == 2


# ---- four hosts: network namespaces on a bridge, with an sshd in each -------------------------

SYSTEM = f"{PATH}:/usr/sbin:/sbin"
HOSTS = 4
SUBNET = "10.213.78."  # the last number of a host's address is its own, from 1

# Hosts $prefix-1, $prefix-2, ... are network namespaces on a bridge, each with one link.
MAKE_HOSTS = f"""
ip link add $prefix type bridge
ip link set $prefix up
for i in $(seq {HOSTS}); do
  host=$prefix-$i
  ip netns add $host
  ip link add $host-p type veth peer name eth0 netns $host
  ip link set $host-p master $prefix up
  ip -n $host addr add {SUBNET}$i/24 dev eth0
  ip -n $host link set eth0 up
  ip -n $host link set lo up
done
"""
# A namespace lives as long as its last process; its link is removed at once.
REMOVE_HOSTS = f"""
for i in $(seq {HOSTS}); do
  ip link del $prefix-$i-p || true
  ip netns del $prefix-$i || true
done
ip link del $prefix
"""


@pytest.fixture
def hosts():
    """Makes hosts on this machine that one network connects.

    Yields for each host the first arguments of a command line that runs in it.
    """
    # A random name, since several processes may make hosts; Linux allows 15 letters.
    prefix = f"rnnt{secrets.token_hex(3)}"
    env = {**os.environ, "PATH": SYSTEM, "prefix": prefix}
    try:
        made = subprocess.run(["bash", "-ec", MAKE_HOSTS], env=env, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"hosts need root and iproute2: {made.stderr.strip()}")
        yield [["ip", "netns", "exec", f"{prefix}-{i}"] for i in range(1, HOSTS + 1)]
    finally:
        subprocess.run(["bash", "-c", REMOVE_HOSTS], env=env, capture_output=True)


@pytest.fixture
def cluster(tmp_path, hosts):
    """A script that is called like ssh and reaches the hosts, and the first words of a command on
    the first host. The hosts share this machine's file system and nothing else."""
    for program in ("sshd", "ssh", "ssh-keygen", "mpirun"):
        if shutil.which(program, path=SYSTEM) is None:
            pytest.skip(f"there is no {program}")
    folder = tmp_path / "ssh"
    folder.mkdir()
    os.makedirs("/run/sshd", exist_ok=True)  # sshd refuses to start without it
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    config = folder / "sshd_config"
    config.write_text(
        f"Port 2222\nHostKey {key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\n"
        "PidFile none\n"
    )
    write_script(
        folder / "ssh",
        f"#!/bin/sh\nexec ssh -F none -p 2222 -i {key} -o StrictHostKeyChecking=no"
        ' -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    )
    sshd = [shutil.which("sshd", path=SYSTEM), "-D", "-f", config]
    daemons = [subprocess.Popen([*host, *sshd], env={"PATH": SYSTEM}) for host in hosts]
    yield folder / "ssh", hosts[0]
    for daemon in daemons:
        daemon.terminate()
        daemon.wait()


def start_on_first_host(run, cluster, addresses, *flags):
    ssh, first = cluster
    (run.folder / "hosts").write_text("\n".join(addresses))
    return run.start(*flags, command=[*first, "bash", "run.sh"], PATH=SYSTEM, RANKS="",
                     SSH=str(ssh), I_MPI_HYDRA_IFACE="eth0")


@pytest.mark.slow
def test_four_hosts_compute_what_one_process_computes(cluster, run):
    # Dropout depends on the rank, and bfloat16 rounds too much for a comparison.
    flags = [*SIMPLE, "--epochs", "1", "--precision", "fp32", "--enc-dropout", "0",
             "--pred-dropout", "0", "--joint-dropout", "0"]
    addresses = [f"{SUBNET}{i + 1}" for i in range(HOSTS)]
    start_on_first_host(run, cluster, addresses, *flags, "--batch-size", "2")
    assert run.expect_end(600) == 0, run.output()
    assert f"1 on {', '.join(addresses)}, by " in run.output()
    (start,) = events(run.out, "start")
    assert start["ranks"] == HOSTS

    alone = [sys.executable, "train.py", "--data", "data/demo", "--train-splits", "train-demo",
             "--dev-split", "dev-demo", "--out", "out/alone", *FLAGS, *flags]
    subprocess.run(
        [*alone, "--batch-size", str(2 * HOSTS)], cwd=run.folder, check=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ours, expected = (events(run.folder / "out" / name, "step") for name in ("demo", "alone"))
    assert len(ours) == 4
    # The terms of a step are summed in another order, which later steps amplify.
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-3)):
        assert [e[key] for e in ours] == pytest.approx([e[key] for e in expected], rel=tolerance)


@pytest.mark.slow
def test_host_that_does_not_answer_is_named(cluster, run):
    start_on_first_host(run, cluster, [f"{SUBNET}1", f"{SUBNET}99"])
    assert run.expect_end(300) == 2
    assert f"{SUBNET}99 (status " in run.output()
