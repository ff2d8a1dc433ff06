# SPDX-License-Identifier: Apache-2.0
"""Every performance figure of the README, one subcommand each; the last line printed is JSON.

    python bench.py step [--data ROOT --split S] [flags of train.py]   # where a step's time goes
    python bench.py report [--data ROOT --split S] [flags of train.py]  # what its reports cost
    python bench.py loss                                # joint network and loss, fused and plain
    python bench.py features [--data ROOT --split S]    # processor time of the front end
    python bench.py decode --checkpoint C --data ROOT --split S        # greedy search
    python bench.py curves RUN [RUN ...] --png FILE     # compares runs, from log.jsonl

Without --data, step and features make audio with train-clean-100's distribution of lengths.
"""

import argparse
import contextlib
import functools
import json
import math
import resource
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
import torch.nn.functional as F
from torch import Tensor

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


def gemm_tflops(dtype: torch.dtype = torch.bfloat16, size: int = 4096) -> float:
    """The machine's matrix rate that `mfu` relates to: size^3 products of this dtype."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, 5) / 1e12


def peak_rss_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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


def finish(result: dict) -> None:
    print(json.dumps(result))


# ---------------------------------------------------------------------------- synthetic recordings

# Quantiles 0, 1/32, ..., 1 of the 28,253 train-clean-100 utterances of at most 16.7 s, in seconds.
CLEAN_100_SECONDS = (
    1.41, 3.44, 4.77, 6.14, 7.52, 8.79, 9.91, 10.86, 11.57, 12.12, 12.52, 12.84, 13.12, 13.37,
    13.58, 13.78, 13.97, 14.14, 14.3, 14.46, 14.6, 14.74, 14.86, 15.0, 15.14, 15.26, 15.4, 15.52,
    15.66, 15.8, 15.95, 16.18, 16.7,
)  # fmt: skip
CLEAN_100_LABELS_PER_S = 58.3 / 12.69  # of 1023 sentencepieces


class LabelCount:
    """Stands for a tokenizer where only the number of labels matters: the text is that number."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return np.random.default_rng(int(text)).integers(0, self.vocab_size - 1, int(text)).tolist()


def synthesize(folder: Path, count: int) -> list[data.Utterance]:
    """`count` FLAC files of noise at speech level, lengths drawn from CLEAN_100_SECONDS."""
    rng = np.random.default_rng(1)
    utterances = []
    for i in range(count):
        seconds = float(np.interp(rng.random() * 32, range(33), CLEAN_100_SECONDS))
        noise = rng.standard_normal(round(seconds * 16000))
        # An envelope of syllables, so that FLAC has silence to compress as speech has.
        envelope = np.abs(np.sin(np.arange(len(noise)) * math.pi / 4000)) ** 3
        path = folder / f"1-1-{i:04d}.flac"
        soundfile.write(path, (800 * noise * envelope).astype(np.int16), 16000)
        labels = str(round(seconds * CLEAN_100_LABELS_PER_S))
        utterances.append(data.Utterance(path.stem, str(path), seconds, labels))
    return utterances


