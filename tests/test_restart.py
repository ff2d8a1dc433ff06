# SPDX-License-Identifier: Apache-2.0
"""Stopped, killed and damaged runs go on without any loss.

    python -m pytest tests/test_restart.py

Most cases are whole runs of train.main on a tiny corpus, stopped at a chosen step and compared with
a run that was never stopped: the losses in log.jsonl and the weights are equal to the bit.
"""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import soundfile
import torch
from tones import REPO, TINY, checkpoints, events, live, run_train, tiny_corpus

import train
from checkpoint import digest, load_checkpoint, save_checkpoint
from features import FeatureConfig
from model import PRESETS
from ranks import Ranks
from recipe import TrainConfig

LAST = "checkpoint-00000012.pt"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def run(corpus, monkeypatch):
    """run(out, *argv, at={step: action}) -> exit status; an action happens before its step."""
    handlers = {number: signal.getsignal(number) for number in train.STOP_SIGNALS}
    torch.set_num_threads(1)  # as in run_train: the number of threads changes the rounding
    real_step = train.train_step

    def start(out, *argv, at=None, data_root=corpus):
        def step_with_action(trainer, batches, step, *args):
            if step in (at or {}):
                at[step]()
            return real_step(trainer, batches, step, *args)

        monkeypatch.setattr(train, "train_step", step_with_action)
        monkeypatch.setattr(train.Log, "draw", lambda _: None)  # it takes longer than an epoch
        argv = ["train.py", "--data", str(data_root), "--out", str(out), *TINY, *map(str, argv)]
        monkeypatch.setattr(sys, "argv", argv)
        return train.main()

    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Flags -> run directory of three epochs without a stop."""
    made = {}

    def directory(*argv, launcher=()):
        key = (argv, tuple(launcher))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            done = run_train(corpus, made[key], *argv, launcher=launcher)
            assert done.returncode == 0, done.stderr
        return made[key]

    return directory


class Killed(BaseException):
    """Ends a run in this process like SIGKILL: the program does not handle it."""


def kill():
    raise Killed


def send(number):
    return lambda: os.kill(os.getpid(), number)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_events(out, expected, kind, *keys):
    ours, theirs = ([[e[k] for k in keys] for e in events(d, kind)] for d in (out, expected))
    assert ours == theirs, kind


def assert_same_weights(out, expected, name, parts=("model", "ema", "optimizer")):
    ours, theirs = (load_checkpoint(d / name) for d in (out, expected))
    for part in parts:
        assert digest(ours[part]) == digest(theirs[part]), part


def assert_same_run(out, expected):
    """Steps, epochs and evaluations in the log, and everything in the last checkpoint."""
    assert_same_events(out, expected, "step", "step", "epoch", "loss", "lr", "grad_norm")
    assert_same_events(out, expected, "epoch", "epoch", "loss")
    assert_same_events(out, expected, "eval", "epoch", "errors")
    assert_same_weights(out, expected, LAST)
    assert_same_weights(out, expected, "best.pt", ["ema"])
    ours, theirs = (load_checkpoint(d / LAST)["state"] for d in (out, expected))
    for name in ("epoch", "batch", "step", "loss_sum", "loss", "best_wer", "evaluated"):
        assert ours[name] == theirs[name], name


# ------------------------------------------------------------------------------ stops and restarts


@pytest.mark.parametrize(("step", "seconds", "saved"), [
    (2, 0, 1), (5, 0, 4), (12, 0, 11),
    (7, 900, 4),  # without periodic checkpoints the run repeats its second epoch
])
def test_a_run_killed_before_a_step_resumes_to_the_bit(
    run, whole, tmp_path, step, seconds, saved
):
    with pytest.raises(Killed):
        run(tmp_path, "--checkpoint-every-s", seconds, at={step: kill})
    assert [e["step"] for e in events(tmp_path, "step")] == list(range(1, step))
    assert checkpoints(tmp_path)[-1] == f"checkpoint-{saved:08d}.pt"
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


@pytest.mark.slow
@pytest.mark.parametrize("argv", [("--precision", "bf16"), ("--accumulation", 2, "--epochs", 6)],
                         ids=["bf16", "accumulation"])
def test_resuming_is_exact_in_other_modes_too(run, whole, tmp_path, argv):
    with pytest.raises(Killed):
        run(tmp_path, *argv, "--checkpoint-every-s", 0, at={6: kill})
    assert run(tmp_path, *argv, "--resume") == 0
    assert_same_run(tmp_path, whole(*argv))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_resume_exactly(corpus, whole, tmp_path, precision):
    argv = ("--batch-size", 1, "--precision", precision)
    stopped = run_train(corpus, tmp_path, *argv, "--time-limit-s", 1e-6, launcher=TORCHRUN)
    assert stopped.returncode != 0
    assert events(tmp_path)[-1]["reason"] == "time limit"
    done = run_train(corpus, tmp_path, *argv, "--resume", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    expected = whole(*argv, launcher=TORCHRUN)
    assert_same_events(tmp_path, expected, "step", "step", "loss", "grad_norm")
    _, *kept = events(tmp_path, "eval")  # the first one is that of the stop
    assert [e["errors"] for e in kept] == [e["errors"] for e in events(expected, "eval")]
    assert_same_weights(tmp_path, expected, LAST)


@pytest.mark.parametrize(("number", "step"), list(zip(train.STOP_SIGNALS, (2, 4, 2), strict=True)))
def test_a_signal_ends_the_run_after_the_step_with_a_status_of_its_own(
    run, whole, tmp_path, number, step
):
    assert run(tmp_path, at={step: send(number)}) == 128 + number
    assert events(tmp_path)[-1]["reason"] == number.name
    assert checkpoints(tmp_path)[-1] == f"checkpoint-{step:08d}.pt"
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


def test_the_time_limit_stops_with_status_75_after_one_step_and_an_evaluation(run, tmp_path,
                                                                              capsys):
    # With --resume, a directory without a checkpoint gets a new run.
    assert run(tmp_path, "--time-limit-s", 1e-6, "--resume") == 75
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{tmp_path}: no run to resume, a new one begins; --init CHECKPOINT begins it from the "
        "weights of another")
    assert not (torch.tensor([1e-40]) * torch.ones(1)).any()  # denormal numbers count as 0
    assert checkpoints(tmp_path) == ["checkpoint-00000001.pt"]
    assert [e["event"] for e in events(tmp_path)] == ["start", "step", "eval", "end"]
    assert events(tmp_path)[-1]["reason"] == "time limit"
    assert run(tmp_path, "--time-limit-s", 1e-6, "--resume") == 75
    assert checkpoints(tmp_path)[-1] == "checkpoint-00000002.pt"


def test_hours_count_over_restarts(run, tmp_path):
    run(tmp_path, "--time-limit-s", 1e-6)
    run(tmp_path, "--resume")
    seconds = 0.0
    for record in events(tmp_path):
        seconds += record.get("step_s", 0.0) + (record["seconds"] if "wer" in record else 0.0)
        if "hours" in record:
            assert record["hours"] == pytest.approx(seconds / 3600, rel=1e-9)
    assert [e["epochs"] for e in events(tmp_path, "step")] == [n / 4 for n in range(1, 13)]
    assert [e["epochs"] for e in events(tmp_path, "eval")] == [0.25, 1, 2, 3]


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
    """The resumed run repeats the evaluation and writes both."""
    real, saved = save_checkpoint, []

    def save(path, contents):
        saved.append(path.name)
        if saved[-2:-1] == ["best.pt"]:
            kill()
        real(path, contents)

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


def test_a_second_run_in_the_directory_is_refused_and_changes_nothing(run, corpus, tmp_path):
    found = []

    def start_another():
        before = (tmp_path / "log.jsonl").read_bytes()
        found.append(run_train(corpus, tmp_path, "--restart"))
        assert (tmp_path / "log.jsonl").read_bytes() == before

    # The worker process of the first run holds no lock of its own.
    assert run(tmp_path, "--time-limit-s", 1e-6, "--loader-workers", 1,
               at={1: start_another}) == 75
    assert found[0].returncode == 1
    assert f"{tmp_path}: another run writes there" in found[0].stderr
    assert "Traceback" not in found[0].stderr


def test_a_second_ctrl_c_ends_at_once(run, tmp_path, capfd, monkeypatch):
    real, late_s = time.monotonic, [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: real() + late_s[0])

    def press_twice(seconds):
        os.kill(os.getpid(), signal.SIGINT)
        late_s[0] += seconds
        os.kill(os.getpid(), signal.SIGINT)

    # Two signals within a second are one Ctrl-C that a launcher has passed on.
    assert run(tmp_path, at={2: lambda: press_twice(0.1)}) == 130
    assert "stops after this step; Ctrl-C again" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--resume", at={3: lambda: press_twice(1.1)})


def test_another_dev_split_is_evaluated_at_once(run, tmp_path):
    assert run(tmp_path, "--epochs", 1, "--target-wer", 1) == 0
    best = events(tmp_path, "end")[-1]["best_wer"]
    assert run(tmp_path, "--resume", "--epochs", 1, "--dev-split", "train") == 0
    first, second = events(tmp_path, "eval")
    assert first["wer"] == best
    assert second["words"] != first["words"]
    assert events(tmp_path, "end")[-1]["best_wer"] == second["wer"]
    stored = load_checkpoint(tmp_path / "best.pt")["state"]
    assert stored["best_wer"] == second["wer"]


def test_more_epochs_continue_a_finished_run(run, whole, tmp_path):
    assert run(tmp_path, "--epochs", 2) == 0
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


@pytest.mark.parametrize(("argv", "why"), [
    ((), "00000001.pt exists: give --resume to go on, --restart"),
    (("--restart", "--batch-size", 500), "8 training utterances, fewer than a batch of 500"),
    (("--restart", "--profile", "--batch-size", 4), "--profile: 2 steps in an epoch"),
    (("--restart", "--vocab-size", 5), "vocab_size: 5, blank included"),
], ids=["no flag", "batch-size", "profile", "vocab-size"])
def test_a_run_that_cannot_begin_leaves_the_run_of_its_directory(run, tmp_path, argv, why):
    run(tmp_path, "--time-limit-s", 1e-6)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=why):
        run(tmp_path, *argv)
    assert contents(tmp_path) == before


def test_restart_deletes_the_run_and_nothing_else(run, whole, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    run(tmp_path, "--time-limit-s", 1e-6)
    assert run(tmp_path, "--restart") == 0
    assert_same_run(tmp_path, whole())
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_a_resumed_run_takes_the_flags_of_its_optimiser(run, tmp_path):
    run(tmp_path, "--epochs", 1)
    flags = ("--weight-decay", 0.5, "--eps", 1e-3, "--beta1", 0.5)
    assert run(tmp_path, "--resume", *flags) == 0
    optimizer = load_checkpoint(tmp_path / LAST)["optimizer"]
    (group,) = optimizer["param_groups"]
    assert (group["weight_decay"], group["eps"], group["betas"]) == (0.5, 1e-3, (0.5, 0.999))
    assert {state["step"] for state in optimizer["state"].values()} == {12}


def test_a_directory_with_best_pt_alone_holds_a_run(run, tmp_path):
    run(tmp_path, "--epochs", 1)
    for name in checkpoints(tmp_path):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="best.pt exists: give --resume"):
        run(tmp_path)
    before = contents(tmp_path)
    message = f"{tmp_path}: no readable checkpoint.* --init best.pt with another --out begins one"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--resume")
    assert contents(tmp_path) == before


def test_another_global_batch_goes_on_at_the_next_epoch_and_says_so(run, tmp_path, capsys):
    warmup = ("--warmup-epochs", 3)
    run(tmp_path, *warmup, at={6: send(signal.SIGTERM)})  # two steps into the second epoch
    capsys.readouterr()
    assert run(tmp_path, "--resume", *warmup, "--batch-size", 4) == 0
    said = capsys.readouterr().out
    assert "utterances of a step was 2, now 4: goes on at epoch 3" in said
    steps = events(tmp_path, "step")
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    # The schedule counts steps of the new size, two an epoch: these are its fifth and sixth, and
    # the rate reaches --lr at the sixth, the end of the warm-up.
    assert [e["lr"] for e in steps[-2:]] == pytest.approx([0.2 * 6 / 7, 0.2])
    assert [e["epoch"] for e in events(tmp_path, "eval")] == [1, 2, 3]


def test_another_split_of_the_same_batch_goes_on_at_the_next_step(run, tmp_path, capsys):
    run(tmp_path, at={6: send(signal.SIGTERM)})  # two steps into the second epoch
    capsys.readouterr()
    assert run(tmp_path, "--resume", "--batch-size", 1, "--accumulation", 2) == 0
    assert "goes on at" not in capsys.readouterr().out
    assert [e["step"] for e in events(tmp_path, "step")] == list(range(1, 13))


def test_after_a_change_to_larger_batches_the_new_checkpoints_stay(run, tmp_path, capsys):
    """Larger batches make fewer steps an epoch, but the numbers of checkpoints must rise."""
    assert run(tmp_path) == 0  # 12 steps
    assert run(tmp_path, "--resume", "--batch-size", 4, "--epochs", 5) == 0  # two an epoch
    assert checkpoints(tmp_path) == ["checkpoint-00000014.pt", "checkpoint-00000016.pt"]
    assert [e["step"] for e in events(tmp_path, "step")] == list(range(1, 17))
    capsys.readouterr()
    assert run(tmp_path, "--resume", "--batch-size", 4, "--epochs", 6) == 0
    assert "resumed at step 16, epoch 6" in capsys.readouterr().out
    assert [e["epoch"] for e in events(tmp_path, "eval")] == [1, 2, 3, 4, 5, 6]


def test_a_file_behind_resume_is_a_case_for_init(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        run(tmp_path, "--resume", "best.pt")
    hint = "unrecognized arguments: best.pt; --resume has no value, and --init begins from a file\n"
    assert capsys.readouterr().err.endswith(hint)


def test_another_training_set_or_seed_goes_on_at_the_next_epoch(run, own_corpus, tmp_path, capsys):
    """In the middle of an epoch it would take some utterances twice and others not at all."""
    out = tmp_path / "run"
    run(out, data_root=own_corpus, at={6: send(signal.SIGTERM)})
    transcript = own_corpus / "train" / "1" / "2" / "1-2.trans.txt"
    transcript.write_text(transcript.read_text().replace("THREE ONE TWO", "ONE"))
    assert run(out, "--resume", "--seed", 2, data_root=own_corpus) == 0
    said = capsys.readouterr().out
    assert "training set was 8 utterances, sha256" in said
    assert "seed was 1, now 2: goes on at epoch 3" in said
    assert [e["epoch"] for e in events(out, "step")] == [1] * 4 + [2] * 2 + [3] * 4


def test_another_ramp_of_the_background_goes_on_at_the_next_epoch(run, tmp_path, capsys):
    run(tmp_path, "--pad-max-s", 0.2, at={6: send(signal.SIGTERM)})
    assert run(tmp_path, "--pad-max-s", 0.2, "--ramp-epochs", 4, "--resume") == 0
    assert "ramp_epochs was 0.0, now 4.0: goes on at epoch 3" in capsys.readouterr().out
    assert [e["epoch"] for e in events(tmp_path, "step")] == [1] * 4 + [2] * 2 + [3] * 4


def test_a_run_is_locked_before_its_checkpoint_is_chosen(run, tmp_path, monkeypatch):
    """Another run could write newer checkpoints in between, which the lock's owner would delete."""
    calls = []
    monkeypatch.setattr(train, "lock_run", lambda _: calls.append("lock"))
    monkeypatch.setattr(train, "clear_run", lambda *_, **__: calls.append("clear"))
    choose = train.find_checkpoint
    monkeypatch.setattr(train, "find_checkpoint", lambda *a: calls.append("choose") or choose(*a))
    run(tmp_path, "--time-limit-s", 1e-6)
    assert calls[:2] == ["lock", "choose"]
    assert "clear" in calls


