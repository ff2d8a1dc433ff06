# SPDX-License-Identifier: Apache-2.0
"""What a run shows of itself: curves from log.jsonl, TensorBoard, warnings, the profile.

    python -m pytest tests/test_report.py

Curves and warnings from logs written by hand, the rest from one short run on tones.
"""

import io
import json
import re
import sys
import time
from collections import defaultdict

import matplotlib.image
import numpy as np
import pytest
from tones import TINY, run_here, run_train, tiny_corpus

import data
import features
import report
from tools import bench


def step(number, epoch, **changes):
    values = dict(loss=100.0 / number, lr=0.01, grad_norm=1.0, utts_per_s=4.0, step_s=36.0,
                  data_s=1.0)
    return {"event": "step", "step": number, "epoch": epoch, **values, **changes}


def evaluation(number, epoch, wer):
    return {"event": "eval", "step": number, "epoch": epoch, "wer": wer, "errors": 1, "words": 2,
            "rtf": 0.1, "seconds": 18.0}


LOG = [
    {"event": "start"},
    *[step(n, 1) for n in (1, 2, 3)],
    step(4, 1, step_s=72.0, utts_per_s=2.0),
    evaluation(4, 1, 2.5),
    {"event": "start"},  # resumed
    *[step(n, 2, loss=7.0) for n in (5, 6, 7)],
    evaluation(7, 2, 0.5),  # the time limit ended epoch 2 before its last step
]


def write_log(folder, records=LOG):
    folder.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------------ curves


def test_steps_and_evaluations_have_their_epochs_and_hours(tmp_path):
    steps, evals = report.read_run(write_log(tmp_path / "run"))
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["epochs"] for r in steps] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    # An hour has 100 steps of 36 s; step 4 took as long as two, an evaluation as half of one.
    hundredths = [1, 2, 3, 5, 6.5, 7.5, 8.5]
    assert [r["hours"] for r in steps] == pytest.approx([x / 100 for x in hundredths])
    assert [(r["epochs"], r["wer"]) for r in evals] == [(1.0, 2.5), (1.75, 0.5)]
    means = [(100 + 50 + 100 / 3 + 25) / 4, 7.0]
    assert [r["loss"] for r in evals] == pytest.approx(means)
    assert [r["utts_per_s"] for r in evals] == pytest.approx([4 * (4 * 36) / (5 * 36), 4.0])
    assert [r["hours"] for r in evals] == pytest.approx([0.055, 0.09])


def test_half_a_line_of_a_killed_process_is_left_out(tmp_path):
    folder = write_log(tmp_path / "run")
    whole = report.read_run(folder)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "st')
    assert report.read_run(folder) == whole


def test_an_evaluation_without_steps_has_no_loss(tmp_path):
    steps, (scored,) = report.read_run(write_log(tmp_path / "run", [evaluation(4, 1, 0.5)]))
    assert steps == []
    assert np.isnan([scored["loss"], scored["utts_per_s"]]).all()


def test_a_run_without_steps_can_be_drawn(tmp_path):
    runs = {"empty": report.read_run(write_log(tmp_path / "run", LOG[:1]))}
    report.draw_curves(runs, tmp_path / "curves.png")
    assert matplotlib.image.imread(tmp_path / "curves.png").shape == (900, 900, 4)


