# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, one subcommand each; the last line is JSON.

    python -m tools.bench step [--data ROOT --split S] [flags of train.py]  # speed and its stages
    python -m tools.bench loss [--peers]  # joint network and loss, fused and plain; other libraries
    python -m tools.bench features [--data ROOT --split S]  # processor time of the front end
    python -m tools.bench decode [--peers] --checkpoint C --data ROOT --split S  # greedy search
    python -m tools.bench conditions --checkpoint C --data ROOT --split S  # WER in noise, silence
    python -m tools.bench stream --checkpoint C  # real-time factor and delay of a stream
    python -m tools.bench start --checkpoint C AUDIO  # seconds until decode.py's first word
    python -m tools.bench curves RUN [RUN ...] --png FILE  # compares runs by their log.jsonl
    python -m tools.bench ladder [--ranks 2] [--runs RUN ...]  # gain of every idea: 50 minutes
    python -m tools.bench scaling [flags of train.py]  # ranks and hosts
    python -m tools.bench neighbour [flags of train.py]  # training beside a busy process

Without --data, step and features make audio with train-clean-100's distribution of lengths.
"""

import argparse
import contextlib
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import data
import decode
import loss
import report
from checkpoint import load_checkpoint
from features import DEFAULT, FeatureConfig, features, load_audio
from model import PRESETS, ModelConfig, Transducer
from ranks import all_sum, leave
from step import Trainer, epoch_steps, matrix_dtype, train_step
from tools import conditions, ladder, peers, streaming
from tools.measure import (
    LabelCount,
    draw_shapes,
    finish,
    make_trainer,
    median_seconds,
    plain_loss,
    rss_gb,
    spread,
    synthesize,
)

ROOT = Path(__file__).resolve().parent.parent  # folder of run.sh and decode.py
MOST_RECORDINGS = 512  # synthetic files; larger workloads repeat them


@contextlib.contextmanager
def recordings(args: argparse.Namespace, count: int,
               cfg: FeatureConfig) -> Iterator[list[data.Utterance]]:
    """Yields the utterances of --data and --split that are short enough to train on.

    Without --data it yields `count` synthetic ones; beyond MOST_RECORDINGS the files repeat, and
    augmentation makes the repetitions differ.
    """
    if args.data:
        yield data.drop_long(data.read_split(args.data, args.split, cfg), cfg)[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        synthesize(Path(folder), draw_shapes(min(count, MOST_RECORDINGS)))
        utterances = data.read_split(folder, "noise", cfg)
        yield (utterances * math.ceil(count / len(utterances)))[:count]


# -------------------------------------------------------------------------------------------- step


def gemm_tflops(dtype: torch.dtype, size: int = 4096) -> float:
    """TFLOP/s of matrix products of `size`^3, the machine's rate that `mfu` relates to."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, 5) / 1e12