def test_another_model_cannot_resume_and_the_field_is_named(tmp_path):
    cfg = TrainConfig("", (), "", str(tmp_path), preset="demo")
    model_cfg, features = PRESETS["demo"], FeatureConfig()

    def facts(cfg=cfg, model_cfg=model_cfg, features=features):
        return train.run_facts(cfg, model_cfg, features, Ranks(0, 1, 0), [], [])

    train.check_same_model("old.pt", facts(), facts())
    younger = facts()
    del younger["model_facts"]["look_ahead"]  # a field that is younger than the checkpoint
    train.check_same_model("old.pt", younger, facts())
    for changed, message in (
        (facts(cfg=replace(cfg, preset="mini")), "preset demo, this run mini"),
        (facts(model_cfg=replace(model_cfg, pred_hidden=9)), "pred_hidden 96, this run 9"),
        (facts(model_cfg=replace(model_cfg, vocab_size=99)), "vocab_size 64, this run 99"),
        (facts(features=replace(features, hop=80)), "hop 160, this run 80"),
        (facts(model_cfg=replace(model_cfg, look_ahead=4)), "look_ahead 0, this run 4"),
    ):
        remedy = "; --init old.pt with another --out begins a new run from its weights"
        with pytest.raises(ValueError, match=f"^old.pt has {message}{remedy}$"):
            train.check_same_model("old.pt", younger, changed)