def pixels(png, colour):
    """How many have this colour, one of matplotlib's default cycle, in left and right half."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    same = np.abs(matplotlib.image.imread(png)[..., :3] - rgb).max(-1) < 0.02
    return [int(half.sum()) for half in np.array_split(same, 2, axis=1)]


def test_every_run_has_its_colour_against_epochs_and_hours(tmp_path, monkeypatch, capsys):
    folders = [write_log(tmp_path / name) for name in ("a", "b")]
    png = tmp_path / "both.png"
    monkeypatch.setattr(sys, "argv", ["bench.py", "curves", *map(str, folders), "--png", str(png)])
    bench.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result[str(folders[1])] == {"best_wer": 0.5, "hours": pytest.approx(0.09), "epochs": 2}
    report.draw_curves({"a": report.read_run(folders[0])}, tmp_path / "one.png")
    assert min(pixels(tmp_path / "one.png", "tab:blue")) > 100
    assert pixels(tmp_path / "one.png", "tab:orange") == [0, 0]
    assert min(pixels(png, "tab:orange")) > 100  # on top of a, which has the same curves


def test_a_run_that_was_not_scored_has_no_table(tmp_path, monkeypatch):
    folder = write_log(tmp_path / "run", LOG[:3])
    words = ["bench.py", "curves", str(folder), "--png", str(tmp_path / "x.png")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="run/log.jsonl: no evaluation yet"):
        bench.main()


# ---------------------------------------------------------------------------------------- warnings


@pytest.fixture
def warned(tmp_path, capsys):
    """A log, and a function that returns the warnings since its last call."""

    def lines():
        printed = capsys.readouterr().out.splitlines()
        assert all(line.startswith("warning: ") for line in printed)
        return printed

    return report.Log(tmp_path, 0), lines


def test_a_bad_sign_is_told_when_it_appears_not_while_it_stays(warned):
    log, lines = warned
    for present in (False, True, True, False, True):
        log.warn("sign", present, "look")
    log.warn("another", True, "there")
    assert lines() == ["warning: look", "warning: look", "warning: there"]


@pytest.mark.parametrize(
    ("norm", "before", "expected"),
    [
        (10.1, [1.0] * 19 + [3.0], "the gradient norm is 10.1 where 1.0 was usual"),
        (9.9, [1.0] * 20, None),
        (1000.0, [1.0] * 19, None),  # too early to tell what is usual
    ],
)
def test_an_exploding_gradient_is_warned_of(warned, norm, before, expected):
    log, lines = warned
    report.warn_of_gradient(log, norm, before)
    assert [expected in line for line in lines()] == [True] * (expected is not None)


def test_a_loss_that_is_flat_for_an_epoch_is_warned_of(warned):
    log, lines = warned
    report.warn_of_epoch(log, 99.1, 100.0, 0.9)
    assert "the loss is flat, 99.10 after 100.00" in lines()[0]
    report.warn_of_epoch(log, 98.9, 100.0, 0.9)  # falls by more than a hundredth
    report.warn_of_epoch(log, 99.1, 100.0, 0.4)  # has learnt what it can
    report.warn_of_epoch(log, 99.1, float("inf"), 0.9)  # no epoch before
    assert lines() == []


def test_waiting_for_data_above_a_third_is_warned_of(warned):
    log, lines = warned
    report.warn_of_waiting(log, [0.34] * 19)  # too few to tell
    report.warn_of_waiting(log, [1.0] + [0.33] * 19)  # the first step waits for the workers
    assert lines() == []
    for share in (0.34, 0.33, 0.35, 0.2, 0.4):  # comes and goes: said once
        report.warn_of_waiting(log, [share] * 20)
    (warning,) = lines()
    assert "34 % of a step goes by waiting for data" in warning
    report.warn_of_waiting(log, [0.1] * 20)  # gone
    report.warn_of_waiting(log, [0.5] * 20)
    assert len(lines()) == 1


@pytest.mark.parametrize(
    ("labels", "wer", "is_warm", "expected"),
    [
        (9, 1.0, True, "(almost) all hypotheses are blank, 9 symbols for 100 words"),
        (11, 1.0, True, "WER is 100 % or more"),
        (300, 0.99, True, None),
        (0, 1.0, False, None),
    ],
)
def test_blank_hypotheses_and_a_useless_wer_are_warned_of(warned, labels, wer, is_warm, expected):
    log, lines = warned
    report.warn_of_evaluation(log, {"labels": labels, "words": 100, "wer": wer}, is_warm)
    assert [expected in line for line in lines()] == [True] * (expected is not None)


# ---------------------------------------------------------------------------- one run on a terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Run directory, standard output and standard error of a run with --profile on a terminal."""
    root = tiny_corpus(tmp_path_factory.mktemp("shown"))
    words = ["--data", root, "--out", root / "run", *TINY, "--batch-size", 1, "--epochs", 2,
             "--profile", "--log-every", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        patch.setattr(sys, "stderr", Terminal())
        run_here(*words)
        streams = sys.stdout.getvalue(), sys.stderr.getvalue()
    return root / "run", *streams


def test_progress_bars_with_the_time_left_are_for_terminals(shown):
    _, out, err = shown
    for what in ("epoch 1", "epoch 2", "dev"):
        assert re.search(rf"{what}: +[0-9]+%\|.*\[\d\d:\d\d<", err), what
    assert "\r" not in out
    assert [f"iter {i}/8" in out for i in (1, 8)] == [True, True]


def test_curves_are_drawn(shown):
    assert min(pixels(shown[0] / "curves.png", "tab:blue")) > 100


def test_the_profile_has_table_trace_and_shares(shown):
    folder, out, _ = shown
    assert out.count("Self CPU %") == 1  # of the first epoch alone
    spent = defaultdict(list)  # name -> seconds of each event
    for e in json.loads((folder / "trace.json").read_text())["traceEvents"]:
        if "dur" in e:
            spent[e["name"]].append(e["dur"] / 1e6)
    assert len(spent["lattice"]) == 10  # forward and backward
    for name in sum(report.PROFILE_PARTS.values(), ()):
        # LSTM stacks: 2, and the wide one, whose single layer is not oneDNN's.
        assert len(spent[name]) in (5, 10) or "MultiProcessing" in name, name
    (line,) = [line for line in out.splitlines() if line.startswith("profile: 5 steps took")]
    assert "Communication was under way 0.0 % of the time" in line  # one rank
    parts = line.split(". ")[0].split(": ")[2]
    shares = {part.strip(): float(share) for part, share in
              re.findall(r"([a-zA-Z ]+) ([0-9.-]+) %", parts)}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    seconds = float(line.split()[4])
    expected = {part: sum(sum(spent[name]) for name in names)
                for part, names in report.PROFILE_PARTS.items()}
    expected["lattice of the loss"] = sum(spent["lattice"])
    expected["joint network"] = expected.pop("joint network and loss") - sum(spent["lattice"])
    expected = {part: pytest.approx(100 * s / seconds, abs=1) for part, s in expected.items()}
    assert {part: shares[part] for part in expected} == expected


@pytest.mark.slow
def test_the_profile_of_two_ranks_sees_their_communication(tmp_path):
    root = tiny_corpus(tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["--train-splits", *["train"] * 3, "--batch-size", 1, "--epochs", 1, "--profile"]
    done = run_train(root, root / "run", *words, launcher=launcher)
    assert done.returncode == 0, done.stderr
    (share,) = re.findall(r"Communication was under way ([0-9.]+) % of the time", done.stdout)
    assert 0 < float(share) < 100


def test_a_run_that_waits_for_its_data_says_so_while_it_runs(tmp_path, monkeypatch, capsys):
    """Epochs of large corpora last for hours."""
    root = tiny_corpus(tmp_path)
    real = features.load_audio
    monkeypatch.setattr(data, "load_audio", lambda *a: time.sleep(0.1) or real(*a))
    run_here("--data", root, "--out", root / "run", *TINY, "--train-splits", *["train"] * 6,
             "--batch-size", 2, "--epochs", 1)
    said = capsys.readouterr().out.splitlines()
    (warning,) = [i for i, line in enumerate(said) if "goes by waiting for data" in line]
    assert warning < next(i for i, line in enumerate(said) if "avg train utts/s" in line)


# ------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_has_the_numbers_of_the_log(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard"
    )
    log = report.Log(tmp_path, 0, tensorboard=True)
    for record in [step(n, 1, loss=10.0 / n) for n in (1, 2)] + [evaluation(2, 1, 0.25)]:
        log.write(record.pop("event"), **record)
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 10.0), (2, 5.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/wer")] == [(2, 0.25)]


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard: pip install tensorboard"):
        report.Log(tmp_path, 0, tensorboard=True)