def forward_flops(model: Transducer, feat_lens: Tensor, target_lens: Tensor) -> float:
    """Floating-point operations of the matrix products of one forward pass.

    Padding does not count: only valid frames and lattice nodes do.
    """

    def lstm(size: int, hidden: int, layers: int, directions: int = 1) -> int:  # for each frame
        width = hidden // directions
        return 2 * 4 * hidden * (size + (layers - 1) * hidden + layers * width)

    cfg = model.cfg
    directions = 2 if cfg.bidirectional else 1
    T_in, T, U1 = (n.double() for n in (feat_lens, model.num_frames(feat_lens), target_lens + 1))
    He, Hp, J = cfg.enc_hidden, cfg.pred_hidden, cfg.joint_hidden
    frames, size, flops = T_in, cfg.feature_size, torch.zeros_like(T)
    if model.encoder.conv is not None:
        for convolution in model.encoder.conv.convolutions:
            frames, size = torch.ceil(frames / 2), -(-size // 2)
            flops += frames * size * 2 * convolution.weight.numel()
        flops += frames * 2 * model.encoder.conv.linear.weight.numel()
        size = He
    if cfg.pre_layers:
        flops += frames * lstm(size, He, cfg.pre_layers, directions)
        size = He
    if model.char_head is not None:
        flops += frames * 2 * model.char_head.weight.numel()
    flops += T * (lstm(cfg.stack * size, He, cfg.post_layers, directions) + 2 * He * J)
    if model.ctc_head is not None:
        flops += T * 2 * model.ctc_head.weight.numel()
    flops += U1 * (lstm(Hp, Hp, cfg.pred_layers) + 2 * Hp * J)
    flops += T * U1 * 2 * J * cfg.vocab_size
    return float(flops.sum())


def time_steps(trainer: Trainer, steps: Iterator[list[data.Batch]],
               count: int) -> list[tuple[float, float]]:
    """Trains for `count` steps.

    Returns:
        Wall time of each step with its wait for data, and the floating-point operations of this
        rank's forward passes in it.
    """
    rows = []
    for _ in range(count):
        started = time.perf_counter()
        batches = next(steps)
        train_step(trainer, batches, 1, trainer.cfg.lr)
        seconds = time.perf_counter() - started
        flops = sum(forward_flops(trainer.model, b.feat_lens, b.target_lens) for b in batches)
        rows.append((seconds, flops))
    return rows


def front_end_s(utterances: Sequence[data.Utterance], cfg: FeatureConfig,
                augment: bool = True) -> dict[str, float]:
    """Processor time of one utterance in a worker: decoding its file, and its features."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data.keep_memory()
    times = []
    # The first utterance is also taken to make the filterbank, which all others share.
    for i, utterance in enumerate([utterances[0], *utterances]):
        began = time.process_time()
        samples = load_audio(utterance.path, cfg)
        decoded = time.process_time()
        features(samples, cfg, np.random.default_rng(i) if augment else None)
        times.append((decoded - began, time.process_time() - decoded))
    torch.set_num_threads(threads)
    return dict(zip(("decode", "features"), np.mean(times[1:], axis=0).tolist(), strict=True))


def bench_step(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Throughput of train_step over --steps steps, then stages of five more steps.

    A lattice band leaves out nothing as long as the CTC head knows nothing: --init C measures the
    steps of a trained one.
    """
    trainer, cfg, origin = make_trainer(argv)
    ranks, batch = trainer.ranks, trainer.global_batch
    tokenizer = LabelCount(trainer.model.cfg.vocab_size)
    num_steps = args.warmup + args.steps + report.PROFILE_STEPS
    with recordings(args, num_steps * batch, cfg) as utterances:
        if len(utterances) < batch:
            raise ValueError(f"{args.data}/{args.split}: {len(utterances)} utterances, expected "
                             f"at least a batch of {batch}")
        if origin is not None:
            tokenizer = decode.stored_tokenizer(origin)
        elif args.data:
            texts = (u.text for u in utterances)
            tokenizer = data.Tokenizer(data.train_tokenizer(texts, tokenizer.vocab_size))
        steps = itertools.chain.from_iterable(
            epoch_steps(utterances, tokenizer, cfg, trainer.cfg, ranks, epoch)
            for epoch in itertools.count(trainer.cfg.epochs))  # with all losses and augmentation
        all_sum(torch.zeros(1), ranks)  # all ranks multiply at the same time
        rate = gemm_tflops(trainer.dtype)
        warmup, measured = (time_steps(trainer, steps, n) for n in (args.warmup, args.steps))
        peak_gb = rss_gb()  # the profiler's events are not a run's memory
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            time_steps(trainer, steps, report.PROFILE_STEPS)
            profiled_s = time.perf_counter() - started
        apart = front_end_s(spread(utterances, 32), cfg)
    if ranks.world > 1:
        gradient = torch.zeros(sum(p.numel() for p in trainer.model.parameters()))
        reduce_s = median_seconds(lambda: dist.all_reduce(gradient), 5)
        apart["gradients' all-reduce"] = reduce_s / batch
    if ranks.rank == 0:
        print(f"first {args.warmup} steps: {sum(s for s, _ in warmup):.1f} s, left out")
        parts = report.profile_parts(profiled, profiled_s)
        print_stages(parts, profiled_s, report.PROFILE_STEPS * batch, apart)
        finish(step_result(trainer, measured, rate) | {"peak_rss_gb": peak_gb})


def print_stages(parts: dict[str, float], seconds: float, num_utterances: int,
                 apart: dict[str, float]) -> None:
    """Table of the seconds of each stage, which add up to `seconds` for `num_utterances`.

    `apart` are seconds of an utterance that pass beside the stages or inside them: workers decode
    files and make features, gradients travel during the backward pass.
    """
    print(f"{'stage':<24}{'ms/utterance':>14}{'share':>8}")
    for stage, spent in parts.items():
        print(f"{stage:<24}{1e3 * spent / num_utterances:>14.2f}{100 * spent / seconds:>7.1f}%")
    for stage, spent in apart.items():
        print(f"{stage:<24}{1e3 * spent:>14.2f}{'apart':>8}")


def step_result(trainer: Trainer, rows: Sequence[tuple[float, float]], rate: float) -> dict:
    """Throughput and model FLOP utilisation (mfu) from the `rows` of time_steps.

    `rate` is in TFLOP/s, of this rank's matrix products while all other ranks multiply too.
    """
    cfg, seconds = trainer.cfg, sum(s for s, _ in rows)
    flops = 3 * sum(f for _, f in rows)  # the backward pass has twice the products
    return {
        "utts_per_s": len(rows) * trainer.global_batch / seconds,
        "mfu": flops / seconds / 1e12 / rate, "gemm_tflops": rate,
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "median_step_s": statistics.median(s for s, _ in rows),
        "batch": cfg.batch_size, "accumulation": cfg.accumulation,
        "ranks": trainer.ranks.world, "threads": torch.get_num_threads(),
        "preset": cfg.preset,
    }


# -------------------------------------------------------------------------------------------- loss


def loss_inputs(cfg: ModelConfig, batch: int) -> tuple:
    """Random `inputs` and `lattice` of plain_loss, with train-clean-100's lengths."""
    seconds, target_lens = (torch.tensor(x) for x in zip(*draw_shapes(batch), strict=True))
    enc_lens = torch.ceil(seconds.double() / DEFAULT.frame_s / cfg.reduction).long()
    return peers.random_inputs(enc_lens, target_lens, cfg.joint_hidden, cfg.vocab_size)


def bench_loss(args: argparse.Namespace) -> None:
    """Forward and backward pass of the fused loss and of the plain one on the same batch."""
    if args.peers:
        peers.bench_losses(args)
        return
    cfg = PRESETS[args.preset]
    torch.set_flush_denormal(True)
    dtype = matrix_dtype(args.precision)
    inputs, lattice = loss_inputs(cfg, args.batch_size)
    _, enc_lens, target_lens = lattice
    nodes = float((enc_lens * (target_lens + 1)).sum())
    padded = args.batch_size * int(enc_lens.max()) * int(target_lens.max() + 1)

    def seconds(function: Callable, repeats: int) -> float:
        def call() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                cost = function(inputs, lattice, cfg.blank, cfg.joint_dropout)
            cost.backward()

        return median_seconds(call, repeats)

    before = rss_gb("VmRSS")
    fused_s = seconds(lambda i, x, blank, p: loss.joint_transducer_loss(*i, *x, blank, p), 7)
    grown = rss_gb() - before  # measured here: gemm_tflops may need more
    rate = gemm_tflops(dtype)
    plain_s = seconds(plain_loss, 3)
    fused, plain = args.batch_size / fused_s, args.batch_size / plain_s
    print(f"batch {args.batch_size}: fused {fused:.1f} utterances/s, plain {plain:.1f}: "
          f"{fused / plain:.1f} times faster; {nodes / padded:.2f} of the plain loss's lattice "
          "nodes are valid, the others are padding")
    # Forward once and backward twice, a multiplication and an addition each.
    flops = 6 * nodes * cfg.joint_hidden * cfg.vocab_size
    finish({
        "valid_share": nodes / padded, "utts_per_s": fused,
        "share_of_gemm": flops / fused_s / 1e12 / rate, "gemm_tflops": rate,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_growth_gb": grown, "plain_utts_per_s": plain, "speedup": fused / plain,
    })


# ---------------------------------------------------------------------------------------- features


def bench_features(args: argparse.Namespace) -> None:
    """Processor time of one thread from file to input frames, with and without augmentation."""
    with recordings(args, args.count, DEFAULT) as utterances:
        chosen = spread(utterances, args.count)
        runs = {augment: [front_end_s(chosen, DEFAULT, augment) for _ in range(3)]
                for augment in (False, True)}
    decoding = 1e3 * statistics.median(run["decode"] for run in runs[False])
    plain, augmented = (1e3 * statistics.median(sum(run.values()) for run in runs[augment])
                        for augment in (False, True))
    seconds = statistics.mean(u.duration_s for u in chosen)
    print(f"{len(chosen)} recordings of {seconds:.1f} s: decoding {decoding:.1f} ms, with features "
          f"{plain:.1f} ms, augmented {augmented:.1f} ms of one core")
    finish({"ms_per_utt": augmented, "plain_ms_per_utt": plain,
                    "decode_ms_per_utt": decoding, "audio_s": seconds})


# ------------------------------------------------------------------------------------------ decode


def bench_decode(args: argparse.Namespace) -> None:
    """A whole split in batches, features included; some 50 utterances alone, to compare."""
    if args.peers:
        peers.bench_searches(args)
        return
    torch.set_flush_denormal(True)
    model, tokenizer, features = decode.restore(load_checkpoint(args.checkpoint))
    utterances = data.read_split(args.data, args.split, features)
    dataset = data.SpeechDataset(utterances, None, features)

    def run(batches: list[list[int]]) -> tuple[dict[str, str], float]:
        started = time.perf_counter()
        loader = data.batch_loader(dataset, batches, num_workers=1)
        return decode.decode_batches(model, tokenizer, loader)[0], time.perf_counter() - started

    alone, _ = run([[i] for i in range(0, len(utterances), max(1, len(utterances) // 50))])
    texts, seconds = run(decode.evaluation_batches(utterances, args.batch_size))
    same = all(texts[k] == text for k, text in alone.items())
    pairs = [texts[u.id] for u in utterances], [u.text for u in utterances]
    rtf = seconds / sum(u.duration_s for u in utterances)
    print(f"{len(utterances)} utterances in {seconds:.1f} s, "
          f"{len(utterances) / seconds:.0f} a second, real-time factor {rtf:.4f}; "
          f"{len(alone)} of them alone: {'the same' if same else 'OTHER'} hypotheses")
    finish({"seconds": seconds, "rtf": rtf,
            "wer": decode.error_rate(*decode.word_errors(*pairs)),
            "cer": decode.error_rate(*decode.char_errors(*pairs)),
            "same_as_alone": same, "peak_rss_gb": rss_gb()})


# ------------------------------------------------------------------------------------------- start


def first_line_s(command: Sequence[str]) -> float:
    """Seconds from the start of a program in the project's folder to its first line of output."""
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
        process.communicate()
    if not line or process.returncode:
        raise ValueError(f"{' '.join(command)}: status {process.returncode}, output {line!r}")
    return seconds


def bench_start(args: argparse.Namespace) -> None:
    """Seconds until decode.py prints the text of one file, and of its imports alone, in turns."""
    decoding = [sys.executable, "decode.py", "--checkpoint", str(args.checkpoint.resolve()),
                str(args.audio.resolve())]
    importing = [sys.executable, "-c", "import decode; print('done')"]
    first_line_s(decoding)  # brings the files into memory
    runs = [(first_line_s(decoding), first_line_s(importing)) for _ in range(args.turns)]
    start_s, imports_s = (statistics.median(times) for times in zip(*runs, strict=True))
    print(f"first line of decode.py after {start_s:.2f} s, of which imports take {imports_s:.2f} s")
    finish({"start_s": start_s, "imports_s": imports_s, "starts_s": [run[0] for run in runs]})


# --------------------------------------------------------------------------------------- neighbour

# This program keeps a core busy until the process that started it ends.
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


@contextlib.contextmanager
def neighbour() -> Iterator[int]:
    """Keeps the last core of this process busy, as a program of another login session would.

    Yields the id of the process that does so.
    """
    busy = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True)
    try:
        os.sched_setaffinity(busy.pid, {max(os.sched_getaffinity(0))})
        yield busy.pid
    finally:
        busy.kill()
        busy.wait()


class Launch(NamedTuple):
    """Ranks of a run and their environment variables."""

    ranks: int
    variables: dict[str, str]


def decide_launch(**knobs: str) -> Launch:
    """The launch that run.sh decides on with the variables `knobs`."""
    env = os.environ | {"VENV": sys.prefix, "DRY_RUN": "1"} | knobs
    done = subprocess.run(["bash", "run.sh"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"DRY_RUN=1 bash run.sh: status {done.returncode}")
    ranks = re.search(r"^ranks +(\d+) on ", done.stdout, re.MULTILINE)[1]
    variables = re.findall(r"^set +(\w+)=(.*?)  \(", done.stdout, re.MULTILINE)
    return Launch(int(ranks), dict(variables))


def make_launches() -> dict[str, Launch]:
    """Name -> launch: run.sh's own, and one rank of all cores with several ways to wait for its
    OpenMP threads."""
    one = decide_launch(RANKS="1")
    if "iomp5" in one.variables.get("LD_PRELOAD", ""):
        waits = [("KMP_BLOCKTIME", "0"), ("KMP_BLOCKTIME", "200")]
    else:
        waits = [("GOMP_SPINCOUNT", "0"), ("GOMP_SPINCOUNT", "3000"), ("GOMP_SPINCOUNT", "30000")]
    return {"as launched": decide_launch(), "one rank": one} | {
        f"{name}={value}": Launch(1, one.variables | {name: value})
        for name, value in [("OMP_WAIT_POLICY", "passive"), *waits]
    }


def bench_neighbour(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Training steps alone and beside a busy process, in turns, with every launch."""
    launches = make_launches()
    argv = ["--seconds", str(args.seconds), "--batch", str(args.batch_size), "--split", "noise",
            "--preset", "mini", "--one-batch", "--loader-workers", "0", "--speed-min", "1",
            "--speed-max", "1", *argv]
    steps_s = {name: ([], []) for name in launches}  # alone, beside the busy process
    with tempfile.TemporaryDirectory() as folder:
        synthesize(Path(folder), draw_shapes(args.batch_size))
        for _ in range(args.turns):
            for name, (ranks, variables) in launches.items():
                flags = [*argv, "--data", folder, "--batch-size", str(args.batch_size // ranks)]
                for times, company in zip(steps_s[name], (contextlib.nullcontext, neighbour),
                                          strict=True):
                    with company():
                        times += ladder.run_rung(flags, ranks, variables)["step_s"]
    print(f"{'utterances/s':<24}{'alone':>8}{'beside':>8}{'ratio':>8}")
    rows = {}
    for name, times in steps_s.items():
        alone, beside = (args.batch_size / statistics.median(t) for t in times)
        rows[name] = {"alone": alone, "beside": beside, "ranks": launches[name].ranks,
                      "variables": launches[name].variables}
        print(f"{name:<24}{alone:>8.1f}{beside:>8.1f}{beside / alone:>8.2f}")
    finish({"launches": rows, "batch": args.batch_size})


# ------------------------------------------------------------------------------------------ curves


def bench_curves(args: argparse.Namespace) -> None:
    """A table of every run, and one picture of all as train.py draws it."""
    runs = {str(folder): report.read_run(folder) for folder in args.runs}
    for name, (_, evals) in runs.items():
        if not evals:
            raise ValueError(f"{name}/log.jsonl: no evaluation yet")
        print(f"{name}\n{'epoch':>6}{'hours':>8}{'WER %':>9}{'CER %':>9}{'loss':>9}{'utts/s':>8}")
        for r in evals:
            keys = ("cer", "loss", "utts_per_s")
            cer, nats, rate = (math.nan if r.get(k) is None else r[k] for k in keys)
            print(f"{r['epoch']:>6}{r['hours']:>8.2f}{100 * r['wer']:>9.2f}{100 * cer:>9.2f}"
                  f"{nats:>9.1f}{rate:>8.1f}")
    report.draw_curves(runs, args.png)
    # A run that has trained the CTC head alone so far has no other evaluations.
    best = {name: min(report.transducer_evals(evals) or evals, key=lambda r: r["wer"])
            for name, (_, evals) in runs.items()}
    finish({name: {"best_wer": best[name]["wer"], "best_cer": best[name].get("cer"),
                   "hours": evals[-1]["hours"], "epochs": evals[-1]["epoch"]}
            for name, (_, evals) in runs.items()})


# ------------------------------------------------------------------------------------ command line


WITH_TRAIN_FLAGS = {"step": bench_step, "ladder": ladder.bench_ladder, "rung": ladder.bench_rung,
                    "scaling": ladder.bench_scaling, "neighbour": bench_neighbour}
WITHOUT = {"loss": bench_loss, "features": bench_features, "decode": bench_decode,
           "start": bench_start, "curves": bench_curves,
           "conditions": conditions.bench_conditions, "stream": streaming.bench_stream}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    commands = {name: subparsers.add_parser(name, allow_abbrev=False)
                for name in (*WITHOUT, *WITH_TRAIN_FLAGS)}
    commands["step"].add_argument("--warmup", type=int, default=10, help="steps left out")
    commands["step"].add_argument("--steps", type=int, default=30, help="steps measured")
    commands["loss"].add_argument("--preset", choices=sorted(PRESETS), default="democratized")
    commands["loss"].add_argument("--batch-size", type=int, default=32)
    commands["loss"].add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    for name in ("loss", "decode"):
        commands[name].add_argument("--peers", action="store_true",
                                    help="compare with other libraries, see tools/peers.py")
    for name, default in (("loss", 3), ("decode", 3), ("start", 5), ("neighbour", 2)):
        commands[name].add_argument("--turns", type=int, default=default,
                                    help="measurements of each case; loss and decode: of --peers")
    commands["start"].add_argument("--checkpoint", required=True, type=Path)
    commands["start"].add_argument("audio", type=Path, help="a short recording")
    commands["neighbour"].add_argument("--batch-size", type=int, default=16, help="of all ranks")
    commands["neighbour"].add_argument("--seconds", type=float, default=15,
                                       help="least time of a measurement")
    commands["features"].add_argument("--count", type=int, default=100, help="recordings")
    for name in ("decode", "conditions", "stream"):
        commands[name].add_argument("--checkpoint", required=True)
    commands["stream"].add_argument("--count", type=int, default=50, help="sentences")
    for name in ("decode", "conditions"):
        commands[name].add_argument("--batch-size", type=int, default=64)
    commands["curves"].add_argument("runs", nargs="+", type=Path, help="run directories")
    commands["curves"].add_argument("--png", required=True, type=Path)
    ladder.add_flags(commands)
    for name in ("step", "features", "decode", "conditions", "rung"):
        required = name in ("decode", "conditions", "rung")
        commands[name].add_argument("--data", required=required, help="corpus root")
        commands[name].add_argument("--split", required=required, help="folder below it")
    return parser


def main() -> None:
    parser = make_parser()
    args, argv = parser.parse_known_args()
    if argv and args.command in WITHOUT:
        parser.error(f"unrecognized arguments: {' '.join(argv)}")
    if bool(getattr(args, "data", None)) != bool(getattr(args, "split", None)):
        parser.error("--data and --split need each other")
    for name, least in (("steps", 1), ("turns", 1), ("batch_size", 1), ("count", 1), ("warmup", 0)):
        value = getattr(args, name, least)
        if value < least:
            parser.error(f"--{name.replace('_', '-')}: {value}, expected at least {least}")
    try:
        if args.command in WITHOUT:
            WITHOUT[args.command](args)
        else:
            WITH_TRAIN_FLAGS[args.command](args, argv)
    except BrokenPipeError:
        raise  # tools/__init__.py ends the process
    except (OSError, ValueError, FloatingPointError, ModuleNotFoundError) as error:
        message = f"bench.py: {data.error_message(error)}"
        if dist.is_initialized():
            leave(1, message)
        sys.exit(message)
    if dist.is_initialized():
        leave(0, wait_s=60)  # ranks end together, without finalising the interpreter


if __name__ == "__main__":
    main()