@pytest.mark.slow
def test_ranks_that_share_the_batch_of_one_go_on_at_its_next_step(corpus, tmp_path):
    stopped = run_train(corpus, tmp_path, "--time-limit-s", 1e-6)
    assert stopped.returncode == 75, stopped.stderr
    done = run_train(corpus, tmp_path, "--resume", "--share-batch", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "goes on at epoch" not in done.stdout
    assert [e["step"] for e in events(tmp_path, "step")] == list(range(1, 13))
    assert [e["epoch"] for e in events(tmp_path, "epoch")] == [1, 2, 3]


def test_a_signal_in_the_last_step_of_an_epoch_stops_before_the_evaluation(run, whole, tmp_path):
    """The evaluation of a large dev split may take longer than the launcher waits."""
    assert run(tmp_path, at={8: send(signal.SIGTERM)}) == 143
    assert [e["epoch"] for e in events(tmp_path, "eval")] == [1]
    assert checkpoints(tmp_path)[-1] == "checkpoint-00000008.pt"
    assert run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole())


def test_another_dev_split_is_evaluated_before_the_next_epoch(run, tmp_path):
    run(tmp_path, "--eval-epochs", 3, at={6: send(signal.SIGTERM)})
    assert run(tmp_path, "--resume", "--eval-epochs", 3, "--dev-split", "train") == 0
    assert [e["step"] for e in events(tmp_path, "eval")] == [8, 12]


