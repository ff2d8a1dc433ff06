# SPDX-License-Identifier: Apache-2.0
"""bench.py ladder measures what it says: python -m pytest tests/test_ladder.py"""

import gzip
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from tones import REPO

import data
import features
from loss import joint_transducer_loss
from tools import bench, ladder

TRAIN_CLEAN_100 = REPO.parent / "shared/librispeech/train-clean-100.tsv.gz"


def random_batch(batch: int, dtype: torch.dtype) -> tuple[tuple, tuple]:
    """Arguments of the loss with unequal lengths: T <= 6, U <= 4, J = 8, V = 5."""
    torch.manual_seed(1)
    shapes = ((batch, 6, 8), (batch, 5, 8), (5, 8), (5,))
    inputs = tuple(torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)
    lens = torch.arange(batch) % 6 + 1, torch.arange(batch) % 5
    return inputs, (torch.randint(0, 4, (batch, 4)), *lens)


@pytest.mark.parametrize("batch", [1, ladder.PLAIN_ROWS, 2 * ladder.PLAIN_ROWS + 1])
def test_plain_loss_of_the_first_rungs_has_the_fused_value_and_gradient(batch):
    inputs, lattice = random_batch(batch, torch.float64)
    results = []
    for function in (joint_transducer_loss, ladder.plain_joint_loss):
        costs = function(*inputs, *lattice, 4, 0.0, "none")
        grads = torch.autograd.grad(costs.sum() / batch, inputs)
        results.append((costs, *grads))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-9, atol=1e-9)


def test_each_rung_adds_one_idea_and_alone_is_on_top_of_the_originals():
    steps, alone = ladder.make_rungs(2)
    rungs = list(steps.values())
    for before, after in zip(rungs, rungs[1:], strict=False):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert rungs[-1] == ladder.Rung(("--preset", "democratized"), 2, True, "bf16", 1)
    assert list(alone) == list(steps)[ladder.THEIRS :]
    for rung in alone.values():
        assert sum(a != b for a, b in zip(rungs[3], rung, strict=True)) == 1


def test_speedups():
    seconds = [100.0, 50.0, 50.0, 40.0, 20.0, 5.0]
    rows = [{"name": str(i), "epoch_s": s} for i, s in enumerate(seconds)]
    rows[3]["name"] = "normalisation"
    ladder.add_speedups(rows, [{"epoch_s": 16.0}, {"epoch_s": 10.0}])
    assert [row["speedup"] for row in rows] == [1, 2, 1, 1.25, 2, 4]
    assert [row["cumulative"] for row in rows] == [1, 2, 2, 2.5, 5, 20]
    assert [row["alone"] for row in rows] == [None, None, None, None, 2.5, 4]
    assert rows[3]["original"] == pytest.approx(1.0703, abs=1e-4)


def test_projected_hours():
    args = Namespace(utterances=10_240, global_batch=1024, server_cores=16, server_ranks=4,
                     network_gbit=32)
    row = {"epoch_s": 48.0, "ranks": 2, "threads": 2, "parameters": 10**9}
    pair = {"gradient_bytes": 10**9, "all_reduce": 0.5}
    scaling = {"latency_s": 0.05, "slope": 2.0, "cases": {"2 ranks": pair}}
    # 48 s on 4 cores are 12 s on 16. Of four ranks each passes on 3/2 of 4 GB, of two 1 GB in
    # 0.5 s: ten times 3 s.
    assert ladder.project_hours(row, 1, scaling, args) == pytest.approx(49 * (12 + 30) / 3600)
    # 16 ranks: 3 s, and ten times twice the seconds for 15/8 of 32 Gbit, and 30 turns.
    assert ladder.project_hours(row, 4, scaling, args) == pytest.approx(49 * (3 + 52.5) / 3600)


def write_run(folder: Path, wers: list[float]) -> Path:
    """A run of the demo preset without normalisation."""
    folder.mkdir()
    start = {"event": "start", "step": 0, "model_config": {"normalization": False},
             "train_config": {"preset": "demo", "seed": 3}}
    evals = [{"event": "eval", "epoch": e, "step": e, "wer": wer, "seconds": 1.0, "hours": 1.0}
             for e, wer in enumerate(wers, 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (start, *evals)))
    return folder


def test_epochs_to_a_target(tmp_path):
    run = write_run(tmp_path / "run", [1.0, 0.1, 0.05])
    expected = {"epochs": 2, "ran": 3, "best_wer": 0.05, "normalization": False, "preset": "demo",
                "seed": 3}
    assert ladder.epochs_to(run, 0.1) == expected
    assert ladder.epochs_to(run, 0.01) == expected | {"epochs": None}


