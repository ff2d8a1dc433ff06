# SPDX-License-Identifier: Apache-2.0
"""bench.py measures what it says: python -m pytest tests/test_bench.py"""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace

import pytest
import torch
from tones import write_tones
from torch.utils.flop_counter import FlopCounterMode

import data
import decode
import features
import ranks
import train
from checkpoint import CHECKPOINT_FORMAT, save_checkpoint
from model import PRESETS, ModelConfig, Transducer
from tools import bench

SMALL = ["--enc-hidden", "8", "--pred-hidden", "8", "--joint-hidden", "8", "--vocab-size", "16",
         "--batch-size", "2", "--loader-workers", "0"]


@pytest.fixture(autouse=True)
def _leave_denormal_numbers():
    yield
    torch.set_flush_denormal(False)  # the benches turn it on for good


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("changes", [{}, {"stack": 3, "pre_layers": 1, "pred_layers": 1}])
def test_flops_are_those_that_torch_counts(changes):
    """torch counts matrix products alone, and LSTM cells where it takes them apart."""
    cfg = replace(ModelConfig(64, 24, 16, 2, 2, 2, 12, 2, 20), **changes)
    model = Transducer(cfg).eval()
    lens, target_lens = torch.tensor([12, 12]), torch.tensor([5, 5])
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        encoded, _ = model.encode(torch.randn(2, 12, 64), lens)
        model.joint(encoded, model.predict(torch.zeros(2, 5, dtype=torch.int64)))
    assert bench.forward_flops(cfg, lens, target_lens) == counter.get_total_flops()


def test_padding_does_not_count():
    cfg, lens = PRESETS["democratized"], torch.tensor([420, 300])
    alone = [bench.forward_flops(cfg, lens[i : i + 1], torch.tensor([50])) for i in (0, 1)]
    assert bench.forward_flops(cfg, lens, torch.tensor([50, 50])) == pytest.approx(sum(alone))


def test_nested_stages_add_up_to_the_whole(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 6.0])  # outer begins, inner begins, inner ends, outer ends
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    watch = bench.Stopwatch()
    inner = watch.timed("inner", lambda: "result")
    assert watch.timed("outer", inner)() == "result"
    assert watch.seconds == {"inner": 3.0, "outer": 3.0}


def test_report_of_steps(capsys):
    """Four ranks of a batch of 2: warm-up left out, 2 x 4 utterances a step."""
    args = Namespace(warmup=1)
    rows = [(9.0, 1e12), (1.0, 2e12), (3.0, 2e12)]  # seconds, this rank's operations
    watch = bench.Stopwatch()
    watch.seconds["encoder"] = 3.0
    cfg = train.TrainConfig(".", ["x"], "x", ".", batch_size=2)
    trainer = Namespace(cfg=cfg, ranks=ranks.Ranks(0, 4, 0), dtype=torch.bfloat16)
    bench.report_step(args, trainer, rows, watch, {"decode": 0.004}, 6.0)
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0] == "first 1 steps: 9.0 s, left out"
    assert [line.split() for line in table[2:]] == [
        ["encoder", "187.50", "75.0%"], ["rest", "62.50", "25.0%"], ["decode", "4.00", "apart"]
    ]
    said = json.loads(last)
    assert said["utts_per_s"] == 4  # 16 in 4 s
    assert said["mfu"] == pytest.approx(3 * 4e12 / 4 / 6e12)
    assert said["median_step_s"] == 2
    assert said["dtype"] == "bfloat16"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stages_of_a_step_add_up(capsys, monkeypatch, accumulation):
    monkeypatch.setattr(bench, "gemm_tflops", lambda dtype: 0.5)
    words = ["--warmup", "1", "--steps", "2", "--preset", "democratized", *SMALL,
             "--accumulation", str(accumulation)]
    monkeypatch.setattr(sys, "argv", ["bench.py", "step", *words])
    bench.main()
    *table, last = capsys.readouterr().out.splitlines()
    said, rows = json.loads(last), [line.rsplit(maxsplit=2) for line in table[2:]]
    stages = {name: float(ms) for name, ms, share in rows if share != "apart"}
    assert sum(stages.values()) == pytest.approx(1e3 / said["utts_per_s"], abs=0.1)
    assert set(stages) == {
        "wait for data", "encoder", "prediction", "joint+loss", "joint+loss backward",
        "other backward", "all-reduce of sums", "optimiser", "EMA", "rest",
    }
    assert all(ms >= 0 for ms in stages.values())
    assert stages["rest"] < 0.2 * sum(stages.values())
    apart = {name for name, _, share in rows if share == "apart"}
    assert apart == {"decode", "features"}
    assert 0 < said["mfu"] < 1
    assert said["peak_rss_gb"] > 0.1
    assert (said["batch"], said["accumulation"], said["ranks"]) == (2, accumulation, 1)