# -------------------------------------------------------------------------- damage and full disks


def test_a_damaged_newest_checkpoint_is_passed_over(run, whole, tmp_path, capsys):
    run(tmp_path, "--checkpoint-every-s", 0, at={7: send(signal.SIGTERM)})
    assert checkpoints(tmp_path) == ["checkpoint-00000006.pt", "checkpoint-00000007.pt"]
    newest = tmp_path / "checkpoint-00000007.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    found = []
    assert run(tmp_path, "--resume", at={7: lambda: found.extend(checkpoints(tmp_path))}) == 0
    assert found == ["checkpoint-00000006.pt"]  # the damaged one is none of the two that stay
    assert "checkpoint-00000007.pt" in capsys.readouterr().out.splitlines()[0]
    assert_same_run(tmp_path, whole())


def test_a_full_disk_ends_the_run_and_keeps_the_previous_checkpoint(run, tmp_path):
    partial = tmp_path / "checkpoint-00000008.partial"
    message = "checkpoint-00000008.pt could not be written: No space left on device$"
    with pytest.raises(OSError, match=message):
        run(tmp_path, at={6: lambda: partial.symlink_to("/dev/full")})
    assert checkpoints(tmp_path) == ["checkpoint-00000004.pt"]
    assert not list(tmp_path.glob("*.partial"))
    assert run(tmp_path, "--resume") == 0


