# SPDX-License-Identifier: Apache-2.0
"""bench.py ladder and scaling measure, print, store and project steps of known time."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bench import run_here
from tones import REPO

import data
from loss import joint_transducer_loss
from model import PRESETS
from recipe import parse_configs
from tools import ladder, measure, tune
from tools.ladder import Rung


@pytest.mark.parametrize("batch", [1, ladder.PLAIN_ROWS, 2 * ladder.PLAIN_ROWS + 1])
def test_plain_loss_of_the_first_rungs_has_the_fused_value_and_gradient(batch):
    torch.manual_seed(1)
    shapes = ((batch, 6, 8), (batch, 5, 8), (5, 8), (5,))  # T = 6, U = 4, J = 8, V = 5
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    targets = torch.randint(0, 4, (batch, 4))
    enc_lens, target_lens = torch.arange(batch) % 6 + 1, torch.arange(batch) % 5
    results = []
    for function in (joint_transducer_loss, ladder.plain_joint_loss):
        costs = function(*inputs, targets, enc_lens, target_lens, 4, 0.0, "none")
        grads = torch.autograd.grad(costs.sum() / batch, inputs)
        results.append((costs, *grads))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-9, atol=1e-9)


def test_each_rung_adds_one_idea_and_alone_it_is_added_to_the_originals():
    steps, alone = ladder.make_rungs(2)
    rungs = list(steps.values())
    for before, after in zip(rungs, rungs[1:], strict=False):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    _, model_cfg, _ = parse_configs(["--data", ".", "--train-splits", "x", "--dev-split", "x",
                                     "--out", ".", *rungs[-1].argv])
    settings = dict(orthogonal_init=False, weights_init_scale=0.5)
    assert model_cfg == replace(PRESETS["democratized"], **settings)
    assert rungs[-1][1:] == (2, True, "bf16", 1)
    assert list(alone) == list(steps)[ladder.ORIGINAL_RUNGS :]
    for rung in alone.values():
        assert sum(a != b for a, b in zip(rungs[3], rung, strict=True)) == 1


def test_synthetic_recordings_have_the_given_lengths_and_labels(tmp_path):
    shapes = [(0.5, 3), (1.25, 7), (0.3, 1)]
    measure.synthesize(tmp_path, shapes)
    utterances = data.read_split(tmp_path, "noise")
    assert [u.duration_s for u in utterances] == pytest.approx([s for s, _ in shapes])
    assert [len(measure.LabelCount(32).encode(u.text)) for u in utterances] == [3, 7, 1]


# ---- the command `ladder` ---------------------------------------------------------------------

SMALL = ["--enc-hidden", "8", "--pred-hidden", "8", "--joint-hidden", "8", "--vocab-size", "16"]


def run_bench(*argv: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.bench", *map(str, argv)]
    return subprocess.run(command, cwd=REPO, text=True, capture_output=True, timeout=900,
                          check=False)


def write_shapes(path: Path) -> Path:
    buckets = [[[0.4, 2], [0.5, 3]], [[0.8, 5], [1.0, 4]]]
    path.write_text(json.dumps({"utterances": 400, "buckets": buckets}))
    return path


def test_report_of_a_ladder(tmp_path, monkeypatch, capsys):
    """Steps of known seconds give the table, JSON, hours and picture."""
    calls = []

    def measure_rung(rung: Rung, batch: int, threads: int, argv: list) -> dict:
        calls.append(rung)
        seconds = 8.0 if rung == Rung() else 4.0
        seconds /= rung.ranks * (1 + rung.fused) * (1 + (rung.precision == "bf16"))
        if rung.ranks == 1 and rung.precision == "bf16":  # 20 % more in the second round
            seconds *= 0.9 if calls.count(rung) == 1 else 1.1
        return {"step_s": [0.5 * seconds, 1.5 * seconds], "parameters": 10**6, "threads": 1}

    monkeypatch.setattr(ladder, "measure_rung", measure_rung)
    for name, num_epochs in (("run", 11), ("short", 2)):
        (tmp_path / name).mkdir()
        evals = [{"event": "eval", "epoch": e, "wer": 1 / e, "cer": 0.5 / e}
                 for e in range(1, num_epochs + 1)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, evals)))
    lines, result = run_here(
        monkeypatch, capsys, "ladder", "--shapes", write_shapes(tmp_path / "shapes.json"),
        "--png", tmp_path / "ladder.png", "--runs", tmp_path / "run", tmp_path / "short")
    assert len(calls) == 20
    assert len(set(calls)) == 11
    assert calls[11:] == calls[2:11]
    stored = json.loads((tmp_path / "ladder.json").read_text())
    assert [row["epoch_s"] for row in stored["ladder"]] == [1600, 800, 800, 800, 400, 200, 200, 100]
    speedups, cumulative = ([row[k] for row in stored["ladder"]] for k in ("speedup", "cumulative"))
    assert speedups == [1, 2, 1, 1, 2, 2, 1, 2]
    assert cumulative == [1, 2, 2, 2, 4, 8, 8, 16]
    assert stored["ladder"][3]["original"] == pytest.approx(1.0703, abs=1e-4)
    assert [row["alone"] for row in stored["ladder"]] == [None, None, None, None, 2, 2, 1, 2]
    assert stored["ladder"][5]["epochs_s"] == pytest.approx([180, 220])
    assert stored["hours_of_49_epochs"]["here"] == pytest.approx(49 * 100 / 3600)
    assert stored["epochs_to_target"]["run"]["epochs"] == 10
    assert "run: WER 10 % after 10 epochs, best 9.1 %, CER 4.5 %" in lines
    assert "short: WER 10 % not in 2 epochs, best 50.0 %, CER 25.0 %" in lines
    table = next(i for i, line in enumerate(lines) if line.split()[:1] == ["s"])
    assert lines[table].split() == ["s", "an", "epoch", "speedup", "cumulative", "alone",
                                    "original"]
    assert lines[table + 4].split() == ["normalisation", "800", "1.00x", "2.00x", "-", "1.07x"]
    assert lines[table + 6].split() == ["bf16", "200", "2.00x", "8.00x", "2.00x", "-"]
    assert result["epoch_s"]["bf16"] == 200
    assert "apart by 0.0 % (median), 20.0 % at most" in "\n".join(lines)
    assert any(line.startswith("49 epochs of train-clean-100 take 1.4 hours") for line in lines)
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


def test_the_wer_of_the_ctc_head_is_not_that_of_the_run(tmp_path):
    evals = [{"event": "eval", "epoch": 1, "wer": 0.5, "cer": 0.2, "search": "ctc"},
             {"event": "eval", "epoch": 2, "wer": 0.9, "cer": 0.8, "search": "transducer"}]
    (tmp_path / "log.jsonl").write_text(json.dumps(evals[0]) + "\n")
    with pytest.raises(ValueError, match="log.jsonl: no evaluation of the transducer yet"):
        ladder.epochs_to(tmp_path, 0.6)
    assert tune.read_evals(tmp_path) == []
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, evals)))
    assert ladder.epochs_to(tmp_path, 0.6) == {"epochs": None, "ran": 2, "best_wer": 0.9,
                                               "best_cer": 0.8}
    assert tune.read_evals(tmp_path) == evals[1:]


@pytest.mark.slow
def test_ladder_of_a_tiny_model(tmp_path):
    """Twenty processes that measure two passes each."""
    result = run_bench("ladder", "--shapes", write_shapes(tmp_path / "shapes.json"), "--seconds", 0,
                       "--png", tmp_path / "ladder.png", *SMALL)
    assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "ladder.json").read_text())
    assert [row["name"] for row in stored["ladder"]] == list(ladder.make_rungs(2)[0])
    for row in stored["ladder"]:
        assert len(row["step_s"]) == 2
        assert row["steps"] == 4
        assert row["epochs_s"][0] == pytest.approx(sum(row["step_s"]) / 2 * 200)
        assert row["epoch_s"] == pytest.approx(np.mean(row["epochs_s"]))
        assert row["threads"] == max(1, torch.get_num_threads() // row["ranks"])
    result = json.loads(result.stdout.splitlines()[-1])
    assert result["hours_of_49_epochs"] == stored["hours_of_49_epochs"]
    assert list(result["epoch_s"].values()) == [row["epoch_s"] for row in stored["ladder"]]


@pytest.mark.slow
def test_rung_repeats_the_buckets_until_its_time_is_up(tmp_path):
    measure.synthesize(tmp_path, [(0.4, 2), (0.5, 3), (0.8, 5), (1.0, 4)])
    result = run_bench("rung", "--data", tmp_path, "--split", "noise", "--batch", 2, "--batch-size",
                       2, "--seconds", 15, "--loader-workers", 1, *SMALL)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["steps"] > 4
    assert len(measured["step_s"]) == 2


def test_failing_rung_is_an_error_with_its_reason():
    argv = ["--batch", "2", "--data", "x", "--split", "y", "--stack", "0"]
    with pytest.raises(ValueError, match="bench.py: error: stack: 0, expected at least 1$"):
        ladder.run_rung(argv, 1, {})


def test_unwritable_picture_is_refused_before_the_measurement(tmp_path):
    args = Namespace(runs=[], png=tmp_path / "nowhere" / "ladder.png")
    with pytest.raises(ValueError, match="--png: .*/nowhere cannot be written"):
        ladder.bench_ladder(args, [])


def test_ranks_that_do_not_divide_the_batch_are_an_error(tmp_path):
    shapes = write_shapes(tmp_path / "shapes.json")
    with pytest.raises(ValueError, match="--ranks 3 does not divide the batch of 2"):
        ladder.bench_ladder(Namespace(shapes=shapes, ranks=3, runs=[], png=tmp_path / "x.png"), [])


# ---- the command `scaling` --------------------------------------------------------------------


def run_rung(argv, ranks, env, gbit=0):
    """A stand-in with a batch of 1.8 s, of which the features of many ranks cost 0.2 s more."""
    if ranks == 1:
        return {"step_s": [1.8], "parameters": 100}
    waits = {0: 0.05, 10: 0.1, 1: 0.5}[gbit]
    step = 1.8 * int(argv[-1]) + 0.2 + waits
    return {"step_s": [step], "parameters": 100, "all_reduce_s": 2 * waits,
            "waits_s": [waits - 0.03125, waits, waits + 0.25]}


@pytest.mark.parametrize("has_hosts", [True, False])
def test_table_and_projection(monkeypatch, capsys, tmp_path, has_hosts):
    monkeypatch.setattr(ladder, "run_rung", run_rung)
    monkeypatch.setattr(ladder, "can_limit_network", lambda: has_hosts)
    path = tmp_path / "scaling.json"
    lines, result = run_here(monkeypatch, capsys, "scaling", "--json", path)
    assert json.loads(path.read_text()) == result
    assert result["torch"] == torch.__version__
    pair = next(line for line in lines if line.startswith("2 ranks"))
    assert pair.split() == ["2", "ranks", "2.05", "0.100", "0.05", "(0.02", "to", "0.30)", "88%"]
    assert result["cases"]["2 ranks"]["efficiency"] == pytest.approx(1.8 / 2.05)
    if not has_hosts:
        assert set(result["cases"]) == {"1 rank", "2 ranks"}
        assert "projected_speedup" not in result
        return
    accumulated = result["cases"]["2 hosts, 1 Gbit/s --accumulation 4"]
    assert accumulated["efficiency"] == pytest.approx(4 * 1.8 / (4 * 1.8 + 0.7))
    # A ring of 8 ranks sends 7/4 of the bytes that a ring of 2 sends.
    assert result["projected_speedup"] == {
        "10 Gbit/s": pytest.approx(4 * 2.05 / (2 + 7 / 4 * 0.1)),
        "1 Gbit/s": pytest.approx(4 * 2.05 / (2 + 7 / 4 * 0.5)),
    }
    assert lines[-1].startswith("The original says 5.16.")


@pytest.mark.slow
def test_ranks_and_hosts_are_really_measured(tmp_path):
    result = run_bench("scaling", "--json", tmp_path / "scaling.json", "--turns", 1, "--preset",
                       "demo", "--batch-size", 1, "--vocab-size", 24)
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    cases = json.loads(last)["cases"]
    pair = cases["2 ranks"]
    assert pair["step"] > pair["waits"] > 0
    assert pair["efficiency"] == cases["1 rank"]["step"] / pair["step"]
    if any("no hosts" in line for line in lines):
        assert len(cases) == 2
    else:
        assert len(cases) == 5
        slow = cases["2 hosts, 1 Gbit/s"]["all_reduce"]
        assert slow > 0.5 * pair["gradient_bytes"] * 8 / 1e9  # the rate holds, except for a burst
