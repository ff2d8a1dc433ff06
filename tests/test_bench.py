# SPDX-License-Identifier: Apache-2.0
"""The figures of bench.py are those of its steps, losses, recordings and splits."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tones import REPO, write_tones
from torch.utils.flop_counter import FlopCounterMode

import data
import decode
import features
import report
from checkpoint import CHECKPOINT_FORMAT, load_checkpoint, save_checkpoint
from model import PRESETS, ModelConfig, Transducer
from tools import bench

SMALL = ["--enc-hidden", "8", "--pred-hidden", "8", "--joint-hidden", "8", "--vocab-size", "16",
         "--batch-size", "2", "--loader-workers", "0"]


def run_here(monkeypatch, capsys, *argv):
    """bench.main in this process: the lines it prints, the last one decoded."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, argv)])
    bench.main()
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("changes", [
    {}, {"stack": 3, "pre_layers": 1, "pred_layers": 1},
    {"conv_layers": 3, "pre_layers": 0, "stack": 1, "ctc_split": 2},
    {"conv_layers": 2, "ctc_split": 1, "char_head": True}, {"bidirectional": True},
])
def test_flops_are_those_that_torch_counts(changes):
    """torch counts matrix products alone, and those of LSTM cells without oneDNN."""
    cfg = replace(ModelConfig(64, 24, 16, 2, 2, 2, 12, 2, 20), **changes)
    model = Transducer(cfg).eval()
    lens, target_lens = torch.tensor([12, 12]), torch.tensor([5, 5])
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        outputs = model(torch.randn(2, 12, 64), lens, torch.zeros(2, 5, dtype=torch.int64))
        model.joint(outputs.encoded, outputs.predicted)
    assert bench.forward_flops(model, lens, target_lens) == counter.get_total_flops()


def test_padding_does_not_count():
    model, lens = Transducer(PRESETS["demo"]), torch.tensor([420, 300])
    alone = [bench.forward_flops(model, lens[i : i + 1], torch.tensor([50])) for i in (0, 1)]
    assert bench.forward_flops(model, lens, torch.tensor([50, 50])) == pytest.approx(sum(alone))


def test_result_of_steps_on_four_ranks_with_a_batch_of_2():
    rows = [(1.0, 2e12), (3.0, 2e12)]  # seconds, this rank's operations
    cfg = Namespace(batch_size=2, accumulation=1, preset="demo")
    trainer = Namespace(cfg=cfg, ranks=Namespace(world=4), dtype=torch.bfloat16, global_batch=8)
    result = bench.step_result(trainer, rows, rate=6.0)
    assert result["utts_per_s"] == 4  # 16 in 4 s
    assert result["mfu"] == pytest.approx(3 * 4e12 / 4 / 6e12)
    assert (result["median_step_s"], result["dtype"], result["ranks"]) == (2, "bfloat16", 4)