def test_steps_that_build_kernels_do_not_count():
    assert ladder.steady([[9.0, 1.0, 1.5, 1.2], [8.0, 2.0]]) == {
        "step_s": [1.2, 2.0], "least_s": [1.0, 2.0], "most_s": [1.5, 2.0]
    }


def test_noise_has_the_asked_lengths_and_labels(tmp_path):
    shapes = [(0.5, 3), (1.25, 7), (0.3, 1)]
    bench.synthesize(tmp_path, shapes)
    utterances = data.read_split(tmp_path, "noise")
    assert [u.duration_s for u in utterances] == pytest.approx([s for s, _ in shapes])
    assert [len(bench.LabelCount(32).encode(u.text)) for u in utterances] == [3, 7, 1]


# ---- shapes of train-clean-100 ----------------------------------------------------------------


def test_stored_shapes_are_those_of_six_buckets():
    buckets, utterances = bench.read_shapes()
    assert utterances == 28_253
    assert [len(bucket) for bucket in buckets] == [32] * 6
    seconds = [s for bucket in buckets for s, _ in bucket]
    assert seconds == sorted(seconds)
    assert max(seconds) <= features.DEFAULT.max_utterance_s
    assert np.mean(seconds) == pytest.approx(12.65, abs=0.01)
    assert np.mean([n for bucket in buckets for _, n in bucket]) == pytest.approx(58.1, abs=0.5)


@pytest.mark.slow
@pytest.mark.skipif(not TRAIN_CLEAN_100.exists(), reason=f"{TRAIN_CLEAN_100} is not there")
def test_stored_shapes_are_drawn_from_train_clean_100():
    """Takes a minute: it trains the tokenizer."""
    lines = gzip.decompress(TRAIN_CLEAN_100.read_bytes()).decode().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    tokenizer = data.Tokenizer(data.train_tokenizer((text for _, _, text in rows), 1024))
    rows = [row for row in rows if float(row[1]) <= features.DEFAULT.max_utterance_s]
    seconds = np.array([float(row[1]) for row in rows])
    labels = np.array([len(tokenizer.encode(row[2])) for row in rows])
    buckets = []
    for bucket in np.array_split(np.argsort(seconds, kind="stable"), 6):
        buckets.append([])
        for i, part in enumerate(np.array_split(bucket, 32)):
            part = part[np.argsort(labels[part], kind="stable")]
            chosen = part[int((i * 11 % 32 + 0.5) / 32 * len(part))]
            buckets[-1].append((round(float(seconds[chosen]), 2), int(labels[chosen])))
    assert bench.read_shapes() == (buckets, len(rows))


# ---- the command ------------------------------------------------------------------------------

SMALL = ["--enc-hidden", "8", "--pred-hidden", "8", "--joint-hidden", "8", "--vocab-size", "16"]


def run_bench(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tools.bench", *map(str, words)], cwd=REPO,
                          text=True,
                          capture_output=True, timeout=900, check=False)


def write_shapes(path: Path) -> Path:
    buckets = [[[0.4, 2], [0.5, 3]], [[0.8, 5], [1.0, 4]]]
    path.write_text(json.dumps({"utterances": 400, "buckets": buckets}))
    return path


def needed(folder: Path) -> list:
    """Flags that name what a ladder reads."""
    scaling = {
        "latency_s": 0.1,
        "slope": 1.0,
        "cases": {"2 ranks": {"gradient_bytes": 10**6, "all_reduce": 0.1}},
    }
    (folder / "scaling.json").write_text(json.dumps(scaling))
    return ["--shapes", write_shapes(folder / "shapes.json"), "--scaling", folder / "scaling.json"]


