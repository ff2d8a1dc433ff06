# SPDX-License-Identifier: Apache-2.0
"""report.py: log and curves, warnings, progress bars, profile, TensorBoard.

    python -m pytest tests/test_report.py

Curves and warnings come from records written by hand, the rest from short runs on tones.
"""

import io
import json
import math
import re
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from test_bench import run_here as bench_here
from tones import TINY, run_here, run_train

import data
import features
import report


def step(number, epoch, **changes):
    """The record of a step in epochs of four steps; an hour has 100 steps."""
    values = dict(epochs=number / 4, hours=number / 100, loss=100.0 / number, lr=0.01,
                  grad_norm=1.0, utts_per_s=4.0, step_s=36.0, data_s=1.0)
    return {"step": number, "epoch": epoch, **values, **changes}


def evaluation(number, epoch, wer):
    return {"step": number, "epoch": epoch, "epochs": number / 4, "hours": number / 100,
            "loss": 7.0, "utts_per_s": 4.0, "wer": wer, "cer": wer / 2, "errors": 1,
            "words": 2, "labels": 3, "rtf": 0.1, "seconds": 18.0}


LOG = [
    {"event": "start", "step": 0},
    *[{"event": "step", **step(n, 1)} for n in (1, 2, 3, 4)],
    {"event": "epoch", "step": 4, "epoch": 1},
    {"event": "eval", **evaluation(4, 1, 2.5)},
    *[{"event": "step", **step(n, 2)} for n in (5, 6, 7)],
    {"event": "eval", **evaluation(7, 2, 0.5)},
]


def write_log(folder, records=LOG):
    folder.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return folder


# ---------------------------------------------------------------------------------- log and curves


