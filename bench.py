# SPDX-License-Identifier: Apache-2.0
"""Every performance figure of the README, one subcommand each; the last line printed is JSON.

    python bench.py step [--data ROOT --split S] [flags of train.py]   # where a step's time goes
    python bench.py report --data ROOT --split S [flags of train.py]  # what its reports cost
    python bench.py loss                                # joint network and loss, fused and plain
    python bench.py features [--data ROOT --split S]    # processor time of the front end
    python bench.py decode --checkpoint C --data ROOT --split S        # greedy search
    python bench.py curves RUN [RUN ...] --png FILE     # compares runs, from log.jsonl
    python bench.py ladder [--ranks 2] [--runs RUN ...] # what every idea is worth: 50 minutes
    python bench.py scaling [flags of train.py]         # ranks and hosts; as root makes hosts

Without --data, step and features make audio with train-clean-100's distribution of lengths.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import decode
import loss
import report
import train
from model import PRESETS, ModelConfig

# ------------------------------------------------------------------------------- common measures


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, the first two left out: they build kernels for new shapes."""
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def gemm_tflops(dtype: torch.dtype, size: int = 4096) -> float:
    """The machine's matrix rate that `mfu` relates to: size^3 products of this dtype."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, 5) / 1e12


def rss_gb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def peak_rss_gb() -> float:
    """The most that was ever resident. getrusage's is at least what the parent process had."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 2**20


def forward_flops(cfg: ModelConfig, feat_lens: Tensor, target_lens: Tensor) -> float:
    """Floating-point operations of the matrix products of one forward pass.

    Valid frames and lattice nodes only: what is spent on padding does not count.
    """

    def lstm(size: int, hidden: int, layers: int) -> int:
        return 2 * 4 * hidden * (size + hidden + (layers - 1) * 2 * hidden)  # for each frame

    T_in, U1 = feat_lens.double(), target_lens.double() + 1
    T = torch.ceil(T_in / cfg.stack)
    He, Hp, J = cfg.enc_hidden, cfg.pred_hidden, cfg.joint_hidden
    flops = T_in * lstm(cfg.feature_size, He, cfg.pre_layers)
    flops += T * (lstm(cfg.stack * He, He, cfg.post_layers) + 2 * He * J)
    flops += U1 * (lstm(Hp, Hp, cfg.pred_layers) + 2 * Hp * J)
    flops += T * U1 * 2 * J * cfg.vocab_size
    return float(flops.sum())


def origin() -> dict:
    """Whose figures they are."""
    return {"commit": train.git_commit(), "torch": torch.__version__,
            "processor": train.processor_name()}  # fmt: skip


def finish(result: dict) -> None:
    print(json.dumps(result | origin()))


# ---------------------------------------------------------------------------- synthetic recordings

SHAPES = Path(__file__).with_name("docs") / "train-clean-100.json"
SCALING = SHAPES.with_name("scaling.json")
MOST_RECORDINGS = 512


def read_shapes(path: Path = SHAPES) -> tuple[list[list[tuple[float, int]]], int]:
    """Buckets of (seconds, labels) as the sampler makes them, and the utterances of an epoch."""
    shapes = json.loads(path.read_text(encoding="utf-8"))
    return [[tuple(pair) for pair in bucket] for bucket in shapes["buckets"]], shapes["utterances"]


def draw_shapes(count: int) -> list[tuple[float, int]]:
    """(seconds, labels) of `count` random utterances of train-clean-100."""
    pairs = [pair for bucket in read_shapes()[0] for pair in bucket]
    return [pairs[i] for i in np.random.default_rng(1).integers(0, len(pairs), count)]