@contextlib.contextmanager
def recordings(args: argparse.Namespace, count: int) -> Iterator[list[data.Utterance]]:
    """Utterances of --data and --split without the long ones, or synthetic ones."""
    if args.data:
        yield data.drop_long(data.read_split(args.data, args.split))[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        yield synthesize(Path(folder), count)


# ------------------------------------------------------------------------------------ step


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
            (train, "all_sum", "all-reduce"),
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
    needed = ["--data", ".", "--train-splits", "x", "--dev-split", "x", "--out", "."]
    cfg, model_cfg, features = train.parse_configs([*needed, *words])
    ranks = train.init_ranks(cfg.timeout_s)
    torch.set_flush_denormal(True)
    wanted = steps * cfg.batch_size * cfg.accumulation * ranks.world
    with recordings(args, min(wanted, 512)) as utterances:
        tokenizer = LabelCount(model_cfg.vocab_size)
        if args.data:
            texts = (u.text for u in utterances)
            tokenizer = data.Tokenizer(data.train_tokenizer(texts, model_cfg.vocab_size))
        trainer = train.make_trainer(cfg, model_cfg, ranks)
        yield train.Run(trainer, features, tokenizer, utterances, [], log)


def bench_step(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Trains for --steps after --warmup steps, by train.train_step, and prints the stages."""
    rate = gemm_tflops()
    with open_run(args, words, args.warmup + args.steps) as run:
        trainer, watch, rows = run.trainer, Stopwatch(), []
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
    report_step(args, trainer.cfg, trainer.ranks, rows, watch, rate)


def iter_steps(run: train.Run, steps: int) -> Iterator[list[data.Batch]]:
    """Micro-batches of as many steps as asked for, over as many epochs as that takes."""
    while steps > 0:
        for batches in train.groups(run.epoch_loader(), run.trainer.cfg.accumulation):
            if steps > 0:
                yield batches
            steps -= 1
        run.progress.epoch += 1


def report_step(args: argparse.Namespace, cfg: train.TrainConfig, ranks: train.Ranks,
                rows: list[tuple[float, float]], watch: Stopwatch,
                rate: float) -> None:  # fmt: skip
    """The table of stages, warm-up apart, and the JSON line."""
    measured = rows[args.warmup :]
    seconds = sum(s for s, _ in measured)
    count = len(measured) * cfg.batch_size * cfg.accumulation * ranks.world
    median = statistics.median(s for s, _ in measured)
    watch.seconds["rest"] = seconds - sum(watch.seconds.values())
    print(f"first {args.warmup} steps: {sum(s for s, _ in rows[: args.warmup]):.1f} s, left out")
    print(f"{'stage':<22}{'ms/utterance':>14}{'share':>8}")
    for stage, spent in watch.seconds.items():
        print(f"{stage:<22}{1e3 * spent / count:>14.2f}{100 * spent / seconds:>7.1f}%")
    flops = 3 * sum(f for _, f in measured) * ranks.world
    finish({
        "utts_per_s": count / seconds, "mfu": flops / seconds / 1e12 / rate,
        "gemm_tflops": rate, "peak_rss_gb": peak_rss_gb(), "median_step_s": median,
        "batch": cfg.batch_size, "accumulation": cfg.accumulation, "ranks": ranks.world,
        "threads": torch.get_num_threads(), "preset": cfg.preset,
    })  # fmt: skip


# ------------------------------------------------------------------------------------ report


def bench_report(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Steps with and without what a run reports of them, in turns, and one drawing of curves."""
    with tempfile.TemporaryDirectory() as folder:
        log = report.Log(Path(folder), rank=0)
        with open_run(args, words, args.steps, log) as run:
            everything = list(iter_steps(run, args.steps))

            def seconds(is_reported: bool) -> float:
                started = time.perf_counter()
                for batches in everything:
                    run.progress.step += 1
                    run.progress.batch += 1
                    lr = run.trainer.cfg.lr
                    loss, norm = train.train_step(run.trainer, batches, run.progress.step, lr)
                    if is_reported:
                        run.report_step(loss, lr, norm, 1.0, 0.0)
                return time.perf_counter() - started

            seconds(False)  # oneDNN builds its kernels
            turns = [(seconds(True), seconds(False)) for _ in range(args.turns)]
            draw_s = median_seconds(log.draw, 5)
    for a, b in turns:
        print(f"{args.steps} steps: {a:.2f} s with reports, {b:.2f} s without")
    share = statistics.median(a / b - 1 for a, b in turns)
    step_s = statistics.median(b for _, b in turns) / args.steps
    print(f"reports take {100 * share:.2f} % of a step; an evaluation draws the curves in "
          f"{draw_s:.2f} s, the time of {draw_s / step_s:.1f} steps")  # fmt: skip
    finish({"report_share": share, "draw_s": draw_s, "step_s": step_s, "turns": turns})


# ------------------------------------------------------------------------------------ loss


def loss_inputs(cfg: ModelConfig, batch: int) -> tuple:
    """Random arguments of joint_transducer_loss, with train-clean-100's lengths."""
    rng = np.random.default_rng(1)
    seconds = np.interp(rng.random(batch) * 32, range(33), CLEAN_100_SECONDS)
    enc_lens = torch.from_numpy(np.ceil(seconds / 0.03 / cfg.stack)).long()
    target_lens = torch.from_numpy(np.round(seconds * CLEAN_100_LABELS_PER_S)).long()
    T, U, J, V = int(enc_lens.max()), int(target_lens.max()), cfg.joint_hidden, cfg.vocab_size
    torch.manual_seed(1)
    inputs = (torch.randn(batch, T, J), torch.randn(batch, U + 1, J),
              torch.randn(V, J) / math.sqrt(J), torch.zeros(V))  # fmt: skip
    targets = torch.randint(0, V - 1, (batch, U))
    return tuple(x.requires_grad_() for x in inputs), (targets, enc_lens, target_lens)


def plain_loss(inputs: tuple, lattice: tuple, blank: int, dropout: float) -> Tensor:
    """Linear layer and transducer_loss on (B, T, U+1, V) logits that exist all at once."""
    encoded, predicted, weight, bias = inputs
    hidden = F.dropout(F.relu(encoded[:, :, None] + predicted[:, None]), dropout)
    return loss.transducer_loss(F.linear(hidden, weight, bias), *lattice, blank)


def bench_loss(args: argparse.Namespace) -> None:
    """Forward and backward of the fused loss at a training batch, of the plain one at a small."""
    cfg = PRESETS[args.preset]
    torch.set_flush_denormal(True)
    rate = gemm_tflops()

    def seconds(function: Callable, batch: int, repeats: int) -> tuple[float, float]:
        inputs, lattice = loss_inputs(cfg, batch)

        def call() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                cost = function(inputs, lattice, cfg.blank, cfg.joint_dropout)
            cost.backward()

        nodes = float((lattice[1] * (lattice[2] + 1)).sum())
        return median_seconds(call, repeats), 6 * nodes * cfg.joint_hidden * cfg.vocab_size

    before = peak_rss_gb()
    fused_s, flops = seconds(
        lambda i, x, blank, p: loss.joint_transducer_loss(*i, *x, blank, p), args.batch_size, 7
    )
    grown = peak_rss_gb() - before
    plain_s, _ = seconds(plain_loss, args.plain_batch_size, 3)
    fused, plain = args.batch_size / fused_s, args.plain_batch_size / plain_s
    print(f"fused {fused:.1f} utterances/s at batch {args.batch_size}, plain {plain:.1f} at "
          f"{args.plain_batch_size}: {fused / plain:.1f} times faster; every node has the "
          "occupancy of an untrained model")  # fmt: skip
    finish({
        "utts_per_s": fused, "share_of_gemm": flops / fused_s / 1e12 / rate, "gemm_tflops": rate,
        "memory_growth_gb": grown, "plain_utts_per_s": plain, "speedup": fused / plain,
    })  # fmt: skip


# ------------------------------------------------------------------------------------ features


def bench_features(args: argparse.Namespace) -> None:
    """Processor time of one thread from file to input frames, with and without augmentation."""
    torch.set_num_threads(1)
    with recordings(args, args.count) as utterances:
        chosen = utterances[:: max(1, len(utterances) // args.count)][: args.count]
        seconds = statistics.mean(u.duration_s for u in chosen)

        def cpu_ms(make: Callable[[np.ndarray, int], Tensor]) -> float:
            make(data.load_audio(chosen[0].path), 0)
            started = time.process_time()
            for i, utterance in enumerate(chosen):
                make(data.load_audio(utterance.path), i)
            return 1e3 * (time.process_time() - started) / len(chosen)

        def augmented(samples: np.ndarray, i: int) -> Tensor:
            return data.features(samples, rng=np.random.default_rng(i))

        training = statistics.median(cpu_ms(augmented) for _ in range(3))
        plain = statistics.median(cpu_ms(lambda s, _: data.features(s)) for _ in range(3))
        decoding = statistics.median(cpu_ms(lambda s, _: s) for _ in range(3))
    print(f"{len(chosen)} recordings of {seconds:.1f} s: decoding {decoding:.1f} ms, with features "
          f"{plain:.1f} ms, augmented {training:.1f} ms of one core")  # fmt: skip
    finish({"ms_per_utt": training, "plain_ms_per_utt": plain, "decode_ms_per_utt": decoding,
            "audio_s": seconds})  # fmt: skip


# ------------------------------------------------------------------------------------ decode


def bench_decode(args: argparse.Namespace) -> None:
    """A whole split in batches, features included; some of it again one by one, to compare."""
    torch.set_flush_denormal(True)
    model, tokenizer, features = decode.restore(decode.load_checkpoint(args.checkpoint))
    utterances = data.read_split(args.data, args.split, features)
    dataset = data.SpeechDataset(utterances, None, features)

    def run(batches: list[list[int]]) -> tuple[dict[str, str], float]:
        started = time.perf_counter()
        loader = data.batch_loader(dataset, batches, num_workers=1)
        return decode.decode_batches(model, tokenizer, loader), time.perf_counter() - started

    texts, seconds = run(decode.evaluation_batches(utterances, args.batch_size))
    alone, _ = run([[i] for i in range(0, len(utterances), max(1, len(utterances) // 50))])
    same = all(texts[k] == text for k, text in alone.items())
    errors, words = decode.word_errors(
        [texts[u.id] for u in utterances], [u.text for u in utterances]
    )
    rtf = seconds / sum(u.duration_s for u in utterances)
    print(f"{len(utterances)} utterances in {seconds:.1f} s, real-time factor {rtf:.4f}; "
          f"{len(alone)} of them alone: {'the same' if same else 'OTHER'} hypotheses")  # fmt: skip
    finish({"seconds": seconds, "rtf": rtf, "wer": decode.word_error_rate(errors, words),
            "same_as_alone": same, "peak_rss_gb": peak_rss_gb()})  # fmt: skip


# ------------------------------------------------------------------------------------ curves


def bench_curves(args: argparse.Namespace) -> None:
    """Table of every run and one picture of all, as train.py draws it."""
    runs = {folder.name: report.read_run(folder) for folder in args.runs}
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
    reports.add_argument("--steps", type=int, default=20, help="steps in a turn")
    reports.add_argument("--turns", type=int, default=4, help="with reports, and as many without")
    lossy = commands.add_parser("loss", allow_abbrev=False)
    lossy.add_argument("--preset", choices=sorted(PRESETS), default="democratized")
    lossy.add_argument("--batch-size", type=int, default=32)
    lossy.add_argument("--plain-batch-size", type=int, default=4, help="it needs the memory")
    features = commands.add_parser("features", allow_abbrev=False)
    features.add_argument("--count", type=int, default=100, help="recordings")
    decoding = commands.add_parser("decode", allow_abbrev=False)
    decoding.add_argument("--checkpoint", required=True)
    decoding.add_argument("--batch-size", type=int, default=64)
    for command in (step, reports, features, decoding):
        command.add_argument("--data", required=command is decoding, help="corpus root")
        command.add_argument("--split", required=command is decoding, help="folder below it")
    curves = commands.add_parser("curves", allow_abbrev=False)
    curves.add_argument("runs", nargs="+", type=Path, help="run directories")
    curves.add_argument("--png", required=True, type=Path)
    args, words = parser.parse_known_args()
    if words and args.command not in ("step", "report"):
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if getattr(args, "data", None) and not args.split:
        parser.error("--data needs --split")
    run = {"step": functools.partial(bench_step, words=words),
           "report": functools.partial(bench_report, words=words), "loss": bench_loss,
           "features": bench_features, "decode": bench_decode, "curves": bench_curves}  # fmt: skip
    try:
        run[args.command](args)
    except (OSError, ValueError) as error:
        sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    main()