def test_rewinding_keeps_the_records_up_to_the_checkpoint(tmp_path):
    """The checkpoint of step 7 was written before that step's evaluation."""
    folder = write_log(tmp_path / "run")
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "st')  # the line was cut off when the run was killed
    assert list(report.read_log(folder / "log.jsonl")) == LOG
    report.Log(folder, rank=0).rewind(step=7, evaluated=4)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == LOG[:-1]
    report.Log(folder, rank=0).rewind(step=5, evaluated=4)
    assert list(report.read_log(folder / "log.jsonl")) == LOG[:-3]


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = report.Log(tmp_path, rank=1)
    log.write("step", step=1)
    log.mllog("run_start")
    log.say("hello")
    log.draw()
    log.rewind(0, 0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_run_without_steps_can_be_drawn(tmp_path):
    runs = {"empty": report.read_run(write_log(tmp_path / "run", LOG[:1]))}
    report.draw_curves(runs, tmp_path / "curves.png")
    assert matplotlib.image.imread(tmp_path / "curves.png").shape == (900, 900, 4)


def pixels(png, colour):
    """Number of pixels of a colour of matplotlib's default cycle in the left and right half."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    same = np.abs(matplotlib.image.imread(png)[..., :3] - rgb).max(-1) < 0.02
    return [int(half.sum()) for half in np.array_split(same, 2, axis=1)]


def test_every_run_has_its_colour_against_epochs_and_hours(tmp_path):
    run = report.read_run(write_log(tmp_path / "run"))
    report.draw_curves({"a": run}, tmp_path / "one.png")
    report.draw_curves({"a": run, "b": run}, tmp_path / "both.png")
    assert min(pixels(tmp_path / "one.png", "tab:blue")) > 100
    assert pixels(tmp_path / "one.png", "tab:orange") == [0, 0]
    assert min(pixels(tmp_path / "both.png", "tab:orange")) > 100  # drawn over the equal first run


def test_bench_curves_prints_the_end_of_every_run(tmp_path, monkeypatch, capsys):
    folder = write_log(tmp_path / "run")
    _, result = bench_here(monkeypatch, capsys, "curves", folder, "--png", tmp_path / "run.png")
    assert result[str(folder)] == {"best_wer": 0.5, "best_cer": 0.25, "hours": 0.07, "epochs": 2}
    assert min(pixels(tmp_path / "run.png", "tab:blue")) > 100


def test_bench_curves_refuses_a_run_without_evaluation(tmp_path, monkeypatch, capsys):
    folder = write_log(tmp_path / "run", LOG[:3])
    with pytest.raises(SystemExit, match="run/log.jsonl: no evaluation yet"):
        bench_here(monkeypatch, capsys, "curves", folder, "--png", tmp_path / "x.png")


# ----------------------------------------------------------------------------------------- warnings


@pytest.fixture
def monitor(tmp_path):
    """Prints every step of a run of three epochs of four steps."""
    return report.Monitor(report.Log(tmp_path, rank=0), steps_per_epoch=4, epochs=3, log_every=1)


@pytest.fixture
def warned(capsys):
    """warned() -> the warnings since the last call, without other lines."""

    def lines():
        printed = capsys.readouterr().out.splitlines()
        return [line.removeprefix("warning: ") for line in printed if line.startswith("warning: ")]

    return lines


def end_epoch(monitor, loss, best_wer):
    monitor.epoch(best_wer, 0, epoch=1, step=4, loss=loss, utts_per_s=4.0, seconds=9.0)


@pytest.mark.parametrize(("norm", "before", "expected"), [
    (10.1, [1.0] * 19 + [3.0], ["the gradient norm is 10.1 where 1.0 was usual"]),
    (9.9, [1.0] * 20, []),
    (1000.0, [1.0] * 19, []),  # the median of so few steps is not taken for usual
])
def test_an_exploding_gradient_is_warned_of(monitor, warned, norm, before, expected):
    monitor.grad_norms.extend(before)
    monitor.step(1, **step(1, 1, grad_norm=norm))
    assert [line.partition(":")[0] for line in warned()] == expected


def test_a_loss_that_is_flat_for_an_epoch_is_warned_of(monitor, warned):
    for loss, best_wer, is_flat in (
        (100.0, 0.9, False),  # there is no epoch before
        (99.1, 0.9, True),
        (98.1, 0.9, False),  # falls by more than a hundredth
        (98.0, 0.4, False),  # a low WER is where training ends
    ):
        end_epoch(monitor, loss, best_wer)
        expected = ["the loss is flat, 99.10 after 100.00 an epoch ago"] if is_flat else []
        assert [line.partition(":")[0] for line in warned()] == expected


def test_a_loss_that_rises_by_half_in_an_epoch_is_called_divergence(monitor, warned):
    for loss in (10.0, 14.0, 22.0):
        end_epoch(monitor, loss, best_wer=0.1)
    (warning,) = warned()
    assert warning.startswith("the loss rose from 14.00 to 22.00 in an epoch")
    assert "--lr" in warning


def test_waiting_for_data_above_a_third_is_warned_of(monitor, warned):
    def wait(*shares):
        for share in shares:
            monitor.step(1, **step(1, 1, step_s=1.0, data_s=share))

    wait(*[0.34] * 19)  # too few to tell
    monitor.waits.clear()
    wait(1.0, *[0.33] * 19)  # the first step waits for the workers
    assert warned() == []
    for share in (0.34, 0.33, 0.35, 0.2, 0.4):  # the median stays above a sixth: told once
        wait(*[share] * 100)
    (warning,) = warned()
    assert "34 % of a step goes by waiting for data" in warning
    wait(*[0.1] * 100, *[0.5] * 100)  # the sign disappears and comes again
    assert len(warned()) == 1


@pytest.mark.parametrize(("labels", "wer", "is_warm", "expected"), [
    (9, 1.0, True, ["(almost) all hypotheses are blank, 9 symbols for 100 words"]),
    (11, 1.0, True, ["WER is 100 % or more after the warm-up"]),
    (300, 0.99, True, []),
    (0, 1.0, False, []),
])
def test_blank_hypotheses_and_a_useless_wer_are_warned_of(
    monitor, warned, labels, wer, is_warm, expected
):
    record = evaluation(4, 1, wer) | {"labels": labels, "words": 100}
    monitor.evaluation(is_warm, **record)
    assert [line.partition(":")[0] for line in warned()] == expected


def test_the_time_that_is_left_is_projected_from_the_steps_of_this_process(monitor, capsys):
    monitor.seconds = 48 * 3600  # an hour a step
    monitor.steps = 48  # the next step is the 49th
    for batch in (1, 2, 3):
        monitor.step(batch, **step(batch, 2, step_s=3600.0))
    # Six of three epochs of four steps are done when 50 steps of this process are.
    assert re.findall("projected: .*", capsys.readouterr().out) == [
        "projected: 6.00 h for the rest of 3 epochs, if their steps take as long"
    ]


# ---------------------------------------------------------------------------- one run on a terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def shown(corpus, tmp_path_factory):
    """Run directory, standard output and standard error of a run with --profile on a terminal."""
    out = tmp_path_factory.mktemp("shown")
    argv = ["--data", corpus, "--out", out, *TINY, "--batch-size", 1, "--epochs", 4,
            "--profile", "--log-every", 1, "--ctc-epochs", 1, "--ctc-weight", 0.3,
            "--lattice-band", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        patch.setattr(sys, "stderr", Terminal())
        run_here(*argv, draw=True)
        return out, sys.stdout.getvalue(), sys.stderr.getvalue()


def test_progress_bars_with_the_time_left_are_for_terminals(shown):
    _, out, err = shown
    for label in ("epoch 1", "epoch 2", "dev"):
        assert re.search(rf"{label}: +[0-9]+%\|.*\[\d\d:\d\d<", err), label
    assert "\r" not in out
    assert [f"iter {i}/8" in out for i in (1, 8)] == [True, True]


def test_curves_are_drawn(shown):
    assert min(pixels(shown[0] / "curves.png", "tab:blue")) > 100


def test_the_profile_has_table_trace_and_shares(shown):
    folder, out, _ = shown
    assert out.count("Self CPU %") == 2  # in the first epochs with and without the transducer
    spent = defaultdict(list)  # name -> seconds of each event
    for e in json.loads((folder / "trace.json").read_text())["traceEvents"]:
        if "dur" in e:
            spent[e["name"]].append(e["dur"] / 1e6)
    assert len(spent["lattice"]) == 10  # forward and backward
    for name in sum(report.STAGES.values(), ()):
        # Three LSTM stacks, of which one has a loop of its own for some shapes; other names once.
        assert len(spent[name]) in (5, 10, 15) or "MultiProcessing" in name, name
    _, line = [line for line in out.splitlines() if line.startswith("profile: 5 steps took")]
    assert "Communication was under way 0.0 % of the time" in line  # one rank
    parts = line.split(". ")[0].split(": ")[2]
    shares = {part.strip(): float(share) for part, share in
              re.findall(r"([a-zA-Z ]+) ([0-9.-]+) %", parts)}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    seconds = float(line.split()[4])
    expected = {stage: sum(sum(spent[name]) for name in names)
                for stage, names in report.STAGES.items()}
    expected["joint network"] -= expected["lattice of the loss"]
    tolerance = 1 + 0.05 / seconds  # the line has milliseconds
    expected = {stage: pytest.approx(100 * s / seconds, abs=tolerance)
                for stage, s in expected.items()}
    assert {stage: shares[stage] for stage in expected} == expected


def test_the_stages_of_a_profile_add_up_to_its_seconds():
    times_us = {"JointCosts": 3e5, "lattice": 1e5, "clip_gradients": 2e5}  # the lattice is inside
    events = [SimpleNamespace(key=key, cpu_time_total=t) for key, t in times_us.items()]
    parts = report.profile_parts(SimpleNamespace(key_averages=lambda: events), 1.0)
    expected = dict.fromkeys(report.STAGES, 0) | {"everything else": 0.5, "joint network": 0.2,
                                                  "lattice of the loss": 0.1, "optimiser": 0.2}
    assert parts == pytest.approx(expected)


@pytest.mark.slow
def test_the_profile_of_two_ranks_sees_their_communication(corpus, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = ["--train-splits", *["train"] * 3, "--batch-size", 1, "--epochs", 1, "--profile"]
    done = run_train(corpus, tmp_path, *argv, launcher=launcher)
    assert done.returncode == 0, done.stderr
    (share,) = re.findall(r"Communication was under way ([0-9.]+) % of the time", done.stdout)
    assert 0 < float(share) < 100


def test_a_run_that_waits_for_its_data_says_so_in_the_epoch(corpus, tmp_path, monkeypatch, capsys):
    """The epochs of a large corpus last for hours, so the warning must not wait for their end."""
    real = features.load_audio
    monkeypatch.setattr(data, "load_audio", lambda *a: time.sleep(0.1) or real(*a))
    run_here("--data", corpus, "--out", tmp_path, *TINY, "--train-splits", *["train"] * 6,
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
    for n in (1, 2):
        log.write("step", **step(n, 1, loss=10.0 / n))
    log.write("eval", **evaluation(2, 1, 0.25))
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 10.0), (2, 5.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/wer")] == [(2, 0.25)]


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    log = report.Log(tmp_path, 0)
    log.write("end", best_wer=math.inf, loss=math.nan, config={"clip_norm": math.inf, "lr": 0.5})
    log.mllog("opt_gradient_clip_norm", math.inf)
    expected = {"event": "end", "best_wer": None, "loss": None,
                "config": {"clip_norm": None, "lr": 0.5}}
    assert json.loads((tmp_path / "log.jsonl").read_text()) == expected
    assert '"value": null' in (tmp_path / "mllog.log").read_text()


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard: pip install tensorboard"):
        report.Log(tmp_path, 0, tensorboard=True)
