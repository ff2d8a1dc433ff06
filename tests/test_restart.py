# SPDX-License-Identifier: Apache-2.0
"""Nothing is lost: stopped, killed or damaged runs go on as if nothing had happened.

    python -m pytest tests/test_restart.py

Every case is a whole run of train.main on a tiny corpus, stopped in one way or other at a chosen
step, and compared with a run that was never stopped: same losses in log.jsonl, same bytes of
weights. The slowest kills processes at 50 random moments.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import soundfile
import torch
from tones import REPO, TINY, checkpoints, events, live, run_train, tiny_corpus

import train
from checkpoint import (
    CHECKPOINT_FORMAT,
    DamagedCheckpoint,
    digest,
    load_checkpoint,
    save_checkpoint,
)

LAST = "checkpoint-00000012.pt"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(corpus, monkeypatch):
    """run(out, *words, at={step: action}) -> exit status; an action happens before its step."""
    handlers = {number: signal.getsignal(number) for number in train.STOP_SIGNALS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as run_train; other numbers round sums otherwise
    real_step = train.train_step

    def start(out, *words, at=None, data_root=corpus):
        def step_with_action(trainer, batches, step, lr):
            if step in (at or {}):
                at[step]()
            return real_step(trainer, batches, step, lr)

        monkeypatch.setattr(train, "train_step", step_with_action)
        argv = ["train.py", "--data", str(data_root), "--out", str(out), *TINY, *map(str, words)]
        monkeypatch.setattr(sys, "argv", argv)
        return train.main()

    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_flush_denormal(False)  # main turns it on for good
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """words -> run directory of three epochs without a stop."""
    made = {}

    def directory(*words, launcher=()):
        key = (words, tuple(launcher))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            done = run_train(corpus, made[key], *words, launcher=launcher)
            assert done.returncode == 0, done.stderr
        return made[key]

    return directory


class Killed(BaseException):
    """Ends a run like SIGKILL: nothing in the program handles it."""


def kill():
    raise Killed


def send(number):
    return lambda: os.kill(os.getpid(), number)


def assert_same_run(out, expected):
    """Steps, epochs and evaluations in the log, and everything in the last checkpoint."""
    for kind, keys in (("step", ("step", "epoch", "loss", "lr", "grad_norm")),
                       ("epoch", ("epoch", "loss")), ("eval", ("epoch", "errors"))):
        ours, theirs = ([[e[k] for k in keys] for e in events(d, kind)] for d in (out, expected))
        assert ours == theirs, kind
    ours, theirs = (load_checkpoint(d / LAST) for d in (out, expected))
    for part in ("model", "ema", "optimizer"):
        assert digest(ours[part]) == digest(theirs[part]), part
    for name in ("epoch", "batch", "step", "loss_sum", "best_wer", "evaluated"):
        assert ours["progress"][name] == theirs["progress"][name]
    ours, theirs = (load_checkpoint(d / "best.pt") for d in (out, expected))
    assert digest(ours["ema"]) == digest(theirs["ema"])


# ------------------------------------------------------------------------------ stops and restarts


@pytest.mark.parametrize("step", [2, 4, 5, 12])
def test_a_run_killed_before_any_step_goes_on_as_if_nothing_had_happened(
    run, whole, tmp_path, step
):
    with pytest.raises(Killed):
        run(tmp_path, "--checkpoint-every-s", 0, at={step: kill})
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


def test_a_run_without_periodic_checkpoints_repeats_the_epoch(run, whole, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, at={7: kill})
    assert [e["step"] for e in events(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(tmp_path) == ["checkpoint-00000004.pt"]
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--precision", "bf16"), ("--accumulation", "2")],
                         ids=["bf16", "accumulation"])
def test_resuming_is_exact_in_other_modes_too(run, whole, tmp_path, words):
    words = (*words, "--epochs", 6) if "--accumulation" in words else words
    with pytest.raises(Killed):
        run(tmp_path, *words, "--checkpoint-every-s", 0, at={6: kill})
    assert run(tmp_path, *words, "--resume") == 0
    assert_same_run(tmp_path, whole(*words))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_resume_exactly(corpus, whole, tmp_path, precision):
    words = ("--batch-size", 1, "--precision", precision)
    stopped = run_train(corpus, tmp_path, *words, "--time-limit-s", 1e-6, launcher=TORCHRUN)
    assert stopped.returncode != 0
    assert events(tmp_path)[-1]["reason"] == "time limit"
    done = run_train(corpus, tmp_path, *words, "--resume", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    expected = whole(*words, launcher=TORCHRUN)
    losses = [[(e["step"], e["loss"], e["grad_norm"]) for e in events(d, "step")]
              for d in (tmp_path, expected)]
    assert losses[0] == losses[1]
    kept = [e for e in events(tmp_path, "eval") if e["step"] % 4 == 0]  # one more at the stop
    assert [e["errors"] for e in kept] == [e["errors"] for e in events(expected, "eval")]
    ours, theirs = (load_checkpoint(d / LAST) for d in (tmp_path, expected))
    for part in ("model", "ema", "optimizer"):
        assert digest(ours[part]) == digest(theirs[part]), part


@pytest.mark.parametrize("number", train.STOP_SIGNALS)
@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_ends_the_run_after_the_step_with_a_status_of_its_own(
    run, whole, tmp_path, number, step
):
    assert run(tmp_path, at={step: send(number)}) == 128 + number
    assert events(tmp_path)[-1]["reason"] == number.name
    assert checkpoints(tmp_path)[-1] == f"checkpoint-{step:08d}.pt"
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


def test_the_time_limit_has_a_status_of_its_own_and_one_step_is_done_before_it(run, tmp_path):
    assert run(tmp_path, "--time-limit-s", 1e-6) == 75
    assert checkpoints(tmp_path) == ["checkpoint-00000001.pt"]
    assert events(tmp_path)[-1]["reason"] == "time limit"
    assert run(tmp_path, "--time-limit-s", 1e-6, "--resume") == 75
    assert checkpoints(tmp_path)[-1] == "checkpoint-00000002.pt"


def test_a_run_killed_while_it_evaluates_evaluates_again(run, whole, tmp_path, monkeypatch):
    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *_: kill())
    with pytest.raises(Killed):
        run(tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-00000004.pt"]  # written before
    monkeypatch.setattr(train, "evaluate", real)
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


def test_killed_between_best_and_checkpoint_there_is_one_best(run, whole, tmp_path, monkeypatch):
    """The evaluation is repeated; its result is found best again."""
    real, saved = save_checkpoint, []

    def save(path, checkpoint):
        saved.append(path.name)
        if saved[-2:-1] == ["best.pt"]:
            kill()
        real(path, checkpoint)

    monkeypatch.setattr(train, "save_checkpoint", save)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.setattr(train, "save_checkpoint", real)
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


def test_a_finished_run_is_left_as_it_is(run, whole, tmp_path):
    assert run(tmp_path) == 0
    before = (tmp_path / LAST).read_bytes()
    assert run(tmp_path, "--resume") == 0
    assert (tmp_path / LAST).read_bytes() == before
    assert events(tmp_path)[-1]["reason"] == "epochs"


def test_a_rank_that_cannot_begin_has_hydra_end_the_others(run, tmp_path, monkeypatch, capsys):
    reading, writing = os.pipe()
    monkeypatch.setenv("PMI_FD", str(writing))
    with pytest.raises(SystemExit, match="1"):
        run(tmp_path, data_root=tmp_path / "none")
    assert os.read(reading, 100) == b"cmd=abort exitcode=1\n"
    assert capsys.readouterr().err.count("none/train: no such folder") == 1
    os.close(reading)
    os.close(writing)


def test_a_run_looks_for_all_bad_signs_and_computes_without_denormal_numbers(
    run, tmp_path, monkeypatch
):
    looked = Counter()
    for name in ("warn_of_gradient", "warn_of_waiting", "warn_of_epoch", "warn_of_evaluation"):
        monkeypatch.setattr(train.report, name, lambda *_, name=name: looked.update([name]))
    assert run(tmp_path) == 0
    assert looked == {"warn_of_gradient": 12, "warn_of_waiting": 12, "warn_of_epoch": 3,
                      "warn_of_evaluation": 3}
    assert not (torch.tensor([1e-40]) * torch.ones(1)).any()


def test_a_run_directory_has_one_run_at_a_time(run, tmp_path):
    program = (
        "import sys, checkpoint\nfrom pathlib import Path\n"
        "lock = checkpoint.lock_run(Path(sys.argv[1]))\n"
        "print('locked', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPO, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        (tmp_path / "log.jsonl").write_text("of the other run\n")
        with pytest.raises(ValueError, match=f"{tmp_path}: another run writes there"):
            run(tmp_path)
        assert (tmp_path / "log.jsonl").read_text() == "of the other run\n"
        other.kill()
    found = []

    def try_to_lock():
        done = subprocess.run(command, cwd=REPO, text=True, capture_output=True, input="")
        found.append(done.stderr.splitlines()[-1])

    # Worker processes that the run has started hold no lock of their own.
    assert run(tmp_path, "--time-limit-s", 1e-6, "--loader-workers", 1, at={1: try_to_lock}) == 75
    assert f"{tmp_path}: another run writes there" in found[0]


def test_what_was_half_written_goes_at_the_next_start(run, tmp_path):
    assert run(tmp_path, "--checkpoint-every-s", 0, at={3: send(signal.SIGTERM)}) == 143
    for name in ("checkpoint-00000002.partial", "best.partial"):
        (tmp_path / name).write_bytes(b"half")
    assert run(tmp_path, "--resume") == 0
    assert not list(tmp_path.glob("*.partial"))


def test_checkpoints_that_do_not_name_their_dev_split_are_resumed(run, whole, tmp_path):
    assert run(tmp_path, at={7: send(signal.SIGTERM)}) == 143
    path = tmp_path / checkpoints(tmp_path)[-1]
    stored = load_checkpoint(path)
    del stored["dev"]
    save_checkpoint(path, stored)
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


def test_a_second_ctrl_c_ends_at_once(run, tmp_path, capfd):
    def press_twice(seconds):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    assert run(tmp_path, at={2: lambda: press_twice(0.1)}) == 130  # passed on by a launcher
    assert "stops after this step; Ctrl-C again" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--resume", at={3: lambda: press_twice(1.1)})


def test_another_dev_split_is_scored_before_anything_is_said_of_it(run, tmp_path):
    assert run(tmp_path, "--epochs", 1, "--target-wer", 1) == 0
    best = events(tmp_path, "end")[-1]["best_wer"]
    assert run(tmp_path, "--resume", "--epochs", 1, "--dev-split", "train") == 0
    first, second = events(tmp_path, "eval")
    assert first["wer"] == best
    assert second["words"] != first["words"]
    assert events(tmp_path, "end")[-1]["best_wer"] == second["wer"]
    stored = load_checkpoint(tmp_path / "best.pt")["progress"]
    assert stored["best_wer"] == second["wer"]


def test_more_epochs_continue_a_finished_run(run, whole, tmp_path):
    assert run(tmp_path, "--epochs", 2) == 0
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


@pytest.mark.parametrize(("words", "why"), [
    (("--batch-size", 500), "8 training utterances, fewer than a batch of 500"),
    (("--profile", "--batch-size", 4), "--profile: 2 steps in an epoch"),
    (("--vocab-size", 5), "vocab_size: 5, blank included"),
])
def test_restart_deletes_nothing_for_a_run_that_cannot_begin(run, tmp_path, words, why):
    run(tmp_path, "--time-limit-s", 1e-6)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=why):
        run(tmp_path, "--restart", *words)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_restart_deletes_the_run_and_nothing_else(run, whole, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    run(tmp_path, "--time-limit-s", 1e-6)
    assert run(tmp_path, "--restart") == 0
    assert_same_run(tmp_path, whole())
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_copies_of_checkpoints_are_the_users(run, tmp_path):
    """Neither resumed from, nor deleted, nor among the two that stay."""
    names = ["checkpoint-00000001-good.pt", "checkpoint-keep.pt", "corpus.tar.gz.partial"]
    for name in names:
        (tmp_path / name).write_text("mine")
    run(tmp_path, "--checkpoint-every-s", 0, at={7: send(signal.SIGTERM)})
    assert run(tmp_path, "--resume") == 0
    assert len(checkpoints(tmp_path)) == 4
    assert run(tmp_path, "--restart", "--epochs", 1) == 0
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * 3


@pytest.mark.parametrize(("flag", "name", "value"), [
    ("--weight-decay", "weight_decay", 0.5), ("--epsilon", "epsilon", 1e-3),
    ("--beta1", "betas", (0.5, 0.999)),
])
def test_a_resumed_run_heeds_its_own_flags_of_the_optimiser(run, tmp_path, flag, name, value):
    run(tmp_path, "--epochs", 1)
    assert run(tmp_path, "--resume", flag, value[0] if name == "betas" else value) == 0
    (group,) = load_checkpoint(tmp_path / LAST)["optimizer"]["param_groups"]
    assert group[name] == value
    assert group["step"] == 12


def test_best_alone_is_a_run_too(run, tmp_path):
    run(tmp_path, "--epochs", 1)
    for name in checkpoints(tmp_path):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="best.pt exists: give --resume"):
        run(tmp_path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        run(tmp_path, "--resume")


def test_another_global_batch_goes_on_at_the_next_epoch_and_says_so(run, tmp_path, capsys):
    recipe = train.RECIPES["demo"]
    run(tmp_path, at={6: send(signal.SIGTERM)})  # two steps into the second epoch
    capsys.readouterr()
    assert run(tmp_path, "--resume", "--batch-size", 4) == 0
    said = capsys.readouterr().out
    assert "was 1 x 2 x 1, now 1 x 4 x 1: goes on at epoch 3" in said
    steps = events(tmp_path, "step")
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    # The schedule counts steps of the new size, two an epoch: these are its fifth and sixth.
    assert [e["lr"] for e in steps[-2:]] == [
        train.lr_at(step, 3, 0.2, 1, recipe["hold_epochs"], 2, recipe["lr_gamma"], 1e-5)
        for step in (5, 6)
    ]
    assert [e["epoch"] for e in events(tmp_path, "eval")] == [1, 2, 3]


def test_after_a_change_to_larger_batches_the_new_checkpoints_stay(run, tmp_path, capsys):
    """Larger batches make fewer steps an epoch; the number of a checkpoint rises all the same."""
    assert run(tmp_path) == 0  # 12 steps
    assert run(tmp_path, "--resume", "--batch-size", 4, "--epochs", 5) == 0  # two an epoch
    assert checkpoints(tmp_path) == ["checkpoint-00000014.pt", "checkpoint-00000016.pt"]
    assert [e["step"] for e in events(tmp_path, "step")] == list(range(1, 17))
    capsys.readouterr()
    assert run(tmp_path, "--resume", "--batch-size", 4, "--epochs", 6) == 0
    assert "resumed at step 16, epoch 6" in capsys.readouterr().out
    assert [e["epoch"] for e in events(tmp_path, "eval")] == [1, 2, 3, 4, 5, 6]


def test_another_seed_goes_on_at_the_next_epoch(run, tmp_path, capsys):
    """In the middle of an epoch it would take some utterances twice and others not at all."""
    run(tmp_path, at={6: send(signal.SIGTERM)})
    assert run(tmp_path, "--resume", "--seed", 2) == 0
    assert "seed was 1, now 2: goes on at epoch 3" in capsys.readouterr().out
    assert [e["epoch"] for e in events(tmp_path, "step")] == [1] * 4 + [2] * 2 + [3] * 4


def test_a_run_of_buckets_by_recorded_length_goes_on_at_the_next_epoch(run, tmp_path, capsys):
    """Its checkpoints do not say so, for there was nothing else."""
    run(tmp_path, at={6: send(signal.SIGTERM)})
    path = tmp_path / "checkpoint-00000006.pt"
    checkpoint = load_checkpoint(path)
    del checkpoint["order"]["length in buckets"]
    save_checkpoint(path, checkpoint)
    assert run(tmp_path, "--resume") == 0
    assert "length in buckets was as recorded, now after speed" in capsys.readouterr().out
    assert [e["epoch"] for e in events(tmp_path, "step")] == [1] * 4 + [2] * 2 + [3] * 4


def test_another_training_set_goes_on_at_the_next_epoch(run, own_corpus, tmp_path, capsys):
    out = tmp_path / "run"
    run(out, data_root=own_corpus, at={6: send(signal.SIGTERM)})
    transcript = own_corpus / "train" / "1" / "2" / "1-2.trans.txt"
    transcript.write_text(transcript.read_text().replace("THREE ONE TWO", "ONE"))
    assert run(out, "--resume", data_root=own_corpus) == 0
    assert "training set was 8 utterances, sha256" in capsys.readouterr().out
    assert [e["epoch"] for e in events(out, "step")] == [1] * 4 + [2] * 2 + [3] * 4


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_at_the_next_epoch(corpus, tmp_path):
    stopped = run_train(corpus, tmp_path, "--time-limit-s", 1e-6)
    assert stopped.returncode == 75, stopped.stderr
    done = run_train(corpus, tmp_path, "--resume", "--batch-size", 1, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "was 1 x 2 x 1, now 2 x 1 x 1: goes on at epoch 2" in done.stdout
    assert [e["epoch"] for e in events(tmp_path, "epoch")] == [2, 3]


# ------------------------------------------------------------------------------------------- damage


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_damaged_newest_checkpoint_is_passed_over(run, whole, tmp_path, capsys, damage):
    run(tmp_path, "--checkpoint-every-s", 0, at={7: send(signal.SIGTERM)})
    assert checkpoints(tmp_path) == ["checkpoint-00000006.pt", "checkpoint-00000007.pt"]
    damage(tmp_path / "checkpoint-00000007.pt")
    capsys.readouterr()
    assert run(tmp_path, "--resume") == 0
    assert "checkpoint-00000007.pt" in capsys.readouterr().out.splitlines()[0]
    assert_same_run(tmp_path, whole())


def test_a_damaged_checkpoint_is_not_one_of_the_two_that_stay(run, tmp_path):
    run(tmp_path, "--checkpoint-every-s", 0, at={7: send(signal.SIGTERM)})
    for number in (7, 9):
        damaged = tmp_path / f"checkpoint-{number:08d}.pt"
        damaged.write_bytes((tmp_path / "checkpoint-00000006.pt").read_bytes()[:-100])
    run(tmp_path, "--resume", at={8: send(signal.SIGTERM)})
    assert checkpoints(tmp_path) == ["checkpoint-00000006.pt", "checkpoint-00000008.pt"]


def test_without_a_readable_checkpoint_nothing_is_done(run, tmp_path):
    run(tmp_path, "--checkpoint-every-s", 0, at={3: send(signal.SIGTERM)})
    for name in checkpoints(tmp_path):
        flip(tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"no readable checkpoint-\*.pt to resume; --restart"):
        run(tmp_path, "--resume")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_flipped_bit_is_noticed(whole, tmp_path):
    contents = (whole() / LAST).read_bytes()
    path = tmp_path / "flipped.pt"
    noticed = 0
    version = contents.index(b"format")  # decides what kind of error there is
    places = [*range(version, version + 12), *random.Random(1).sample(range(len(contents)), 60)]
    for place in places:
        spoilt = bytearray(contents)
        spoilt[place] ^= 1 << place % 8
        path.write_bytes(spoilt)
        try:
            found = load_checkpoint(path)
        except DamagedCheckpoint:
            noticed += 1
        else:  # a bit of the archive's own bookkeeping that no value depends on
            assert digest(found) == digest(load_checkpoint(whole() / LAST))
    assert noticed > 30


def test_a_checkpoint_of_another_format_is_refused_and_not_passed_over(run, whole, tmp_path):
    run(tmp_path, "--time-limit-s", 1e-6)
    path = tmp_path / "checkpoint-00000001.pt"
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, checkpoint | {"format": 1})
    with pytest.raises(ValueError, match="00000001.pt: format 1, this version reads"):
        run(tmp_path, "--resume")


# ------------------------------------------------------------------------------------ full disks


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_the_previous_checkpoint(corpus, tmp_path):
    """A limit on the size of files does what a full disk does: writing fails in the middle."""
    first = run_train(corpus, tmp_path, "--epochs", 1)
    assert first.returncode == 0, first.stderr
    size = (tmp_path / "checkpoint-00000004.pt").stat().st_size
    before = (tmp_path / "checkpoint-00000004.pt").read_bytes()
    command = [sys.executable, str(REPO / "train.py"), "--data", str(corpus), "--out",
               str(tmp_path), *TINY, "--resume"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))  # noqa: E731
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=300,
                          check=False)
    assert done.returncode == 1
    assert "checkpoint-00000008.pt could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoints(tmp_path) == ["checkpoint-00000004.pt"]
    assert (tmp_path / "checkpoint-00000004.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_vanished_run_directory_ends_the_run(run, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="run"):
        run(out, at={6: lambda: out.rename(tmp_path / "elsewhere")})
    assert checkpoints(tmp_path / "elsewhere") == ["checkpoint-00000004.pt"]


def test_a_log_that_cannot_be_written_is_named(run, tmp_path):
    """It is written in every step, so that a full disk mostly shows there first."""

    def fill():
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").symlink_to("/dev/full")

    with pytest.raises(OSError, match="log.jsonl could not be written: No space left on device"):
        run(tmp_path, at={6: fill})
    assert checkpoints(tmp_path) == ["checkpoint-00000004.pt"]


def test_a_run_directory_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run")


# ---------------------------------------------------------------- files that go bad in training


@pytest.fixture
def own_corpus(tmp_path):
    return tiny_corpus(tmp_path / "corpus")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_that_goes_bad_ends_the_run_with_a_checkpoint(
    run, whole, own_corpus, tmp_path, workers
):
    path = own_corpus / "train" / "1" / "2" / "1-2-0003.flac"
    good = path.read_bytes()
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="1-2-0003.flac: truncated"):
        run(out, "--loader-workers", workers, data_root=own_corpus,
            at={4: lambda: path.write_bytes(good[:500])})
    path.write_bytes(good)
    assert checkpoints(out)
    assert run(out, "--resume", data_root=own_corpus) == 0
    assert_same_run(out, whole())


def test_a_run_with_workers_that_fails_ends_at_once(own_corpus, tmp_path):
    """Workers ignore SIGTERM; a process that sent it to them and waited would hang."""
    path = own_corpus / "train" / "1" / "2" / "1-2-0003.flac"
    path.unlink()  # in its place a file whose header is good
    soundfile.write(path.with_suffix(".wav"), [0.1, float("nan")] * 3600, 16000, subtype="FLOAT")
    started = time.monotonic()
    done = run_train(own_corpus, tmp_path / "run", "--loader-workers", 2)
    assert done.returncode == 1
    assert "1-2-0003.wav: 3600 samples not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 120  # run_train would wait for 600 s


def test_skip_bad_goes_on_without_the_file_and_counts_it(run, own_corpus, tmp_path, capsys):
    path = own_corpus / "train" / "1" / "2" / "1-2-0003.flac"
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match="left out: .*1-2-0003.flac"):
        status = run(out, "--skip-bad", data_root=own_corpus, at={4: path.unlink})
    assert status == 0
    assert len(events(out, "step")) == 12
    said = capsys.readouterr().out
    assert "epoch 2 | 1 bad utterances left out" in said
    assert "epoch 3 | 1 bad utterances left out" in said


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_dev_file_that_goes_bad_ends_the_run_in_one_line(own_corpus, tmp_path, workers):
    path = own_corpus / "dev" / "1" / "2" / "1-2-0001.flac"
    path.unlink()  # in its place a file whose header is good
    soundfile.write(path.with_suffix(".wav"), [0.1, float("nan")] * 3600, 16000, subtype="FLOAT")
    done = run_train(own_corpus, tmp_path / "run", "--loader-workers", workers)
    assert done.returncode == 1
    said = f"{path.with_suffix('.wav')}: 3600 samples not finite, or larger than 1e+10"
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert events(tmp_path / "run")[-1]["reason"].endswith(said)
    assert checkpoints(tmp_path / "run") == ["checkpoint-00000004.pt"]


def test_another_sample_rate_is_said_once_and_not_by_every_worker(own_corpus, tmp_path):
    path = own_corpus / "train" / "1" / "2" / "1-2-0003.flac"
    samples, rate = soundfile.read(path)
    soundfile.write(path, samples[::2], rate // 2)
    done = run_train(own_corpus, tmp_path / "run", "--loader-workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("8000 Hz, will be resampled") == 1
    assert "audio of" not in done.stderr  # what load_audio warns of


def test_a_batch_of_bad_files_alone_ends_the_run(run, own_corpus, tmp_path):
    def spoil():
        for path in (own_corpus / "train" / "1" / "2").glob("*.flac"):
            path.write_bytes(b"")

    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="none of the utterances of a batch"),
    ):
        run(tmp_path / "run", "--skip-bad", data_root=own_corpus, at={4: spoil})


def test_a_text_that_the_tokenizer_cannot_express_is_named_at_the_start(run, own_corpus, tmp_path):
    run(tmp_path / "run", "--time-limit-s", 1e-6, data_root=own_corpus)
    transcript = own_corpus / "train" / "1" / "2" / "1-2.trans.txt"
    transcript.write_text(transcript.read_text().replace("1-2-0001 TWO", "1-2-0001 ŻÓŁW"))
    with pytest.raises(ValueError, match="1-2-0001: 'ŻÓŁW': the tokenizer has no piece"):
        run(tmp_path / "run", "--resume", data_root=own_corpus)


# ------------------------------------------------------------------------------------ SIGKILL


@pytest.mark.slow
def test_fifty_kills_at_random_moments_lose_nothing(corpus, tmp_path):
    """Each life lasts a random time from the reading of its corpus on; every step is saved."""
    words = ["--checkpoint-every-s", "0", "--lr-gamma", "0.99", "--resume"]
    out, moments, steps, torn = tmp_path / "killed", random.Random(5), 0, 0
    server = multiprocessing.get_context("forkserver")  # forks lives that have imported torch
    server.set_forkserver_preload(["train", "torch._dynamo"])
    for _ in range(50):
        life = server.Process(target=live, args=(corpus, out, *words, "--epochs", "100000"))
        life.start()
        life.join(moments.uniform(0.1, 2.5))
        life.kill()
        life.join()
        assert life.exitcode == -signal.SIGKILL  # it would have gone on
        if (out / "log.jsonl").exists():
            # The last line may be torn, and is cut off by the next life.
            lines = (out / "log.jsonl").read_text().splitlines()
            done = sum('"event": "step"' in line and line.endswith("}") for line in lines)
            assert done >= steps - 1  # what was saved is not lost: one checkpoint a step
            steps = done
        torn += bool(list(out.glob("*.partial")))
        for path in (*out.glob("checkpoint-*.pt"), *out.glob("best.pt")):
            load_checkpoint(path)  # never torn
    assert torn > 0, "no kill hit a checkpoint while it was written"
    assert steps > 50, "the lives were too short to get on"

    last = steps // 4 + 2
    undisturbed = tmp_path / "undisturbed"
    for folder in (out, undisturbed):
        done = run_train(corpus, folder, *words, "--epochs", last)
        assert done.returncode == 0, done.stderr
    for kind, keys in (("step", ("step", "loss")), ("eval", ("epoch", "errors"))):
        ours, theirs = ([[e[k] for k in keys] for e in events(d, kind)] for d in (out, undisturbed))
        assert ours == theirs
    for name in (f"checkpoint-{4 * last:08d}.pt", "best.pt"):
        ours, theirs = (load_checkpoint(d / name) for d in (out, undisturbed))
        for part in ("model", "ema", "optimizer"):
            assert digest(ours[part]) == digest(theirs[part])


def test_a_torn_line_of_the_log_is_removed(run, whole, tmp_path):
    run(tmp_path, at={3: send(signal.SIGTERM)})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert run(tmp_path, "--resume") == 0
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert_same_run(tmp_path, whole())


def test_loading_finds_what_was_saved(tmp_path):
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "x": torch.arange(3),
        "y": (1, [2.5, None]),
    }
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    assert digest(load_checkpoint(tmp_path / "a.pt")) == digest(checkpoint)