def test_fused_and_plain_loss_are_compared_on_the_same_batch(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", replace(PRESETS["demo"], joint_hidden=8, vocab_size=8))
    related = []
    monkeypatch.setattr(bench, "gemm_tflops", lambda dtype: related.append(dtype) or 1e-3)
    seconds = {7: 2.0, 3: 8.0}  # by repeats: of the fused one, of the plain one
    monkeypatch.setattr(bench, "median_seconds", lambda f, repeats: f() or seconds[repeats])
    _, (_, lens, target_lens) = bench.loss_inputs(PRESETS["small"], 2)
    nodes = int((lens * (target_lens + 1)).sum())
    for precision, name in (("fp32", "float32"), ("bf16", "bfloat16")):
        bench.bench_loss(Namespace(preset="small", batch_size=2, precision=precision))
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert said["dtype"] == name
    # The rate that the share relates to is that of the products' own dtype.
    assert related == [torch.float32, torch.bfloat16]
    assert (said["utts_per_s"], said["plain_utts_per_s"], said["speedup"]) == (1, 0.25, 4)
    # Forward once and backward twice, a multiplication and an addition each.
    assert said["share_of_gemm"] == pytest.approx(3 * 2 * nodes * 8 * 8 / 2.0 / 1e9)
    assert said["valid_share"] == pytest.approx(nodes / (2 * lens.max() * (target_lens.max() + 1)))
    assert 0 < said["visited_share"] < 1


def test_memory_of_the_loss_is_not_that_of_the_matrix_rate():
    program = [sys.executable, "-m", "tools.bench"]
    command = [*program, "loss", "--preset", "demo", "--batch-size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 <= json.loads(done.stdout.splitlines()[-1])["memory_growth_gb"] < 0.1


def test_recordings_come_again_for_large_batches(monkeypatch):
    monkeypatch.setattr(bench, "MOST_RECORDINGS", 3)
    with bench.recordings(Namespace(data=None), 8) as utterances:
        assert [u.id[-1] for u in utterances] == list("01201201")


def test_steps_go_on_over_epochs_and_no_further_than_asked():
    taken = []

    def loader():
        for i in range(3):
            taken.append(i)
            yield i

    run = Namespace(epoch_loader=loader, trainer=Namespace(cfg=Namespace(accumulation=1)),
                    progress=Namespace(epoch=1))
    assert list(bench.iter_steps(run, 4)) == [[0], [1], [2], [0]]
    assert (taken, run.progress.epoch) == ([0, 1, 2, 0], 2)


def test_a_split_is_decoded_in_batches_and_alone(capsys, monkeypatch, tmp_path):
    write_tones(tmp_path, "dev", ["ONE TWO", "TWO", "ONE"], [0.25, 0.44, 0.63])
    tokenizer = data.Tokenizer(data.train_tokenizer(["ONE TWO"], 16))
    cfg = replace(PRESETS["demo"], enc_hidden=8, pred_hidden=8, joint_hidden=8,
                  vocab_size=tokenizer.vocab_size)
    checkpoint = {
        "format": CHECKPOINT_FORMAT, "ema": Transducer(cfg).state_dict(),
        "model_config": asdict(cfg), "feature_config": asdict(features.FeatureConfig()),
        "tokenizer": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8),
    }
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    words = ["--checkpoint", tmp_path / "best.pt", "--data", tmp_path, "--split", "dev"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "decode", *map(str, words)])
    bench.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["same_as_alone"] is True
    assert said["rtf"] == pytest.approx(said["seconds"] / (0.25 + 0.44 + 0.63))
    assert said["processor"]
    # One that is not the same is seen.
    real, calls = decode.decode_batches, []

    def other_in_batches(*args):
        calls.append(args)
        return {k: f"{text} {len(calls)}" for k, text in real(*args).items()}

    monkeypatch.setattr(decode, "decode_batches", other_in_batches)
    bench.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["same_as_alone"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--steps", "0"], "--steps: 0, expected at least 1"),
        (["step", "--warmup", "-1"], "--warmup: -1, expected at least 0"),
        (["loss", "--batch-size", "0"], "--batch-size: 0, expected at least 1"),
        (["features", "--count", "0"], "--count: 0, expected at least 1"),
        (["step", "--split", "x"], "--data and --split need each other"),
        (["features", "--data", "x"], "--data and --split need each other"),
    ],
)
def test_wrong_flags_are_errors(capsys, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert message in capsys.readouterr().err


def test_inputs_of_the_loss_have_the_lengths_of_train_clean_100():
    (encoded, predicted, weight, bias), (targets, enc_lens, target_lens) = bench.loss_inputs(
        PRESETS["democratized"], 32
    )
    assert encoded.shape == (32, int(enc_lens.max()), 512)
    assert predicted.shape == (32, int(target_lens.max()) + 1, 512)
    assert targets.shape == (32, int(target_lens.max()))
    assert weight.shape == (1024, 512)
    assert bias.shape == (1024,)
    assert 40 < enc_lens.double().mean() < 65  # of 53: 12.7 s in frames of 240 ms
    assert 45 < target_lens.double().mean() < 72  # of 58


def test_features_take_longer_with_augmentation(capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench.py", "features", "--count", "4"])
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < said["decode_ms_per_utt"] < said["plain_ms_per_utt"] < said["ms_per_utt"]
    assert 1 < said["audio_s"] < 17


@pytest.mark.slow
def test_two_ranks_print_one_table_and_the_all_reduce():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "tools.bench", "step", "--warmup", "1", "--steps", "1"]
    done = subprocess.run([*command, *SMALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("{") for line in lines) == 1
    assert any(line.startswith("gradients' all-reduce") for line in lines)
    assert json.loads(lines[-1])["ranks"] == 2