def test_step_prints_throughput_and_stages_that_add_up(capsys, monkeypatch, tmp_path):
    write_tones(tmp_path, "dev", ["ONE TWO", "TWO", "ONE", "TWO"], [0.4, 0.5, 0.6, 0.7])
    monkeypatch.setattr(bench, "gemm_tflops", lambda dtype: 0.5)
    # Every step is an epoch.
    lines, result = run_here(monkeypatch, capsys, "step", "--data", tmp_path, "--split", "dev",
                             "--warmup", 1, "--steps", 2, *SMALL, "--accumulation", 2)
    assert lines[0].startswith("first 1 steps: ")
    rows = [line.rsplit(maxsplit=2) for line in lines[2:]]
    shares = {name: float(share.rstrip("%")) for name, _, share in rows if share != "apart"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert set(shares) == {*report.STAGES, "everything else"}
    assert shares["oneDNN LSTM"] > 0
    assert {name for name, _, share in rows if share == "apart"} == {"decode", "features"}
    assert 0 < result["mfu"] < 1
    assert result["peak_rss_gb"] > 0.1
    assert (result["batch"], result["accumulation"], result["ranks"]) == (2, 2, 1)
    assert set(result) == {
        "utts_per_s", "mfu", "gemm_tflops", "dtype", "peak_rss_gb", "median_step_s", "batch",
        "accumulation", "ranks", "threads", "preset", "commit", "torch", "processor",
    }


def test_split_that_is_smaller_than_a_batch_is_an_error(capsys, monkeypatch, tmp_path):
    write_tones(tmp_path, "dev", ["ONE"], [0.4])
    with pytest.raises(SystemExit, match="1 utterances, expected at least a batch of 2"):
        run_here(monkeypatch, capsys, "step", "--data", tmp_path, "--split", "dev", *SMALL)


def test_fused_and_plain_loss_are_compared_on_the_same_batch(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", replace(PRESETS["demo"], joint_hidden=8, vocab_size=8))
    dtypes = []
    monkeypatch.setattr(bench, "gemm_tflops", lambda dtype: dtypes.append(dtype) or 1e-3)
    seconds = {7: 2.0, 3: 8.0}  # by repeats: fused, plain
    monkeypatch.setattr(bench, "median_seconds", lambda f, repeats: f() or seconds[repeats])
    _, (_, lens, target_lens) = bench.loss_inputs(PRESETS["small"], 2)
    nodes = int((lens * (target_lens + 1)).sum())
    for precision, name in (("fp32", "float32"), ("bf16", "bfloat16")):
        bench.bench_loss(Namespace(preset="small", batch_size=2, precision=precision,
                                   peers=False))
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["dtype"] == name
    # The share relates to the matrix rate of the same dtype.
    assert dtypes == [torch.float32, torch.bfloat16]
    assert (result["utts_per_s"], result["plain_utts_per_s"], result["speedup"]) == (1, 0.25, 4)
    assert result["share_of_gemm"] == pytest.approx(3 * 2 * nodes * 8 * 8 / 2.0 / 1e9)
    padded = 2 * lens.max() * (target_lens.max() + 1)
    assert result["valid_share"] == pytest.approx(nodes / padded)


def write_model(folder):
    """A split of three tones and a small untrained model; returns the flags of both."""
    write_tones(folder, "dev", ["ONE TWO", "TWO", "ONE"], [0.25, 0.44, 0.63])
    tokenizer = data.Tokenizer(data.train_tokenizer(["ONE TWO"], 16))
    cfg = replace(PRESETS["demo"], enc_hidden=8, pred_hidden=8, joint_hidden=8,
                  vocab_size=tokenizer.vocab_size)
    weights = Transducer(cfg).state_dict()
    checkpoint = {
        "format": CHECKPOINT_FORMAT, "ema": weights, "model": weights,
        "train_config": {"preset": "demo"}, "model_config": asdict(cfg),
        "feature_config": asdict(features.FeatureConfig()),
        "tokenizer": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8),
    }
    save_checkpoint(folder / "best.pt", checkpoint)
    return "--checkpoint", folder / "best.pt", "--data", folder, "--split", "dev"


def test_steps_of_init_begin_with_its_weights_and_pieces(capsys, monkeypatch, tmp_path):
    _, checkpoint, *corpus = write_model(tmp_path)
    stored = load_checkpoint(checkpoint)

    def check(trainer, steps, count):
        for name, x in trainer.model.state_dict().items():
            assert torch.equal(x, stored["model"][name]), name
        (batch,) = next(steps)
        texts = {"1-2-0000": "ONE TWO", "1-2-0001": "TWO", "1-2-0002": "ONE"}
        for name, labels, n in zip(batch.ids, batch.targets, batch.target_lens, strict=True):
            assert decode.stored_tokenizer(stored).decode(labels[:n].tolist()) == texts[name]
        raise ValueError("seen")

    monkeypatch.setattr(bench, "time_steps", check)
    monkeypatch.setattr(bench, "gemm_tflops", lambda dtype: 0.5)
    with pytest.raises(SystemExit, match=r"bench.py: seen"):
        run_here(monkeypatch, capsys, "step", *corpus, "--init", checkpoint, "--batch-size", 2,
                 "--loader-workers", 0, "--ctc-weight", 0, "--char-weight", 0, "--empty-prob", 0)


def test_split_is_decoded_in_batches_and_alone(capsys, monkeypatch, tmp_path):
    argv = ["decode", *write_model(tmp_path)]
    _, result = run_here(monkeypatch, capsys, *argv)
    assert result["same_as_alone"] is True
    assert result["rtf"] == pytest.approx(result["seconds"] / (0.25 + 0.44 + 0.63))
    assert result["processor"]
    # A text that differs between the two is noticed.
    real, calls = decode.decode_batches, []

    def different_in_every_call(*args):
        calls.append(args)
        texts, counts = real(*args)
        return {k: f"{text} {len(calls)}" for k, text in texts.items()}, counts

    monkeypatch.setattr(decode, "decode_batches", different_in_every_call)
    assert run_here(monkeypatch, capsys, *argv)[1]["same_as_alone"] is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["step", "--steps", "0"], "--steps: 0, expected at least 1"),
        (["step", "--warmup", "-1"], "--warmup: -1, expected at least 0"),
        (["features", "--data", "x"], "--data and --split need each other"),
        (["loss", "--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["start", "--checkpoint", "x", "y", "--turns", "0"], "--turns: 0, expected at least 1"),
    ],
)
def test_wrong_flags_are_errors(capsys, monkeypatch, argv, message):
    with pytest.raises(SystemExit, match="2"):
        run_here(monkeypatch, capsys, *argv)
    assert message in capsys.readouterr().err


