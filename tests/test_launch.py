# SPDX-License-Identifier: Apache-2.0
"""run.sh decides, launches and fails as it says: python -m pytest tests/test_launch.py

Every test runs a copy of run.sh in a folder of its own, among stand-ins (checkout.py). Nothing is
installed, downloaded or trained.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from checkout import PYTHON, REPO, Checkout, line_of
from tones import heed_signals


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", ["run.sh", ".ci/run"])
def test_script_parses(script):
    subprocess.run(["bash", "-n", REPO / script], check=True)


# ---- decisions --------------------------------------------------------------------------------


def test_dry_run_of_the_default(checkout):
    result = checkout.run(DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "corpus  demo in data/demo\n"
        "output  out/demo (new run)\n"
        "cores   4 physical in 1 NUMA nodes behind CPUs 0-7\n"
        "ranks   1 on localhost, by python (one process needs no launcher)\n"
        "set     OMP_NUM_THREADS=4  (4 cores / 1, less 0 for oneCCL)\n"
        "set     KMP_AFFINITY=granularity=fine,compact,1,0  (one thread a core)\n"
        "set     KMP_BLOCKTIME=1  (ms)\n"
        "launch  .venv/bin/python train.py --data data/demo"
        " --train-splits train-demo --dev-split dev-demo --out out/demo --preset demo\n"
    )


def test_dry_run_of_two_ranks(checkout):
    result = checkout.run(DRY_RUN="1", RANKS="2", MASTER_PORT="4711")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "corpus  demo in data/demo\n"
        "output  out/demo (new run)\n"
        "cores   4 physical in 1 NUMA nodes behind CPUs 0-7\n"
        "ranks   2 on localhost, by torchrun (there is no mpirun)\n"
        "backend gloo (oneccl_bindings_for_pytorch is not in .venv)\n"
        "set     OMP_NUM_THREADS=2  (4 cores / 2, less 0 for oneCCL)\n"
        "set     KMP_AFFINITY=granularity=fine,compact,1,0  (one thread a core)\n"
        "set     KMP_BLOCKTIME=1  (ms)\n"
        "set     I_MPI_PIN_DOMAIN=[0x3,0xc,]  (cores of each rank)\n"
        "set     MASTER_ADDR=127.0.0.1  (host of rank 0)\n"
        "set     MASTER_PORT=4711  (as you set it)\n"
        "set     TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  (s for a step and its checkpoint; "
        "torchrun's own are 30)\n"
        "launch  .venv/bin/python -m torch.distributed.run --nnodes 1 --nproc-per-node 2"
        " --master-addr 127.0.0.1 --master-port 4711 train.py --data data/demo"
        " --train-splits train-demo --dev-split dev-demo --out out/demo --preset demo"
        " --ranks 2 --backend gloo\n"
    )


def test_dry_run_starts_and_writes_nothing(checkout):
    shutil.rmtree(checkout.root / ".venv")
    before = sorted(checkout.root.rglob("*"))
    assert checkout.run(DRY_RUN="1").returncode == 0
    assert checkout.run("test", DRY_RUN="1").returncode == 0
    assert sorted(checkout.root.rglob("*")) == before


def test_three_training_splits_reach_train_py(checkout):
    result = checkout.run(DRY_RUN="1", CORPUS="librispeech-960", DATA="/mnt/speech")
    expected = (
        "--train-splits train-clean-100 train-clean-360 train-other-500 --dev-split dev-clean"
    )
    assert f"--data /mnt/speech {expected} --out out/librispeech-960" in line_of(result, "launch")


def test_omp_num_threads_of_the_user_wins(checkout):
    checkout.run(OMP_NUM_THREADS="3")
    assert checkout.calls("train.py")[0].endswith("|threads=3")
    assert len(checkout.calls("decode.py")) == 2
    assert all(call.endswith("|threads=3") for call in checkout.calls("decode.py"))


@pytest.mark.parametrize(
    "knob", [{"CORPUS": "timit"}, {"RANKS": "0"}, {"RANKS": "two"}, {"LAUNCHER": "srun"},
             {"BACKEND": "nccl"}, {"HOSTS": "nowhere"}, {"DRY_RUN": "true"}],
)
def test_unknown_value_of_a_knob_is_an_error(checkout, knob):
    result = checkout.run(**knob)
    name, value = next(iter(knob.items()))
    assert result.returncode == 2
    assert f"{name}={value}" in result.stderr
    assert checkout.calls() == []


def test_both_environments_differ_in_torch_and_intels_packages_alone():
    plain, intel = (
        {line.split("#")[0].strip() for line in (REPO / name).read_text().splitlines()} - {""}
        for name in ("requirements.txt", "requirements-intel.txt")
    )
    assert {line.split("==")[0] for line in plain - intel} == {"torch"}
    assert {line.split("==")[0].split(">=")[0] for line in intel - plain} == {
        "torch", "intel_extension_for_pytorch", "impi-rt", "intel-openmp"
    }


def test_help_among_the_words_is_for_the_reader(checkout):
    result = checkout.run("--epochs", "1", "--help")
    assert result.returncode == 0
    assert "RANKS=2 bash run.sh --epochs 20" in result.stdout
    assert checkout.calls() == []


# ---- steps ------------------------------------------------------------------------------------


def test_steps_run_in_order_and_scoring_takes_every_core(checkout):
    assert checkout.run(RANKS="2").returncode == 0
    prepare, train, score, transcribe = checkout.calls()
    assert prepare.startswith("-m|tools.prepare|demo|data/demo|")
    assert train.startswith("-m|torch.distributed.run|--nnodes|1|--nproc-per-node|2|--master-addr|")
    assert train.endswith("|threads=2")
    checkpoint = "decode.py|--checkpoint|out/demo/best.pt|"
    assert score == f"{checkpoint}--data|data/demo|--split|dev-demo|threads=4"
    assert transcribe.startswith(checkpoint)


@pytest.mark.parametrize("kind", ["flac", "wav"])
def test_first_three_transcripts_stand_above_their_references(checkout, kind):
    chapter = checkout.root / "data/demo/dev-demo/7/9"
    chapter.mkdir(parents=True)
    for number in (3, 1, 0, 2):
        (chapter / f"7-9-000{number}.{kind}").touch()
    (chapter / f"._7-9-0000.{kind}").touch()
    (chapter / "7-9.trans.txt").write_text("".join(f"7-9-000{n} SAID {n} SO\n" for n in range(4)))
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(
        "".join(
            f"data/demo/dev-demo/7/9/7-9-000{n}.{kind}\n"
            f"  hypothesis  HEARD 7-9-000{n}.{kind}\n"
            f"  reference   SAID {n} SO\n"
            for n in range(3)
        )
    )


def test_words_reach_train_py_intact_and_last(checkout):
    assert checkout.run("--note", "two words", "", "a*b", "--preset=baseline").returncode == 0
    (train,) = checkout.calls("train.py")
    assert "|--preset|demo|--note|two words||a*b|--preset=baseline|threads=" in train


@pytest.mark.parametrize("words", [["--out", "my run"], ["--out=my run"]])
def test_out_among_the_words_is_where_scoring_looks(checkout, words):
    assert checkout.run(*words).returncode == 0
    score, transcribe = checkout.calls("decode.py")
    assert score.startswith("decode.py|--checkpoint|my run/best.pt|")
    assert transcribe.startswith("decode.py|--checkpoint|my run/best.pt|")


def test_data_and_dev_split_among_the_words_are_prepared_and_scored(checkout):
    assert checkout.run("--dev-split", "dev-other", "--data", "corpus").returncode == 0
    assert checkout.calls("-m|tools.prepare")[0].startswith("-m|tools.prepare|demo|corpus|")
    assert "|--data|corpus|--split|dev-other|" in checkout.calls("decode.py")[0]


@pytest.mark.parametrize(
    ("there", "words", "is_prepared"),
    [
        (["a", "b", "dev-demo"], ["--train-splits", "a", "b", "--epochs", "1"], False),
        (["a", "dev-demo"], ["--train-splits", "a", "b", "--epochs", "1"], True),
        (["a", "b"], ["--train-splits=a", "--dev-split", "b"], False),
        (["train-demo", "dev-demo"], [], False),  # --data alone says whose corpus it is
        (["train-demo", "dev-demo", "recipe.txt"], [], True),  # it may be of another version
        (["train-demo"], [], True),
    ],
)
def test_a_corpus_that_is_there_is_not_prepared(checkout, there, words, is_prepared):
    for name in there:
        (checkout.root / "corpus" / name).mkdir(parents=True)
    assert checkout.run("--data", "corpus", *words).returncode == 0
    assert len(checkout.calls("-m|tools.prepare")) == is_prepared


def test_a_corpus_that_may_be_incomplete_is_looked_at(checkout):
    for name in ("train-clean-5", "dev-clean-2"):
        (checkout.root / "libri" / name).mkdir(parents=True)
    assert checkout.run(CORPUS="mini-librispeech", DATA="libri").returncode == 0
    assert len(checkout.calls("-m|tools.prepare")) == 1


@pytest.mark.parametrize("name", ["best.pt", "checkpoint-00000012.pt"])
def test_run_with_a_checkpoint_is_resumed(checkout, name):
    (checkout.root / "out/demo").mkdir(parents=True)
    (checkout.root / "out/demo" / name).touch()
    resumed = checkout.run(DRY_RUN="1")
    assert line_of(resumed, "output") == "output  out/demo (has a checkpoint, so --resume)"
    assert line_of(resumed, "launch").endswith(" --resume")
    assert line_of(checkout.run("--resume", DRY_RUN="1"), "launch").count("--resume") == 1
    assert "--resume" not in checkout.run("--out", "other", DRY_RUN="1").stdout
    for word in ("--no-resume", "--restart"):
        assert " --resume" not in checkout.run(word, DRY_RUN="1").stdout


def make_dev_split(checkout):
    """With a file to transcribe."""
    chapter = checkout.root / "data/demo/dev-demo/7/9"
    chapter.mkdir(parents=True)
    (chapter / "7-9-0000.flac").touch()


# ---- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "calls"), [("tools.prepare", 1), ("train.py", 2), ("--split", 3), ("best.pt data", 4)]
)
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_status_of_a_failing_step_is_ours_and_ends_the_run(checkout, step, calls, ranks):
    make_dev_split(checkout)
    assert checkout.run(FAIL=step, RANKS=ranks).returncode == 3
    assert len(checkout.calls()) == calls


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_one_failing_rank_fails_the_run(checkout, failing_rank):
    """The real launcher, and a train.py whose other rank would go on for a minute."""
    checkout.script(
        "train.py",
        "import os, sys, time\n"
        f"if os.environ['RANK'] == '{failing_rank}': sys.exit('lost')\n"
        "time.sleep(60)\n",
    )
    launcher = f'case "$2" in torch*) exec "{sys.executable}" "$@" ;; esac\n'
    checkout.script(".venv/bin/python", PYTHON + launcher)
    result = checkout.run(RANKS="2")
    assert result.returncode == 1, result.stderr
    assert "lost" in result.stderr
    assert checkout.calls("decode.py") == []


@pytest.mark.parametrize(
    ("step", "number", "status"),
    [
        ("-m pip install", signal.SIGINT, 130),
        ("tools.prepare", signal.SIGTERM, 143),
        ("train.py", signal.SIGINT, 130),
        ("train.py", signal.SIGTERM, 143),
        ("train.py", signal.SIGHUP, 129),
        ("train.py", signal.SIGUSR1, 138),
        ("best.pt data", signal.SIGTERM, 143),
    ],
)
def test_signal_ends_the_step_and_what_it_started(checkout, step, number, status):
    """The second of its processes ignores SIGINT, as shells have background processes do."""
    make_dev_split(checkout)
    (checkout.root / ".venv/requirements.txt").unlink()
    checkout.script(
        ".venv/bin/python",
        f'#!/bin/sh\ncase "$*" in *"{step}"*) sleep 600 & echo "$$ $!" >> pids; wait ;; esac\n',
    )
    expect_end_by_signal(checkout, number, status, processes=2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_wait_for_hosts(checkout, number, status):
    checkout.script("stand-ins/mpirun", "#!/bin/sh\necho 'Intel(R) MPI'\n")
    (checkout.root / "hosts").write_text("a\nb\n")
    checkout.script("my-ssh", '#!/bin/sh\necho "$$" >> pids\nexec sleep 600\n')
    expect_end_by_signal(checkout, number, status, processes=2, SSH="./my-ssh")


def expect_end_by_signal(checkout, number, status, processes, **env):
    """Once that many wrote their ids to `pids`; none of them may be left."""
    child = subprocess.Popen(
        ["bash", checkout.root / "run.sh"], stdout=subprocess.DEVNULL,
        env={"PATH": f"{checkout.root}/stand-ins", "CGROUPS": "none", **env},
        preexec_fn=heed_signals,
    )
    pids = checkout.root / "pids"
    while not (pids.exists() and len(pids.read_text().split()) == processes):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(number)
    assert child.wait(timeout=60) == status
    time.sleep(0.5)  # what run.sh has signalled and does not wait for
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# ---- set-up and tests -------------------------------------------------------------------------


def pip_installs(checkout: Checkout) -> int:
    return len(checkout.calls("-m|pip|install|"))


def test_set_up_makes_the_environment_once(checkout):
    shutil.rmtree(checkout.root / ".venv")
    assert checkout.run().returncode == 0
    assert checkout.calls("python3") == ["python3|-m venv .venv"]
    assert pip_installs(checkout) == 1
    assert checkout.run().returncode == 0
    assert len(checkout.calls("python3")) == 1
    assert pip_installs(checkout) == 1


def test_changed_requirements_are_installed_into_the_same_environment(checkout):
    with (checkout.root / "requirements.txt").open("a") as file:
        file.write("another-package\n")
    assert checkout.run().returncode == 0
    assert checkout.calls("python3") == []
    assert "|--requirement|requirements.txt|" in checkout.calls("-m|pip|install|")[0]


def test_failed_installation_ends_the_run_and_is_repeated(checkout):
    (checkout.root / ".venv/requirements.txt").unlink()
    assert checkout.run(FAIL="pip install").returncode == 3
    assert checkout.calls("-m|tools.prepare") == []
    assert checkout.run().returncode == 0
    assert pip_installs(checkout) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "-m|pytest|-m|not slow|"),
        (["--slow"], "-m|pytest|"),
        (["--slow", "-k", "a or b"], "-m|pytest|-k|a or b|"),
    ],
)
def test_test_runs_pytest(checkout, words, expected):
    assert checkout.run("test", *words, OMP_NUM_THREADS="1").returncode == 0
    assert checkout.calls() == [f"{expected}threads=1"]


def test_test_sets_up_and_returns_the_status_of_pytest(checkout):
    (checkout.root / ".venv/requirements.txt").unlink()
    assert checkout.run("test", FAIL="pytest -m").returncode == 3
    assert pip_installs(checkout) == 1


@pytest.mark.parametrize("corpus", ["mini-librispeech", "librispeech-100", "librispeech-960"])
def test_every_corpus_is_prepared_by_its_name(checkout, corpus):
    assert checkout.run(CORPUS=corpus, DATA="libri").returncode == 0
    assert checkout.calls("-m|tools.prepare") == [f"-m|tools.prepare|{corpus}|libri|threads="]