class LabelCount:
    """Stands for a tokenizer where only the number of labels matters: that of the words."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        count = len(text.split())
        return np.random.default_rng(count).integers(0, self.vocab_size - 1, count).tolist()


def synthesize(root: Path, shapes: Sequence[tuple[float, int]]) -> None:
    """A split `noise` in LibriSpeech's form: FLAC at speech level, texts for LabelCount."""
    rng, folder, lines = np.random.default_rng(1), root / "noise/1/1", []
    folder.mkdir(parents=True)
    for i, (seconds, labels) in enumerate(shapes):
        noise = rng.standard_normal(round(seconds * 16000))
        # An envelope of syllables, so that FLAC has silence to compress as speech has.
        envelope = np.abs(np.sin(np.arange(len(noise)) * math.pi / 4000)) ** 3
        name = f"1-1-{i:04d}"
        soundfile.write(folder / f"{name}.flac", (800 * noise * envelope).astype(np.int16), 16000)
        lines.append(name + " A" * labels + "\n")
    (folder / "1-1.trans.txt").write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def recordings(args: argparse.Namespace, count: int) -> Iterator[list[data.Utterance]]:
    """Utterances of --data and --split without the long ones, or `count` synthetic ones, of which
    no more than MOST_RECORDINGS differ; each is augmented in its own way."""
    if args.data:
        yield data.drop_long(data.read_split(args.data, args.split))[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        synthesize(Path(folder), draw_shapes(min(count, MOST_RECORDINGS)))
        found = data.read_split(folder, "noise")
        yield (found * math.ceil(count / len(found)))[:count]


# ------------------------------------------------------------------------------------ step


# What train.py must be told, of no effect on a step.
NEEDED = ["--data", ".", "--train-splits", "x", "--dev-split", "x", "--out", "."]


class Stopwatch:
    """Adds up the wall time of functions while they stay replaced by timed ones.

    Time inside a nested timed function counts for the inner one alone.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]

    def timed(self, stage: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - started
                self.seconds[stage] += seconds - self.inner.pop()
                self.inner[-1] += seconds

        return call

    @contextlib.contextmanager
    def watch(self, trainer: train.Trainer) -> Iterator[None]:
        """Times the stages of train.train_step."""
        model = trainer.model
        places = [
            (model.encoder, "forward", "encoder"),
            (model.predictor, "forward", "prediction"),
            (train, "joint_transducer_loss", "joint+loss"),
            (loss.JointCosts, "backward", "joint+loss backward"),
            (Tensor, "backward", "other backward"),
            (train, "all_sum", "all-reduce of sums"),
            (train, "clip_gradients", "optimiser"),
            (trainer.optimizer, "step", "optimiser"),
            (train, "update_ema", "EMA"),
        ]
        saved = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
        for owner, name, stage in places:
            timed = self.timed(stage, getattr(owner, name))
            setattr(owner, name, staticmethod(timed) if owner is loss.JointCosts else timed)
        try:
            yield
        finally:
            for owner, name, function in saved:
                if function is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, function)


@contextlib.contextmanager
def open_run(args: argparse.Namespace, words: Sequence[str], steps: int,
             log: report.Log | None = None) -> Iterator[train.Run]:  # fmt: skip
    """A run with train.py's flags in `words` and recordings for so many steps."""
    cfg, model_cfg, features = train.parse_configs([*NEEDED, *words])
    ranks, _ = train.init_ranks(cfg)
    torch.set_flush_denormal(True)
    wanted = steps * cfg.batch_size * cfg.accumulation * ranks.world
    with recordings(args, wanted) as utterances:
        tokenizer = LabelCount(model_cfg.vocab_size)
        if args.data:
            texts = (u.text for u in utterances)
            tokenizer = data.Tokenizer(data.train_tokenizer(texts, model_cfg.vocab_size))
        trainer = train.make_trainer(cfg, model_cfg, ranks)
        yield train.Run(trainer, features, tokenizer, utterances, [], log)


def bench_step(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Trains for --steps after --warmup steps, by train.train_step, and prints the stages."""
    with open_run(args, words, args.warmup + args.steps) as run:
        train.all_sum(torch.zeros(1), run.trainer.ranks)  # all ranks multiply at the same time
        trainer, watch, rows = run.trainer, Stopwatch(), []
        rate = gemm_tflops(trainer.dtype)
        steps = iter_steps(run, args.warmup + args.steps)
        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                watch.seconds.clear()
            started = time.perf_counter()
            batches = next(steps)
            watch.seconds["wait for data"] += time.perf_counter() - started
            with watch.watch(trainer):
                train.train_step(trainer, batches, step + 1, trainer.cfg.lr)
            seconds = time.perf_counter() - started
            flops = sum(
                forward_flops(trainer.model.cfg, b.feat_lens, b.target_lens) for b in batches
            )
            rows.append((seconds, flops))
        apart = front_end_s(run, 32)
        if trainer.ranks.world > 1:
            gradient = torch.zeros(sum(p.numel() for p in trainer.model.parameters()))
            reduce_s = median_seconds(lambda: dist.all_reduce(gradient), 5)
            apart["gradients' all-reduce"] = reduce_s / (
                trainer.cfg.batch_size * trainer.cfg.accumulation * trainer.ranks.world
            )
    if trainer.ranks.rank == 0:
        report_step(args, trainer, rows, watch, apart, rate)


def front_end_s(run: train.Run, count: int) -> dict[str, float]:
    """Processor time of an utterance in a worker: decoding its file, and its features."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data.keep_memory()
    chosen = run.train[:: max(1, len(run.train) // count)][:count]
    times = []
    for i, utterance in enumerate([chosen[0], *chosen]):  # the first makes what all others share
        began = time.process_time()
        samples = data.load_audio(utterance.path, run.features)
        decoded = time.process_time()
        data.features(samples, run.features, np.random.default_rng(i))
        times.append((decoded - began, time.process_time() - decoded))
    torch.set_num_threads(threads)
    return dict(zip(("decode", "features"), np.mean(times[1:], axis=0).tolist(), strict=True))


def iter_steps(run: train.Run, steps: int) -> Iterator[list[data.Batch]]:
    """Micro-batches of as many steps as asked for, over as many epochs as that takes."""

    def endless() -> Iterator[list[data.Batch]]:
        while True:
            yield from train.groups(run.epoch_loader(), run.trainer.cfg.accumulation)
            run.progress.epoch += 1

    return itertools.islice(endless(), steps)


def report_step(args: argparse.Namespace, trainer: train.Trainer,
                rows: list[tuple[float, float]], watch: Stopwatch, apart: dict[str, float],
                rate: float) -> None:  # fmt: skip
    """The table of stages, warm-up apart, and the JSON line.

    Args:
        rows: seconds of each step and the floating-point operations of this rank's forward pass.
        apart: seconds of an utterance of what happens beside the stages or inside of them: workers
            decode files and make features, gradients travel during the backward pass.
        rate: TFLOP/s of matrix products of the trainer's dtype in this rank while all others
            multiply too.
    """
    cfg, world = trainer.cfg, trainer.ranks.world
    measured = rows[args.warmup :]
    seconds = sum(s for s, _ in measured)
    count = len(measured) * cfg.batch_size * cfg.accumulation * world
    median = statistics.median(s for s, _ in measured)
    watch.seconds["rest"] = seconds - sum(watch.seconds.values())
    print(f"first {args.warmup} steps: {sum(s for s, _ in rows[: args.warmup]):.1f} s, left out")
    print(f"{'stage':<22}{'ms/utterance':>14}{'share':>8}")
    for stage, spent in watch.seconds.items():
        print(f"{stage:<22}{1e3 * spent / count:>14.2f}{100 * spent / seconds:>7.1f}%")
    for stage, spent in apart.items():
        print(f"{stage:<22}{1e3 * spent:>14.2f}{'apart':>8}")
    flops = 3 * sum(f for _, f in measured)
    finish({
        "utts_per_s": count / seconds, "mfu": flops / seconds / 1e12 / rate,
        "gemm_tflops": rate, "dtype": str(trainer.dtype).removeprefix("torch."),
        "peak_rss_gb": peak_rss_gb(), "median_step_s": median,
        "batch": cfg.batch_size, "accumulation": cfg.accumulation, "ranks": world,
        "threads": torch.get_num_threads(), "preset": cfg.preset,
    })  # fmt: skip


# ------------------------------------------------------------------------------------ report


def bench_report(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Steps with and without what a run reports of them, A B B A, and drawings of its curves."""
    with tempfile.TemporaryDirectory() as folder:
        log = report.Log(Path(folder), rank=0)
        with open_run(args, words, 1, log) as run:
            (batches,) = iter_steps(run, 1)
            reporting: list[float] = []

            def seconds(is_reported: bool) -> float:
                started = time.perf_counter()
                run.progress.step += 1
                run.progress.batch += 1
                lr = run.trainer.cfg.lr
                loss, norm = train.train_step(run.trainer, batches, run.progress.step, lr)
                done = time.perf_counter()
                if is_reported:
                    run.report_step(loss, lr, norm, 1.0, 0.0)
                    reporting.append(time.perf_counter() - done)
                return time.perf_counter() - started

            for _ in range(3):  # oneDNN builds its kernels
                seconds(False)
            pairs = []
            for i in range(args.turns):
                pair = {is_reported: seconds(is_reported) for is_reported in (i % 2 > 0, i % 2 < 1)}
                pairs.append((pair[True], pair[False]))
            draw_s, epoch_steps = median_seconds(log.draw, 5), run.steps_per_epoch
    share = statistics.median(a / b - 1 for a, b in pairs)
    step_s, own_s = statistics.median(b for _, b in pairs), statistics.median(reporting)
    draw_share = draw_s / (epoch_steps * step_s)
    print(f"a step takes {1e3 * step_s:.1f} ms, its report {1e3 * own_s:.2f} ms, "
          f"{100 * own_s / step_s:.2f} %; {args.turns} steps with against as many without, in "
          f"turns: {100 * share:+.2f} %; drawing the curves after every epoch takes "
          f"{draw_s:.2f} s, {100 * draw_share:.2f} % of its {epoch_steps} steps")  # fmt: skip
    finish({"report_s": own_s, "report_share": share, "draw_s": draw_s, "draw_share": draw_share,
            "step_s": step_s, "turns": pairs})  # fmt: skip


# ------------------------------------------------------------------------------------ loss


def loss_inputs(cfg: ModelConfig, batch: int) -> tuple:
    """Random arguments of joint_transducer_loss, with train-clean-100's lengths."""
    seconds, labels = torch.tensor(draw_shapes(batch), dtype=torch.float64).T
    enc_lens, target_lens = torch.ceil(seconds / 0.03 / cfg.stack).long(), labels.long()
    T, U, J, V = int(enc_lens.max()), int(target_lens.max()), cfg.joint_hidden, cfg.vocab_size
    torch.manual_seed(1)
    inputs = (torch.randn(batch, T, J), torch.randn(batch, U + 1, J),
              torch.randn(V, J) / math.sqrt(J), torch.zeros(V))  # fmt: skip
    targets = torch.randint(0, V - 1, (batch, U))
    return tuple(x.requires_grad_() for x in inputs), (targets, enc_lens, target_lens)


def plain_loss(inputs: tuple, lattice: tuple, blank: int, dropout: float,
               reduction: str = "mean") -> Tensor:  # fmt: skip
    """Linear layer and transducer_loss on (B, T, U+1, V) logits that exist all at once."""
    encoded, predicted, weight, bias = inputs
    hidden = F.dropout(F.relu(encoded[:, :, None] + predicted[:, None]), dropout)
    return loss.transducer_loss(F.linear(hidden, weight, bias), *lattice, blank, reduction)


def bench_loss(args: argparse.Namespace) -> None:
    """Forward and backward of the fused loss and of the plain one on the same batch."""
    cfg = PRESETS[args.preset]
    torch.set_flush_denormal(True)
    dtype = train.matrix_dtype(args.precision)
    inputs, lattice = loss_inputs(cfg, args.batch_size)
    nodes = float((lattice[1] * (lattice[2] + 1)).sum())
    padded = args.batch_size * int(lattice[1].max()) * int(lattice[2].max() + 1)
    flops = 6 * nodes * cfg.joint_hidden * cfg.vocab_size
    visited, joint_backward = [0], loss.joint_backward

    def count_rows(hidden: Tensor, rows: Tensor, *rest: object) -> Tensor:
        visited[0] = len(rows)
        return joint_backward(hidden, rows, *rest)

    def seconds(function: Callable, repeats: int) -> float:
        def call() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                cost = function(inputs, lattice, cfg.blank, cfg.joint_dropout)
            cost.backward()

        return median_seconds(call, repeats)

    before, loss.joint_backward = rss_gb(), count_rows
    fused_s = seconds(lambda i, x, blank, p: loss.joint_transducer_loss(*i, *x, blank, p), 7)
    grown, loss.joint_backward = peak_rss_gb() - before, joint_backward
    rate = gemm_tflops(dtype)  # after it: the peak is that of the whole process
    plain_s = seconds(plain_loss, 3)
    fused, plain = args.batch_size / fused_s, args.batch_size / plain_s
    print(f"batch {args.batch_size}: fused {fused:.1f} utterances/s, plain {plain:.1f}: "
          f"{fused / plain:.1f} times faster. Of the plain one's nodes {nodes / padded:.2f} are "
          f"valid, of those {visited[0] / nodes:.2f} are visited by paths of an untrained model "
          "and have a gradient to compute")  # fmt: skip
    finish({
        "visited_share": visited[0] / nodes, "valid_share": nodes / padded,
        "utts_per_s": fused, "share_of_gemm": flops / fused_s / 1e12 / rate, "gemm_tflops": rate,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_growth_gb": grown, "plain_utts_per_s": plain, "speedup": fused / plain,
    })  # fmt: skip


# ------------------------------------------------------------------------------------ features


def bench_features(args: argparse.Namespace) -> None:
    """Processor time of one thread from file to input frames, with and without augmentation."""
    torch.set_num_threads(1)
    data.keep_memory()  # as in a worker
    with recordings(args, args.count) as utterances:
        chosen = utterances[:: max(1, len(utterances) // args.count)][: args.count]
        seconds = statistics.mean(u.duration_s for u in chosen)

        def cpu_ms(make: Callable[[np.ndarray], object]) -> float:
            make(data.load_audio(chosen[0].path))
            started = time.process_time()
            for utterance in chosen:
                make(data.load_audio(utterance.path))
            return 1e3 * (time.process_time() - started) / len(chosen)

        # Other speeds and masks every time, as in training, where nothing comes twice.
        seeds = itertools.count()

        def augmented(samples: np.ndarray) -> Tensor:
            return data.features(samples, rng=np.random.default_rng(next(seeds)))

        training = statistics.median(cpu_ms(augmented) for _ in range(3))
        plain = statistics.median(cpu_ms(data.features) for _ in range(3))
        decoding = statistics.median(cpu_ms(lambda samples: samples) for _ in range(3))
    print(f"{len(chosen)} recordings of {seconds:.1f} s: decoding {decoding:.1f} ms, with features "
          f"{plain:.1f} ms, augmented {training:.1f} ms of one core")  # fmt: skip
    finish({"ms_per_utt": training, "plain_ms_per_utt": plain, "decode_ms_per_utt": decoding,
            "audio_s": seconds})  # fmt: skip


# ------------------------------------------------------------------------------------ decode


def bench_decode(args: argparse.Namespace) -> None:
    """A whole split in batches, features included; before it, some of it one by one, to compare."""
    torch.set_flush_denormal(True)
    model, tokenizer, features = decode.restore(decode.load_checkpoint(args.checkpoint))
    utterances = data.read_split(args.data, args.split, features)
    dataset = data.SpeechDataset(utterances, None, features)

    def run(batches: list[list[int]]) -> tuple[dict[str, str], float]:
        started = time.perf_counter()
        loader = data.batch_loader(dataset, batches, num_workers=1)
        return decode.decode_batches(model, tokenizer, loader), time.perf_counter() - started

    alone, _ = run([[i] for i in range(0, len(utterances), max(1, len(utterances) // 50))])
    texts, seconds = run(decode.evaluation_batches(utterances, args.batch_size))
    same = all(texts[k] == text for k, text in alone.items())
    errors, words = decode.word_errors(
        [texts[u.id] for u in utterances], [u.text for u in utterances]
    )
    rtf = seconds / sum(u.duration_s for u in utterances)
    print(f"{len(utterances)} utterances in {seconds:.1f} s, "
          f"{len(utterances) / seconds:.0f} a second, real-time factor {rtf:.4f}; "
          f"{len(alone)} of them alone: {'the same' if same else 'OTHER'} hypotheses")  # fmt: skip
    finish({"seconds": seconds, "rtf": rtf, "wer": decode.word_error_rate(errors, words),
            "same_as_alone": same, "peak_rss_gb": peak_rss_gb()})  # fmt: skip


# ------------------------------------------------------------------------------------ curves


def bench_curves(args: argparse.Namespace) -> None:
    """Table of every run and one picture of all, as train.py draws it."""
    runs = {str(folder): report.read_run(folder) for folder in args.runs}
    for name, (_, evals) in runs.items():
        if not evals:
            raise ValueError(f"{name}/log.jsonl: no evaluation yet")
        print(f"{name}\n{'epoch':>6}{'hours':>8}{'WER %':>9}{'loss':>9}{'utts/s':>8}")
        for r in evals:
            nats, rate = r.get("loss", math.nan), r.get("utts_per_s", math.nan)
            print(
                f"{r['epoch']:>6}{r['hours']:>8.2f}{100 * r['wer']:>9.2f}{nats:>9.1f}{rate:>8.1f}"
            )
    report.draw_curves(runs, args.png)
    finish({name: {"best_wer": min(r["wer"] for r in evals), "hours": evals[-1]["hours"],
                   "epochs": evals[-1]["epoch"]} for name, (_, evals) in runs.items()})  # fmt: skip


# ------------------------------------------------------------------------------------ ladder

# Seconds to WER 0.25 in intel/e2eAIOK's overview of its RNN-T; what two of its ideas gave.
ORIGINAL_S = {"one node": 175_275, "four nodes": 33_965, "stack 8, LSTM 512 x 4": 18_200,
              "normalisation": 17_005, "fewer oneCCL workers": 15_849}  # fmt: skip
ORIGINAL = {"LSTM 512 x 4": 33_965 / 18_200, "normalisation": 18_200 / 17_005}
THEIRS = 4  # rungs of the original; the others are ours
PLAIN_ROWS = 4  # utterances whose logits the plain loss holds at once


class Rung(NamedTuple):
    """How to train: a preset and the ideas that are switched on."""

    words: tuple[str, ...] = ("--preset", "baseline")
    ranks: int = 1
    fused: bool = False  # joint network and loss
    precision: str = "fp32"
    workers: int = 0  # processes that prepare features; 0: the training process does, between steps


def add_ladder_flags(rung: argparse.ArgumentParser, ladder: argparse.ArgumentParser) -> None:
    rung.add_argument("--batch", type=int, required=True, help="utterances of a bucket, all ranks")
    rung.add_argument("--plain-loss", action="store_true",
                      help=f"the logits of {PLAIN_ROWS} utterances exist at once")  # fmt: skip
    ladder.add_argument("--ranks", type=int, default=2, help="of the rung that has several")
    ladder.add_argument("--shapes", type=Path, default=SHAPES, help="buckets of (seconds, labels)")
    ladder.add_argument("--png", type=Path, default=SHAPES.with_name("ladder.png"))
    ladder.add_argument("--runs", type=Path, nargs="+", default=[], help="run directories")
    ladder.add_argument("--target-wer", type=float, default=0.1, help="epochs that --runs took")
    ladder.add_argument("--scaling", type=Path, default=SCALING, help="from bench.py scaling")
    ladder.add_argument("--server-cores", type=int, default=64, help="projection: of a server")
    ladder.add_argument("--server-ranks", type=int, default=2, help="projection: of a server")
    ladder.add_argument("--network-gbit", type=float, default=10, help="projection: per second")
    ladder.add_argument("--global-batch", type=int, default=1024, help="projection")
    for command in (rung, ladder):
        command.add_argument("--seconds", type=float, default=60, help="a rung, two passes or more")


def make_rungs(ranks: int) -> tuple[dict[str, Rung], dict[str, Rung]]:
    """Name -> rung: those that add up, and our own ideas alone on top of the original's."""
    democratized = ("--preset", "democratized")
    ladder = {"baseline, fp32": Rung()}
    ladder["stack 8"] = Rung((*Rung().words, "--stack", "8"))
    ladder["LSTM 512 x 4"] = Rung((*democratized, "--no-normalization"))
    ladder["normalisation"] = base = Rung(democratized)
    ideas = {
        "fused joint and loss": {"fused": True}, "bf16": {"precision": "bf16"},
        "features in workers": {"workers": 1}, f"{ranks} ranks": {"ranks": ranks},
    }  # fmt: skip
    alone = {name: base._replace(**idea) for name, idea in ideas.items()}
    for name, idea in ideas.items():
        base = ladder[name] = base._replace(**idea)
    return ladder, alone


def plain_joint_loss(encoded: Tensor, predicted: Tensor,  # noqa: PLR0913 - stands for the fused one
                     weight: Tensor, bias: Tensor, targets: Tensor, enc_lens: Tensor,
                     target_lens: Tensor, blank: int, dropout: float,
                     reduction: str) -> Tensor:  # fmt: skip
    """Costs (B,) like loss.joint_transducer_loss, by plain_loss on PLAIN_ROWS utterances a time.

    Only right where all costs weigh the same, as in train_step: the gradient of some rows is taken
    at once, so that their graph can go, and carried on by a term that is 0.
    """
    assert reduction == "none", reduction
    costs = []
    for rows in torch.arange(len(targets)).split(PLAIN_ROWS):
        inputs = (encoded[rows], predicted[rows], weight, bias)
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        lattice = (targets[rows], enc_lens[rows], target_lens[rows])
        cost = plain_loss(leaves, lattice, blank, dropout, "none")  # (rows,)
        grads = torch.autograd.grad(cost.sum(), leaves)
        carrier = sum((x * g).sum() for x, g in zip(inputs, grads, strict=True))
        costs.append(cost.detach() + (carrier - carrier.detach()) / len(rows))
    return torch.cat(costs)


def steady(times: Sequence[Sequence[float]]) -> dict:
    """Of each bucket's steps without the first, which builds kernels: median, least and most."""
    warm = [bucket[1:] for bucket in times]
    return {"step_s": [statistics.median(t) for t in warm], "least_s": [min(t) for t in warm],
            "most_s": [max(t) for t in warm]}  # fmt: skip


def bench_rung(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Seconds of a step of --batch utterances in each bucket of a corpus sorted by bucket."""
    cfg, model_cfg, features = train.parse_configs([*NEEDED, *words])
    ranks, _ = train.init_ranks(cfg)
    torch.set_flush_denormal(True)
    if args.plain_loss:
        train.joint_transducer_loss = plain_joint_loss
    trainer = train.make_trainer(cfg, model_cfg, ranks)
    utterances = data.read_split(args.data, args.split, features)
    tokenizer = LabelCount(model_cfg.vocab_size)
    dataset = data.SpeechDataset(utterances, tokenizer, features, cfg.seed, epoch=1)
    mine = [bucket[ranks.rank :: ranks.world].tolist()
            for bucket in torch.arange(len(utterances)).split(args.batch)]  # fmt: skip
    times: list[list[float]] = [[] for _ in mine]
    began = started = time.perf_counter()
    for i, batch in enumerate(data.batch_loader(dataset, mine * 1000, cfg.loader_workers)):
        train.train_step(trainer, [batch], i + 1, cfg.lr)
        times[i % len(mine)].append(time.perf_counter() - started)
        late = time.perf_counter() - began > args.seconds
        # Rank 0 decides for all.
        late = train.all_sum(torch.tensor(int(late and ranks.rank == 0)), ranks) > 0
        if late and i + 1 >= 2 * len(mine):
            break
        started = time.perf_counter()
    if ranks.rank == 0:
        finish(steady(times) | {
            "steps": sum(map(len, times)),
            "peak_rss_gb": peak_rss_gb(), "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        })  # fmt: skip


def measure_rung(rung: Rung, batch: int, threads: int, words: Sequence[str]) -> dict:
    """bench_rung in processes of its own. Raises ValueError with its last line if it fails."""
    launcher = [sys.executable]
    if rung.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone",
                     "--nproc-per-node", str(rung.ranks)]  # fmt: skip
    command = [*launcher, __file__, "rung", "--batch", str(batch), *words, *rung.words,
               "--batch-size", str(batch // rung.ranks), "--precision", rung.precision,
               "--loader-workers", str(rung.workers),
               *([] if rung.fused else ["--plain-loss"])]  # fmt: skip
    own = max(1, threads // rung.ranks)
    env = {**os.environ, "OMP_NUM_THREADS": str(own)}
    cpus = sorted(os.sched_getaffinity(0))
    if 1 < rung.ranks <= len(cpus) // own:  # each on CPUs of its own
        masks = (sum(1 << cpu for cpu in cpus[i * own : (i + 1) * own]) for i in range(rung.ranks))
        env["I_MPI_PIN_DOMAIN"] = f"[{','.join(map(hex, masks))}]"
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = (result.stderr.strip() or "nothing said").splitlines()[-1]
        raise ValueError(f"{' '.join(command)}: status {result.returncode}: {said}")
    return json.loads(result.stdout.splitlines()[-1])


def project_hours(row: dict, servers: int, scaling: dict, args: argparse.Namespace) -> float:
    """Hours of 49 epochs on `servers` servers, from a rung of the ladder.

    All cores share the work, each as fast as one is here. After it, once in --global-batch
    utterances, the float32 gradient goes round all ranks, as slowly as `scaling` found: within a
    server as between two ranks here, else by the fit to its networks.
    """
    pair, num_bytes = scaling["cases"][str(Case(2))], 4 * row["parameters"]
    cores_here = row["ranks"] * row["threads"]
    work_s = row["epoch_s"] * cores_here / (servers * args.server_cores)
    ranks = servers * args.server_ranks
    if servers > 1:
        reduce_s = fitted_s(scaling, ranks, num_bytes, args.network_gbit)
    else:
        factor = ring_s(ranks, num_bytes, 1) / ring_s(2, pair["gradient_bytes"], 1)
        reduce_s = factor * pair["all_reduce"]
    return 49 * (work_s + args.utterances / args.global_batch * reduce_s) / 3600


def read_scaling(path: Path) -> dict:
    scaling = json.loads(path.read_text())
    if "slope" not in scaling:
        raise ValueError(f"--scaling {path}: without hosts, see what bench.py scaling printed")
    return scaling


def epochs_to(folder: Path, target_wer: float) -> dict:
    """When a run reached a WER, or how far it came, and what else it takes to compare runs."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    start = next(e for e in map(json.loads, lines) if e["event"] == "start")
    rows = report.read_run(folder)[1]
    reached = next((row["epoch"] for row in rows if row["wer"] <= target_wer), None)
    return {
        "epochs": reached, "ran": rows[-1]["epoch"], "best_wer": min(r["wer"] for r in rows),
        "normalization": start["model_config"]["normalization"],
        "preset": start["train_config"]["preset"], "seed": start["train_config"]["seed"],
    }  # fmt: skip


def bench_ladder(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Seconds of an epoch of train-clean-100 on every rung: table, picture, JSON, projection."""
    # What could fail after the measuring fails before it.
    epochs = {folder.name: epochs_to(folder, args.target_wer) for folder in args.runs}
    if not os.access(args.png.parent, os.W_OK):
        raise ValueError(f"--png: {args.png.parent} cannot be written")
    buckets, args.utterances = read_shapes(args.shapes)
    batch, threads = len(buckets[0]), torch.get_num_threads()
    if batch % args.ranks:
        raise ValueError(f"--ranks {args.ranks} does not divide the batch of {batch}")
    scaling = read_scaling(args.scaling)
    ladder, alone = make_rungs(args.ranks)
    # The first of our ideas is on the ladder and alone.
    rungs = {rung: name for name, rung in (*alone.items(), *ladder.items())}
    measured: dict[Rung, list[dict]] = {rung: [] for rung in (*ladder.values(), *alone.values())}
    with tempfile.TemporaryDirectory() as folder:
        synthesize(Path(folder), [pair for bucket in buckets for pair in bucket])
        words = ["--data", folder, "--split", "noise", "--seconds", str(args.seconds), *words]
        # Two rounds, in turns: the gains of the first two rungs are above any noise.
        for rung in (*measured, *list(measured)[2:]):
            row = measure_rung(rung, batch, threads, words)
            # Buckets hold equally many utterances, so their steps weigh the same.
            row["epoch_s"] = statistics.mean(row["step_s"]) * args.utterances / batch
            measured[rung].append(row)
            print(f"{rungs[rung]}: {row['epoch_s']:.0f} s an epoch", flush=True)
    results: dict[str, list[dict] | dict] = {
        kind: [name_rung(name, rung, measured[rung]) for name, rung in some.items()]
        for kind, some in (("ladder", ladder), ("alone", alone))
    }
    for name, run in epochs.items():
        after = f"after {run['epochs']}" if run["epochs"] else f"not in {run['ran']}"
        print(f"{name}: WER {100 * args.target_wer:g} % {after} epochs, best "
              f"{100 * run['best_wer']:.1f} %")  # fmt: skip
    results["epochs_to_target"] = epochs
    report_ladder(args, results, scaling)


def name_rung(name: str, rung: Rung, measured: Sequence[dict]) -> dict:
    """A row of the table: mean of an epoch's seconds, how far apart they were if measured twice,
    and the steps and memory of the first time."""
    seconds = [row["epoch_s"] for row in measured]
    mean_s = statistics.mean(seconds)
    return {
        "name": name, **rung._asdict(), **measured[0], "epoch_s": mean_s, "epochs_s": seconds,
        "apart": (max(seconds) - min(seconds)) / mean_s if len(seconds) > 1 else None,
    }  # fmt: skip


def add_speedups(ladder: list[dict], alone: list[dict]) -> None:
    """Of every rung over the one before, over the first, and of each idea of ours over theirs."""
    for before, row in zip(ladder[:1] + ladder, ladder, strict=False):
        row["speedup"] = before["epoch_s"] / row["epoch_s"]
        row["cumulative"] = ladder[0]["epoch_s"] / row["epoch_s"]
        row["original"] = ORIGINAL.get(row["name"])
        row["alone"] = None
    for row, single in zip(ladder[THEIRS:], alone, strict=True):
        row["alone"] = ladder[THEIRS - 1]["epoch_s"] / single["epoch_s"]


def report_ladder(args: argparse.Namespace, results: dict, scaling: dict) -> None:
    add_speedups(results["ladder"], results["alone"])
    columns = ("speedup", "cumulative", "alone", "original")
    print(f"{'':<24}{'s an epoch':>12}" + "".join(f"{name:>12}" for name in columns))
    for row in results["ladder"]:
        gains = ("-" if row[name] is None else f"{row[name]:.2f}x" for name in columns)
        print(f"{row['name']:<24}{row['epoch_s']:>12.0f}" + "".join(f"{x:>12}" for x in gains))
    twice = [row for row in results["ladder"] + results["alone"] if row["apart"] is not None]
    apart = {str(row["epochs_s"]): row["apart"] for row in twice}.values()  # each rung once
    print(f"two measurements of a rung were apart by {100 * statistics.median(apart):.1f} % "
          f"(median), {100 * max(apart):.1f} % at most: gains of less are none")  # fmt: skip
    results["original_s"] = ORIGINAL_S
    story = ", ".join(f"{name} {seconds:,} s ({ORIGINAL_S['one node'] / seconds:.2f}x)"
                      for name, seconds in ORIGINAL_S.items())  # fmt: skip
    print(f"the original, time to WER 0.25: {story}; stack 8 and its LSTM are one; oneCCL's "
          "workers are cases of bench.py scaling where its bindings are installed")  # fmt: skip
    best = min(results["ladder"], key=lambda row: row["epoch_s"])
    results["hours_of_49_epochs"] = {"here": 49 * best["epoch_s"] / 3600} | {
        name: project_hours(best, servers, scaling, args)
        for name, servers in (("one server", 1), ("four servers", 4))
    }
    hours = ", ".join(f"{k} {v:.1f}" for k, v in results["hours_of_49_epochs"].items())
    print(f"hours of 49 epochs of train-clean-100: {hours}")
    print(f"from {best['name']!r}; assumed of a server: {args.server_ranks} ranks, one a socket, "
          f"{args.server_cores} cores, each as fast as here with all at work; the threads of a "
          f"rank share its work without loss, of which {best['threads']} was the most here; a "
          f"network of {args.network_gbit:g} Gbit/s; all-reduce not overlapped; global batch "
          f"{args.global_batch}, with which 49 epochs must still be enough; evaluation and "
          "checkpoints left out; lattices as of an untrained model, of whose nodes paths visit "
          "some 0.7 in float32 and 0.6 in bfloat16")  # fmt: skip
    args.png.with_suffix(".json").write_text(json.dumps(origin() | results, indent=1) + "\n")
    draw_ladder(args.png, results)
    finish({"epoch_s": {row["name"]: row["epoch_s"] for row in results["ladder"]},
            "hours_of_49_epochs": results["hours_of_49_epochs"]})  # fmt: skip


def draw_ladder(png: Path, results: dict) -> None:
    """Bars: seconds of an epoch; line: cumulative speed-up. Right: what our ideas give alone."""
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(3, 2))
    names, seconds, total = ([row[key] for row in results["ladder"]]
                             for key in ("name", "epoch_s", "cumulative"))  # fmt: skip
    axes[0].bar_label(axes[0].bar(names, seconds), fmt="%.0f")
    axes[0].set(ylabel="s an epoch of train-clean-100", title="each idea on top of the last")
    line = axes[0].twinx()
    line.plot(names, total, color="black", marker="o")
    line.set(ylabel="cumulative speed-up", ylim=(0, 1.15 * max(total)))
    ours = {row["name"]: row["alone"] for row in results["ladder"][THEIRS:]}
    axes[1].bar_label(axes[1].bar(*zip(*ours.items(), strict=True), color="C1"), fmt="%.2f")
    axes[1].set(
        ylabel="speed-up", title=f"alone, on top of {results['ladder'][THEIRS - 1]['name']}"
    )
    for ax in axes:
        ax.margins(y=0.1)  # for the figures on the bars
        for label in ax.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    figure.savefig(png)


# ------------------------------------------------------------------------------------ scaling

SUBNET = "10.213.78."  # of the hosts that `made_hosts` makes, from 1


class Case(NamedTuple):
    """Ranks of one thread each, and how their gradients travel."""

    ranks: int
    gbit: float = 0  # per second, each rank on a host of its own; 0: all on this one
    words: tuple[str, ...] = ()  # for bench_member
    ccl_workers: int = 0  # threads of oneCCL in each rank; 0: gloo

    def __str__(self) -> str:
        where = f"{self.ranks} hosts, {self.gbit:g} Gbit/s" if self.gbit else f"{self.ranks} ranks"
        ccl = [f"oneCCL with {self.ccl_workers}"] if self.ccl_workers else []
        return " ".join([where, *self.words, *ccl])

    def environment(self, rank: int, port: str) -> dict[str, str]:
        env = {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(self.ranks),
               "LOCAL_RANK": "0", "MASTER_PORT": port,
               "MASTER_ADDR": f"{SUBNET}1" if self.gbit else "127.0.0.1"}  # fmt: skip
        if self.ccl_workers:  # there is no mpirun to tell oneCCL who is who
            env |= {"CCL_WORKER_COUNT": str(self.ccl_workers), "CCL_PROCESS_LAUNCHER": "none",
                    "CCL_LOCAL_RANK": str(rank), "CCL_LOCAL_SIZE": str(self.ranks)}  # fmt: skip
        return env


def exchange(state: dict, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """For DistributedDataParallel: the mean over all ranks, which travels as state["dtype"].

    Notes in state["began"] when the last bucket was ready, with which the backward pass ends.
    """
    state["began"] = time.perf_counter()
    sent = bucket.buffer().to(state["dtype"]).div_(dist.get_world_size())
    done = dist.all_reduce(sent, async_op=True).get_future()
    return done.then(lambda future: bucket.buffer().copy_(future.value()[0]))


def exchanging(trainer: train.Trainer, state: dict, bucket_mb: int) -> train.Trainer:
    """Exchanges gradients by `exchange`, in buckets of this size if it is not 0."""
    parallel = trainer.parallel
    if bucket_mb:
        parallel = DistributedDataParallel(
            trainer.model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb
        )
    parallel.register_comm_hook(state, exchange)
    return trainer._replace(parallel=parallel)


def bench_member(args: argparse.Namespace, words: Sequence[str]) -> None:
    """One rank of a case: a step, what it waits for all-reduces, one alone; medians over --turns.

    It waits from the end of its own backward pass on, hence for slower ranks, too.

    Every rank of every case computes the same batch, so that cases differ by ranks alone.
    """
    with open_run(args, words, 1) as run:
        trainer = run.trainer
        dataset = data.SpeechDataset(run.train, run.tokenizer, run.features, seed=1)
        batch = data.collate([dataset[i] for i in range(trainer.cfg.batch_size)], run.features)
        batches = [batch] * args.micro_batches * trainer.cfg.accumulation
        dtype = torch.bfloat16 if args.compress else torch.float32
        gradient = torch.zeros(sum(p.numel() for p in trainer.model.parameters()), dtype=dtype)
        state, seconds = {"dtype": dtype}, defaultdict(list)
        if trainer.ranks.world > 1:
            trainer = exchanging(trainer, state, args.bucket_mb)

        def clip_gradients(*args: object) -> float:  # comes after the backward pass
            if "began" in state:
                seconds["waits"].append(time.perf_counter() - state["began"])
            return clip(*args)

        def step() -> None:
            train.train_step(trainer, batches, 1, trainer.cfg.lr)

        clip, train.clip_gradients = train.clip_gradients, clip_gradients
        what = {} if args.exchange_only else {"step": step}
        if trainer.ranks.world > 1:
            what["all_reduce"] = lambda: dist.all_reduce(gradient)
        for _ in range(args.turns + 1):
            for name, function in what.items():
                train.all_sum(torch.zeros(1), trainer.ranks)  # all begin together
                started = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - started)
        if trainer.ranks.rank == 0:
            finish(summarize(seconds) | {"gradient_bytes": gradient.nbytes})
        if trainer.ranks.world > 1:
            dist.barrier()  # the store is rank 0's


def summarize(seconds: dict[str, list[float]]) -> dict:
    """Median and sorted "turns" of every measure, the first turn left out."""
    turns = {name: sorted(s[1:]) for name, s in seconds.items()}
    return {name: statistics.median(s) for name, s in turns.items()} | {"turns": turns}


def ip(*words: str) -> None:
    ended = subprocess.run(["ip", *words], capture_output=True, text=True)
    if ended.returncode:
        raise OSError(f"ip {' '.join(words)}: {ended.stderr.strip()}")


@contextlib.contextmanager
def made_hosts(count: int, gbit: float) -> Iterator[list[list[str]]]:
    """Network namespaces on a bridge; for each what a command begins with to run in it.

    Raises:
        OSError: without iproute2 or the rights to use it.
    """
    # Another process may make hosts at the same time: names of our own, within Linux' 15 letters.
    bridge = f"rnnt{secrets.token_hex(3)}"
    names = [f"{bridge}-{i}" for i in range(1, count + 1)]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for i, name in enumerate(names, 1):
            ip("netns", "add", name)
            ip("link", "add", f"{name}-p", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}-p", "master", bridge, "up")
            ip("-n", name, "addr", "add", f"{SUBNET}{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate",
               f"{gbit}gbit", "burst", "1mb", "latency", "50ms")  # fmt: skip
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        # A namespace goes with its last process, which may take a while to end; its link now.
        gone = [words for name in names
                for words in (("link", "del", f"{name}-p"), ("netns", "del", name))]  # fmt: skip
        for words in (*gone, ("link", "del", bridge)):
            with contextlib.suppress(OSError):
                ip(*words)


def measure_case(case: Case, words: Sequence[str]) -> dict:
    """bench_member in a process for each rank. Raises ValueError with its words if one fails."""
    hosts = made_hosts(case.ranks, case.gbit) if case.gbit else contextlib.nullcontext()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with hosts as prefixes, tempfile.TemporaryFile("w+") as said:
        members = []
        try:
            for rank in range(case.ranks):
                prefix = prefixes[rank] if prefixes else []  # without hosts of their own: this one
                backend = "ccl" if case.ccl_workers else "gloo"
                members.append(subprocess.Popen(
                    [*prefix, sys.executable, __file__, "member", "--backend", backend,
                     *case.words, *words],
                    env=os.environ | case.environment(rank, port), stderr=said, text=True,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                ))  # fmt: skip
            out = members[0].communicate()[0]
            failed = any([member.wait() for member in members])
        finally:  # nothing stays behind, if this is interrupted
            for member in members:
                member.kill()
        if failed:
            said.seek(0)
            raise ValueError(f"{case}: {(said.read().strip() or 'nothing said').splitlines()[-1]}")
    return json.loads(out.splitlines()[-1])


def can_make_hosts() -> bool:
    """Whether this user may make a network namespace. What fails after that is an error."""
    name = f"rnnt{secrets.token_hex(3)}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except OSError as error:
        print(f"no hosts made, needs root and iproute2: {error}")
        return False
    return True


def ring_s(ranks: int, num_bytes: int, gbit: float) -> float:
    """Of a ring all-reduce: each rank sends and receives 2 (n-1)/n of the gradient."""
    return 2 * (ranks - 1) / ranks * num_bytes * 8 / (gbit * 1e9)


def fitted_s(fit: dict, ranks: int, num_bytes: int, gbit: float) -> float:
    """Of a ring all-reduce: a latency for each of its 2 (n-1) turns, and the bytes."""
    return 2 * (ranks - 1) * fit["latency_s"] + fit["slope"] * ring_s(ranks, num_bytes, gbit)


def bench_scaling(args: argparse.Namespace, words: Sequence[str]) -> None:
    """What more ranks cost: table, remedies on a slow network, and a projection to four hosts."""
    words = ["--preset", "democratized", "--batch-size", "8", *words]
    cases = [Case(1), Case(2)]
    if importlib.util.find_spec("oneccl_bindings_for_pytorch"):
        cases += [Case(2, ccl_workers=n) for n in (1, 2, 4)]
    slow = Case(2, gbit=1)
    if can_make_hosts():
        cases += [Case(2, gbit=10), slow, Case(4, 10, ("--exchange-only",)),
                  Case(4, 1, ("--exchange-only",)), slow._replace(words=("--bucket-mb", "5")),
                  slow._replace(words=("--bucket-mb", "100")), slow._replace(words=("--compress",)),
                  slow._replace(words=("--micro-batches", "4"))]  # fmt: skip
    results = {}
    print(f"{'':<34}{'step s':>8}{'all-reduce':>12}{'waits, least to most':>24}"
          f"{'efficiency':>12}")  # fmt: skip
    for case in cases:
        row = results[case] = measure_case(case, ["--turns", str(args.turns), *words])
        single = results[cases[0]]["step"] * (4 if "--micro-batches" in case.words else 1)
        cells = f"{case!s:<34}"
        if "step" in row:
            row["efficiency"] = single / row["step"]
            cells += f"{row['step']:>8.2f}"
        if "waits" in row:
            least, most = row["turns"]["waits"][0], row["turns"]["waits"][-1]
            waits = f"{row['waits']:.2f} ({least:.2f} to {most:.2f})"
            cells += f"{row['all_reduce']:>12.3f}{waits:>24}{100 * row['efficiency']:>11.0f}%"
        elif "all_reduce" in row:
            cells = f"{cells:<42}{row['all_reduce']:>12.3f}"
        print(cells, flush=True)
    result = {"cases": {str(case): row for case, row in results.items()}}
    if slow in results:
        result |= project_hosts(results)
    args.json.write_text(json.dumps(origin() | result, indent=1) + "\n")
    finish(result)


def project_hosts(results: dict[Case, dict]) -> dict:
    """Speed-up from one host to four, of two ranks each, on the networks that were measured."""
    plain = {c: r for c, r in results.items() if c.gbit and c.words in ((), ("--exchange-only",))}
    terms = [(2 * (c.ranks - 1), ring_s(c.ranks, r["gradient_bytes"], c.gbit))
             for c, r in plain.items()]  # fmt: skip
    (latency, slope), *_ = np.linalg.lstsq(terms, [r["all_reduce"] for r in plain.values()])
    fit = {"latency_s": latency, "slope": slope}
    print(f"all-reduce between n hosts = 2 (n-1) x {latency:.4f} s + {slope:.2f} x 2 (n-1)/n x "
          "bytes over the network's rate")  # fmt: skip
    slow, here, speedups = results[Case(2, gbit=1)], results[Case(2)], {}
    # The rest hides behind the backward pass.
    exposed = min(1.0, slow["waits"] / slow["all_reduce"])
    compute_s = here["step"] - here["waits"]
    for gbit in (10, 1):
        reduce_s = fitted_s(fit, 8, here["gradient_bytes"], gbit)
        one, four = (compute_s + exposed * s for s in (here["all_reduce"], reduce_s))
        speedups[f"{gbit} Gbit/s"] = 4 * one / four
    said = ", ".join(f"{speedup:.2f} at {name}" for name, speedup in speedups.items())
    print(f"projected from 1 to 4 hosts of 2 ranks each, every rank with the batch it has here: "
          f"{said}; the original says 5.16. Assumed: hosts as fast as this one, ranks that share "
          "nothing but the network, one ring")  # fmt: skip
    return {"projected_speedup": speedups} | fit


# ------------------------------------------------------------------------------------ command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", allow_abbrev=False)
    step.add_argument("--warmup", type=int, default=10, help="steps left out")
    step.add_argument("--steps", type=int, default=30, help="steps measured")
    reports = commands.add_parser("report", allow_abbrev=False)
    reports.add_argument("--turns", type=int, default=40, help="with reports, and as many without")
    lossy = commands.add_parser("loss", allow_abbrev=False)
    lossy.add_argument("--preset", choices=sorted(PRESETS), default="democratized")
    lossy.add_argument("--batch-size", type=int, default=32)
    lossy.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    features = commands.add_parser("features", allow_abbrev=False)
    features.add_argument("--count", type=int, default=100, help="recordings")
    decoding = commands.add_parser("decode", allow_abbrev=False)
    decoding.add_argument("--checkpoint", required=True)
    decoding.add_argument("--batch-size", type=int, default=64)
    rung, ladder = (commands.add_parser(name, allow_abbrev=False) for name in ("rung", "ladder"))
    add_ladder_flags(rung, ladder)
    member, scaling = (commands.add_parser(name, allow_abbrev=False)
                       for name in ("member", "scaling"))  # fmt: skip
    member.add_argument("--exchange-only", action="store_true", help="all-reduces alone")
    member.add_argument("--compress", action="store_true", help="gradients travel as bfloat16")
    member.add_argument("--bucket-mb", type=int, default=0, help="of an all-reduce; 0: torch's 25")
    member.add_argument("--micro-batches", type=int, default=1, help="of a step")
    scaling.add_argument("--json", type=Path, default=SCALING, help="written, for the ladder")
    for command in (member, scaling):
        command.add_argument("--turns", type=int, default=5, help="of every measure")
    for command in (step, reports, features, decoding, rung, member):
        needed = command in (decoding, rung, reports)
        command.add_argument("--data", required=needed, help="corpus root")
        command.add_argument("--split", required=needed, help="folder below it")
    curves = commands.add_parser("curves", allow_abbrev=False)
    curves.add_argument("runs", nargs="+", type=Path, help="run directories")
    curves.add_argument("--png", required=True, type=Path)
    args, words = parser.parse_known_args()
    with_words = {"step": bench_step, "report": bench_report, "rung": bench_rung,
                  "ladder": bench_ladder, "member": bench_member,
                  "scaling": bench_scaling}  # fmt: skip
    if words and args.command not in with_words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if bool(getattr(args, "data", None)) != bool(getattr(args, "split", None)):
        parser.error("--data and --split need each other")
    for name in ("steps", "turns", "batch_size", "count"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)}, expected at least 1")
    if getattr(args, "warmup", 0) < 0:
        parser.error(f"--warmup: {args.warmup}, expected at least 0")
    run = {"loss": bench_loss, "features": bench_features, "decode": bench_decode,
           "curves": bench_curves}  # fmt: skip
    run |= {name: functools.partial(f, words=words) for name, f in with_words.items()}
    try:
        run[args.command](args)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"bench.py: {data.reason(error)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # made hosts go
    main()
