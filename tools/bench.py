# SPDX-License-Identifier: Apache-2.0
"""Every performance figure of the README, one subcommand each; the last line printed is JSON.

    python -m tools.bench step [--data ROOT --split S] [flags of train.py]  # a step's parts
    python -m tools.bench report --data ROOT --split S [flags of train.py]  # what its reports cost
    python -m tools.bench loss  # joint network and loss, fused and plain
    python -m tools.bench features [--data ROOT --split S]  # processor time of the front end
    python -m tools.bench decode --checkpoint C --data ROOT --split S  # greedy search
    python -m tools.bench curves RUN [RUN ...] --png FILE  # compares runs, from log.jsonl
    python -m tools.bench ladder [--ranks 2] [--runs RUN ...] # what every idea is worth: 50 minutes
    python -m tools.bench scaling [flags of train.py]  # ranks and hosts; as root makes hosts

Without --data, step and features make audio with train-clean-100's distribution of lengths.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import data
import decode
import loss
import report
import train
from checkpoint import load_checkpoint
from features import features, load_audio
from model import PRESETS, ModelConfig
from ranks import all_sum, init_ranks

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
            "processor": train.processor_name()}


def finish(result: dict) -> None:
    print(json.dumps(result | origin()))


# ---------------------------------------------------------------------------- synthetic recordings

SHAPES = Path(__file__).resolve().parent.parent / "docs" / "train-clean-100.json"
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
             log: report.Log | None = None) -> Iterator[train.Run]:
    """A run with train.py's flags in `words` and recordings for so many steps."""
    cfg, model_cfg, features = train.parse_configs([*NEEDED, *words])
    ranks, _ = init_ranks(cfg)
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
        all_sum(torch.zeros(1), run.trainer.ranks)  # all ranks multiply at the same time
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
        samples = load_audio(utterance.path, run.features)
        decoded = time.process_time()
        features(samples, run.features, np.random.default_rng(i))
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
                rate: float) -> None:
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
    })


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
          f"{draw_s:.2f} s, {100 * draw_share:.2f} % of its {epoch_steps} steps")
    finish({"report_s": own_s, "report_share": share, "draw_s": draw_s, "draw_share": draw_share,
            "step_s": step_s, "turns": pairs})


# ------------------------------------------------------------------------------------ loss


def loss_inputs(cfg: ModelConfig, batch: int) -> tuple:
    """Random arguments of joint_transducer_loss, with train-clean-100's lengths."""
    seconds, labels = torch.tensor(draw_shapes(batch), dtype=torch.float64).T
    enc_lens, target_lens = torch.ceil(seconds / 0.03 / cfg.stack).long(), labels.long()
    T, U, J, V = int(enc_lens.max()), int(target_lens.max()), cfg.joint_hidden, cfg.vocab_size
    torch.manual_seed(1)
    inputs = (torch.randn(batch, T, J), torch.randn(batch, U + 1, J),
              torch.randn(V, J) / math.sqrt(J), torch.zeros(V))
    targets = torch.randint(0, V - 1, (batch, U))
    return tuple(x.requires_grad_() for x in inputs), (targets, enc_lens, target_lens)


def plain_loss(inputs: tuple, lattice: tuple, blank: int, dropout: float,
               reduction: str = "mean") -> Tensor:
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
          "and have a gradient to compute")
    finish({
        "visited_share": visited[0] / nodes, "valid_share": nodes / padded,
        "utts_per_s": fused, "share_of_gemm": flops / fused_s / 1e12 / rate, "gemm_tflops": rate,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_growth_gb": grown, "plain_utts_per_s": plain, "speedup": fused / plain,
    })


# ------------------------------------------------------------------------------------ features


def bench_features(args: argparse.Namespace) -> None:
    """Processor time of one thread from file to input frames, with and without augmentation."""
    torch.set_num_threads(1)
    data.keep_memory()  # as in a worker
    with recordings(args, args.count) as utterances:
        chosen = utterances[:: max(1, len(utterances) // args.count)][: args.count]
        seconds = statistics.mean(u.duration_s for u in chosen)

        def cpu_ms(make: Callable[[np.ndarray], object]) -> float:
            make(load_audio(chosen[0].path))
            started = time.process_time()
            for utterance in chosen:
                make(load_audio(utterance.path))
            return 1e3 * (time.process_time() - started) / len(chosen)

        # Other speeds and masks every time, as in training, where nothing comes twice.
        seeds = itertools.count()

        def augmented(samples: np.ndarray) -> Tensor:
            return features(samples, rng=np.random.default_rng(next(seeds)))

        training = statistics.median(cpu_ms(augmented) for _ in range(3))
        plain = statistics.median(cpu_ms(features) for _ in range(3))
        decoding = statistics.median(cpu_ms(lambda samples: samples) for _ in range(3))
    print(f"{len(chosen)} recordings of {seconds:.1f} s: decoding {decoding:.1f} ms, with features "
          f"{plain:.1f} ms, augmented {training:.1f} ms of one core")
    finish({"ms_per_utt": training, "plain_ms_per_utt": plain, "decode_ms_per_utt": decoding,
            "audio_s": seconds})


# ------------------------------------------------------------------------------------ decode


def bench_decode(args: argparse.Namespace) -> None:
    """A whole split in batches, features included; before it, some of it one by one, to compare."""
    torch.set_flush_denormal(True)
    model, tokenizer, features = decode.restore(load_checkpoint(args.checkpoint))
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
          f"{len(alone)} of them alone: {'the same' if same else 'OTHER'} hypotheses")
    finish({"seconds": seconds, "rtf": rtf, "wer": decode.word_error_rate(errors, words),
            "same_as_alone": same, "peak_rss_gb": peak_rss_gb()})


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
                   "epochs": evals[-1]["epoch"]} for name, (_, evals) in runs.items()})


# ------------------------------------------------------------------------------------ ladder


# ------------------------------------------------------------------------------------ scaling


# ------------------------------------------------------------------------------------ command line


def main() -> None:
    # ladder.py builds on this file, so it is imported when all of it is there.
    from tools import ladder as rungs

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
    rungs.add_ladder_flags(rung, ladder)
    member, scaling = (commands.add_parser(name, allow_abbrev=False)
                       for name in ("member", "scaling"))
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
    with_words = {"step": bench_step, "report": bench_report, "rung": rungs.bench_rung,
                  "ladder": rungs.bench_ladder, "member": rungs.bench_member,
                  "scaling": rungs.bench_scaling}
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
           "curves": bench_curves}
    run |= {name: functools.partial(f, words=words) for name, f in with_words.items()}
    try:
        run[args.command](args)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"bench.py: {data.reason(error)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # made hosts go
    main()