def test_a_quota_that_is_too_small_ends_the_run_before_its_first_step(corpus, tmp_path):
    """A limit on the size of files stands for the quota."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = [sys.executable, str(REPO / "train.py"), "--data", str(corpus), "--out",
               str(tmp_path), *TINY]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=300,
                          check=False)
    assert done.returncode == 1
    assert f"train.py: {tmp_path}: File too large: 4 more checkpoints of" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_restart_on_a_full_disk_keeps_the_run(run, tmp_path, monkeypatch):
    def refuse(out, size):
        raise OSError(f"{out}: No space left on device")

    assert run(tmp_path) == 0
    before = contents(tmp_path)
    monkeypatch.setattr(train, "reserve_space", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        run(tmp_path, "--restart")
    assert contents(tmp_path) == before


def test_a_vanished_run_directory_ends_the_run(run, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="run"):
        run(out, at={6: lambda: out.rename(tmp_path / "elsewhere")})
    assert checkpoints(tmp_path / "elsewhere") == ["checkpoint-00000004.pt"]


def test_a_log_that_cannot_be_written_is_named(run, tmp_path):
    """log.jsonl is written in every step, so a full disk shows there first."""

    def fill():
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").symlink_to("/dev/full")

    with pytest.raises(OSError, match="log.jsonl could not be written: No space left on device"):
        run(tmp_path, at={6: fill})
    assert checkpoints(tmp_path) == ["checkpoint-00000004.pt"]


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
    path = own_corpus / "dev" / "1" / "2" / "1-2-0001.wav"
    path.with_suffix(".flac").unlink()
    soundfile.write(path, [0.1, float("nan")] * 3600, 16000, subtype="FLOAT")  # a good header
    done = run_train(own_corpus, tmp_path / "run", "--loader-workers", workers)
    assert done.returncode == 1
    said = f"{path}: 3600 samples not finite, or larger than 1e+10"
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
    assert "audio of" not in done.stderr  # the warning of load_audio


def test_a_batch_of_bad_files_alone_ends_the_run(run, own_corpus, tmp_path):
    def empty_all():
        for path in (own_corpus / "train" / "1" / "2").glob("*.flac"):
            path.write_bytes(b"")

    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="none of the utterances of a batch"),
    ):
        run(tmp_path / "run", "--skip-bad", data_root=own_corpus, at={4: empty_all})


def test_a_text_that_the_tokenizer_cannot_express_is_named_at_the_start(run, own_corpus, tmp_path):
    run(tmp_path / "run", "--time-limit-s", 1e-6, data_root=own_corpus)
    transcript = own_corpus / "train" / "1" / "2" / "1-2.trans.txt"
    transcript.write_text(transcript.read_text().replace("1-2-0001 TWO", "1-2-0001 ŻÓŁW"))
    with pytest.raises(ValueError, match="1-2-0001: 'ŻÓŁW': the tokenizer has no piece"):
        run(tmp_path / "run", "--resume", data_root=own_corpus)


# ------------------------------------------------------------------------------------ SIGKILL


@pytest.mark.slow
def test_fifty_kills_at_random_moments_lose_nothing(corpus, tmp_path):
    """Each process lives for a random time; every step is saved."""
    argv = ["--checkpoint-every-s", "0", "--lr-gamma", "0.99", "--resume"]
    out, moments, steps, torn = tmp_path / "killed", random.Random(5), 0, 0
    server = multiprocessing.get_context("forkserver")  # forks lives that have imported torch
    server.set_forkserver_preload(["train", "torch._dynamo"])
    lives = 0
    while lives < 50 or (lives < 400 and not (torn and steps > 50)):
        lives += 1
        life = server.Process(target=live, args=(corpus, out, *argv, "--epochs", "100000"))
        life.start()
        life.join(moments.uniform(0.1, 2.5))
        life.kill()
        life.join()
        assert life.exitcode == -signal.SIGKILL  # it would have gone on
        if (out / "log.jsonl").exists():
            # The last line may be torn, and is cut off by the next life.
            lines = (out / "log.jsonl").read_text().splitlines()
            done = sum('"event": "step"' in line and line.endswith("}") for line in lines)
            assert done >= steps - 1  # every step was saved: the process loses one at most
            steps = done
        torn += bool(list(out.glob("*.partial")))
        for path in (*out.glob("checkpoint-*.pt"), *out.glob("best.pt")):
            load_checkpoint(path)  # never torn
    assert torn > 0, "no kill hit a checkpoint while it was written"
    assert steps > 50, "the lives were too short to get on"

    last = steps // 4 + 2
    undisturbed = tmp_path / "undisturbed"
    for folder in (out, undisturbed):
        done = run_train(corpus, folder, *argv, "--epochs", last)
        assert done.returncode == 0, done.stderr
    assert_same_events(out, undisturbed, "step", "step", "loss")
    assert_same_events(out, undisturbed, "eval", "epoch", "errors")
    for name in (f"checkpoint-{4 * last:08d}.pt", "best.pt"):
        assert_same_weights(out, undisturbed, name)