def test_inputs_of_the_loss_have_the_lengths_of_train_clean_100():
    _, (_, enc_lens, target_lens) = bench.loss_inputs(PRESETS["democratized"], 32)
    assert 40 < enc_lens.double().mean() < 65  # the corpus has 53: 12.7 s in frames of 240 ms
    assert 45 < target_lens.double().mean() < 72  # the corpus has 58


def test_figures_of_features_are_medians_of_three_runs(capsys, monkeypatch):
    """A run gives the seconds of decoding and of features, here in eighths of a second."""
    runs = {False: iter([(4, 1), (1, 1), (2, 5)]), True: iter([(1, 8), (1, 5), (1, 2)])}

    def seconds(utterances, cfg, augment):
        decoding, features = next(runs[augment])
        return {"decode": decoding / 8, "features": features / 8}

    monkeypatch.setattr(bench, "front_end_s", seconds)
    _, result = run_here(monkeypatch, capsys, "features", "--count", 4)
    assert result["decode_ms_per_utt"] == 250
    assert (result["plain_ms_per_utt"], result["ms_per_utt"]) == (625, 750)
    assert 1 < result["audio_s"] < 17


def test_front_end_is_measured_with_and_without_augmentation(monkeypatch, tmp_path):
    """The features of every utterance are computed once, and those of the first one before that."""
    write_tones(tmp_path, "dev", ["ONE", "TWO"], [0.4, 0.5])
    utterances = data.read_split(tmp_path, "dev", features.DEFAULT)
    generators = []
    monkeypatch.setattr(bench, "features", lambda samples, cfg, rng: generators.append(rng))
    assert min(bench.front_end_s(utterances, features.DEFAULT).values()) >= 0
    assert [rng is None for rng in generators] == [False] * 3
    bench.front_end_s(utterances, features.DEFAULT, augment=False)
    assert generators[3:] == [None] * 3


def test_start_ends_with_the_first_line(monkeypatch):
    times_s, program = [0], mock.MagicMock(returncode=0)
    program.__enter__.return_value = program
    program.stdout.readline.side_effect = lambda: times_s.append(1) or "text\n"
    program.communicate.side_effect = lambda: times_s.append(9)
    monkeypatch.setattr(bench.subprocess, "Popen", lambda *_, **__: program)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: times_s[-1])
    assert bench.first_line_s(["program"]) == 1