def test_report_of_a_ladder(tmp_path, monkeypatch, capsys):
    """Steps of known seconds: table, JSON, projection and picture."""
    asked = []

    def measure(rung: ladder.Rung, batch: int, threads: int, words: list) -> dict:
        asked.append(rung)
        seconds = 8.0 if rung == ladder.Rung() else 4.0
        seconds /= rung.ranks * (1 + rung.fused) * (1 + (rung.precision == "bf16"))
        if rung.ranks == 1 and rung.precision == "bf16":  # 20 % more in the second round
            seconds *= 0.9 if asked.count(rung) == 1 else 1.1
        return {"step_s": [0.5 * seconds, 1.5 * seconds], "parameters": 10**6, "threads": 1}

    monkeypatch.setattr(ladder, "measure_rung", measure)
    run = write_run(tmp_path / "run", [1 / e for e in range(1, 12)])
    words = [*needed(tmp_path), "--png", tmp_path / "ladder.png", "--runs", run]
    monkeypatch.setattr(sys, "argv", ["bench.py", "ladder", *map(str, words)])
    bench.main()
    said = capsys.readouterr().out.splitlines()
    assert len(asked) == 20
    assert len(set(asked)) == 11
    assert asked[11:] == asked[2:11]
    stored = json.loads((tmp_path / "ladder.json").read_text())
    assert [row["epoch_s"] for row in stored["ladder"]] == [1600, 800, 800, 800, 400, 200, 200, 100]
    assert [row["alone"] for row in stored["ladder"]] == [None, None, None, None, 2, 2, 1, 2]
    assert stored["hours_of_49_epochs"]["here"] == pytest.approx(49 * 100 / 3600)
    assert stored["epochs_to_target"]["run"]["epochs"] == 10
    assert "run: WER 10 % after 10 epochs, best 9.1 %" in said
    table = next(i for i, line in enumerate(said) if line.split()[:1] == ["s"])
    assert said[table].split() == ["s", "an", "epoch", "speedup", "cumulative", "alone", "original"]
    assert said[table + 4].split() == ["normalisation", "800", "1.00x", "2.00x", "-", "1.07x"]
    assert said[table + 6].split() == ["bf16", "200", "2.00x", "8.00x", "2.00x", "-"]
    assert json.loads(said[-1])["epoch_s"]["bf16"] == 200
    assert stored["ladder"][5]["epochs_s"] == pytest.approx([180, 220])
    assert "apart by 0.0 % (median), 20.0 % at most" in "\n".join(said)
    assert [row["apart"] for row in stored["ladder"][:2]] == [None, None]
    assert any("from '2 ranks'; assumed of a server: 2 ranks, one a socket, 64 cores" in line
               for line in said)
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


@pytest.mark.slow
def test_ladder_of_a_tiny_model(tmp_path):
    """Twenty processes that measure two passes each."""
    result = run_bench("ladder", *needed(tmp_path), "--seconds", 0,
                       "--png", tmp_path / "ladder.png", *SMALL)
    assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "ladder.json").read_text())
    assert [row["name"] for row in stored["ladder"]] == list(ladder.make_rungs(2)[0])
    assert len(stored["alone"]) == 4
    assert stored["alone"][0]["step_s"] == stored["ladder"][ladder.THEIRS]["step_s"]
    for row in stored["ladder"] + stored["alone"]:
        assert len(row["step_s"]) == 2
        assert row["steps"] == 4
        assert row["epochs_s"][0] == pytest.approx(sum(row["step_s"]) / 2 * 200)
        assert row["epoch_s"] == pytest.approx(np.mean(row["epochs_s"]))
        assert row["threads"] == max(1, torch.get_num_threads() // row["ranks"])
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["hours_of_49_epochs"] == stored["hours_of_49_epochs"]
    assert list(said["epoch_s"].values()) == [row["epoch_s"] for row in stored["ladder"]]


@pytest.mark.slow
def test_a_rung_goes_round_the_buckets_until_its_time_is_up(tmp_path):
    bench.synthesize(tmp_path, [(0.4, 2), (0.5, 3), (0.8, 5), (1.0, 4)])
    result = run_bench("rung", "--data", tmp_path, "--split", "noise", "--batch", 2, "--batch-size",
                       2, "--seconds", 15, "--loader-workers", 1, *SMALL)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["steps"] > 4
    assert len(measured["step_s"]) == 2


@pytest.mark.slow
def test_a_rung_that_fails_fails_the_ladder_with_its_reason(tmp_path):
    result = run_bench("ladder", *needed(tmp_path), "--stack", 0)
    assert result.returncode == 1
    assert "stack: 0, expected at least 1" in result.stderr


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    args = Namespace(runs=[], png=tmp_path / "nowhere" / "ladder.png")
    with pytest.raises(ValueError, match="--png: .*/nowhere cannot be written"):
        ladder.bench_ladder(args, [])


def test_ranks_that_do_not_divide_the_batch_are_an_error(tmp_path):
    shapes = write_shapes(tmp_path / "shapes.json")
    with pytest.raises(ValueError, match="--ranks 3 does not divide the batch of 2"):
        ladder.bench_ladder(Namespace(shapes=shapes, ranks=3, runs=[], png=tmp_path / "x.png"), [])