@pytest.mark.parametrize(("code", "message"), [
    ("", "status 0, output ''"), ("print('text'); exit(1)", "status 1, output 'text\\n'"),
])
def test_a_program_that_fails_or_prints_no_line_has_no_start(code, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bench.first_line_s([sys.executable, "-c", code])


def test_start_of_decode_and_of_its_imports_are_measured_in_turns(capsys, monkeypatch, tmp_path):
    seconds = {"decode.py": iter([9, 3, 1, 2]), "-c": iter([0.5, 0.25, 1])}  # the first is left out
    monkeypatch.setattr(bench, "first_line_s", lambda command: next(seconds[command[1]]))
    _, result = run_here(monkeypatch, capsys, "start", "--turns", 3, "--checkpoint",
                         tmp_path / "best.pt", tmp_path / "a.flac")
    assert (result["start_s"], result["imports_s"]) == (2, 0.5)
    assert result["starts_s"] == [3, 1, 2]


def test_neighbour_keeps_the_last_core_busy():
    with bench.neighbour() as pid:
        assert os.sched_getaffinity(pid) == {max(os.sched_getaffinity(0))}
        assert os.getsid(pid) == pid

        def hundredths():  # of a second in user and kernel mode
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return sum(map(int, fields[11:13]))

        until = time.monotonic() + 300
        while hundredths() <= 5:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_launches_are_those_of_run_sh_with_other_waits(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launches = bench.make_launches()
    default, one = launches["as launched"], launches["one rank"]
    threads = int(default.variables["OMP_NUM_THREADS"])
    assert one.ranks == 1
    assert default.ranks * threads <= int(one.variables["OMP_NUM_THREADS"])
    assert launches["OMP_WAIT_POLICY=passive"] == (
        1, one.variables | {"OMP_WAIT_POLICY": "passive"})


def test_steps_beside_a_neighbour_are_measured_in_turns(capsys, monkeypatch):
    calls, company = [], []

    @contextlib.contextmanager
    def neighbour():
        company.append("busy")
        yield
        company.pop()

    def run_rung(argv, ranks, variables):
        assert argv[argv.index("--data") + 1]
        calls.append((ranks, variables["x"], len(company)))
        assert argv[-1] == str(8 // ranks)
        return {"step_s": [4.0 if company else 1.0]}

    launches = {"a": bench.Launch(1, {"x": "1"}), "b": bench.Launch(2, {"x": "2"})}
    monkeypatch.setattr(bench, "make_launches", lambda: launches)
    monkeypatch.setattr(bench, "neighbour", neighbour)
    monkeypatch.setattr(bench.ladder, "run_rung", run_rung)
    lines, result = run_here(monkeypatch, capsys, "neighbour", "--batch-size", 8, "--turns", 2,
                             "--epochs", 3)
    turn = [(1, "1", 0), (1, "1", 1), (2, "2", 0), (2, "2", 1)]
    assert calls == turn + turn
    assert lines[1].split() == ["a", "8.0", "2.0", "0.25"]
    assert result["launches"]["b"] == {"alone": 8, "beside": 2, "ranks": 2, "variables": {"x": "2"}}


@pytest.mark.slow
def test_training_is_measured_beside_a_busy_process(capsys, monkeypatch):
    launches = bench.make_launches()
    chosen = {name: launches[name] for name in ("as launched", "one rank")}
    monkeypatch.setattr(bench, "make_launches", lambda: chosen)
    _, result = run_here(monkeypatch, capsys, "neighbour", "--turns", 1, "--seconds", 0,
                         "--enc-hidden", 8, "--pred-hidden", 8, "--joint-hidden", 8)
    assert list(result["launches"]) == list(chosen)
    assert all(row["beside"] > 0 for row in result["launches"].values())


@pytest.mark.slow
def test_two_ranks_print_one_table_and_the_all_reduce():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "tools.bench", "step", "--warmup", "1", "--steps", "1"]
    done = subprocess.run([*command, *SMALL], cwd=REPO, capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("{") for line in lines) == 1
    assert any(line.startswith("gradients' all-reduce") for line in lines)
    assert json.loads(lines[-1])["ranks"] == 2
