# SPDX-License-Identifier: Apache-2.0
"""Gain of every idea, and cost of more ranks and hosts, on recordings like train-clean-100's.

    python -m tools.bench ladder [--ranks 2] [--runs RUN ...]
    python -m tools.bench scaling [flags of train.py]

Both measure steps in processes of their own, `python -m tools.bench rung`. The recordings are
noise with lengths and numbers of labels drawn from train-clean-100 (docs/train-clean-100.json), so
that no corpus is needed.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import report
import step
from ranks import all_sum
from tools.measure import (
    DOCS,
    LabelCount,
    draw_shapes,
    finish,
    make_trainer,
    median_seconds,
    plain_loss,
    read_shapes,
    rss_gb,
    synthesize,
)

PLAIN_ROWS = 4  # utterances whose logits plain_joint_loss holds at the same time
# Gains of two of the original's ideas: ratios of seconds to WER 0.25 in intel/e2eAIOK's overview of
# its RNN-T. Stack 8 is part of the first.
ORIGINAL = {"LSTM 512 x 4": 33_965 / 18_200, "normalisation": 18_200 / 17_005}
ORIGINAL_RUNGS = 4  # ideas of the original; the rungs after them are ours
EPOCHS = 49  # of the published recipe


def add_flags(commands: dict[str, argparse.ArgumentParser]) -> None:
    """Flags of `ladder` and `scaling`, and of `rung`, the processes that both start."""
    rung, ladder, scaling = (commands[name] for name in ("rung", "ladder", "scaling"))
    rung.add_argument("--batch", type=int, required=True, help="utterances of a bucket, all ranks")
    rung.add_argument("--plain-loss", action="store_true",
                      help=f"the logits of {PLAIN_ROWS} utterances exist at once")
    rung.add_argument("--passes", type=int, default=2,
                      help="least number of passes over all buckets")
    rung.add_argument("--one-batch", action="store_true",
                      help="repeat the first batch, so that its features are made once")
    ladder.add_argument("--ranks", type=int, default=2, help="ranks of the last rung")
    ladder.add_argument("--shapes", type=Path, default=DOCS / "train-clean-100.json",
                        help="buckets of (seconds, labels)")
    ladder.add_argument("--png", type=Path, default=DOCS / "ladder.png")
    ladder.add_argument("--runs", type=Path, nargs="+", default=[], help="run directories")
    ladder.add_argument("--target-wer", type=float, default=0.1,
                        help="count the epochs of --runs until this WER")
    for command in (rung, ladder):
        command.add_argument("--seconds", type=float, default=60, help="least time of a rung")
    scaling.add_argument("--json", type=Path, default=DOCS / "scaling.json", help="file to write")
    scaling.add_argument("--turns", type=int, default=5, help="steps of every case")
    scaling.add_argument("--batch-size", type=int, default=8, help="utterances of a rank")


# ---------------------------------------------------------------------------------- the plain loss


def plain_joint_loss(encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor,
                     targets: Tensor, enc_lens: Tensor, target_lens: Tensor, blank: int,
                     dropout: float, reduction: str, band: Tensor | None = None,
                     **_: float) -> Tensor:
    """Costs (B,) like loss.joint_transducer_loss, by plain_loss on PLAIN_ROWS utterances at a time.

    The gradient is right only where all costs have the same weight, as in train_step: it is
    computed at once for some utterances, so that their graph can be freed, and attached to the
    cost by a term of value 0. Arguments that only a band needs are ignored.
    """
    if band is not None:
        raise ValueError("--plain-loss computes whole lattices, expected --lattice-band 0")
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


# --------------------------------------------------------------------------- steps in processes


def timed_all_reduce(times: dict, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook of DistributedDataParallel that notes two times of its last bucket.

    times["began"] is when its gradients were ready, with which the backward pass ends, and
    times["ended"] when their mean over all ranks arrived.
    """
    def receive(future: torch.futures.Future) -> Tensor:
        times["ended"] = time.perf_counter()
        return future.value()

    times["began"] = time.perf_counter()
    return allreduce_hook(None, bucket).then(receive)


def bench_rung(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Seconds of a step of --batch utterances in each bucket of a corpus sorted by bucket.

    With several ranks also seconds of an all-reduce alone, and of every step's wait for gradients,
    which begins at the end of rank 0's backward pass and so includes the wait for slower ranks.
    """
    if args.plain_loss:
        step.joint_transducer_loss = plain_joint_loss
    trainer, features, _ = make_trainer(argv)
    ranks, cfg = trainer.ranks, trainer.cfg
    num_parameters = sum(p.numel() for p in trainer.model.parameters())
    reduced, hook_times = {}, {}
    if ranks.world > 1:
        gradient = torch.zeros(num_parameters)
        reduced["all_reduce_s"] = median_seconds(lambda: dist.all_reduce(gradient), 5)
        trainer.parallel.register_comm_hook(hook_times, timed_all_reduce)
    utterances = data.read_split(args.data, args.split, features)
    tokenizer = LabelCount(trainer.model.cfg.vocab_size)
    dataset = data.SpeechDataset(utterances, tokenizer, features, cfg.seed, epoch=1)
    mine = [bucket[ranks.rank :: ranks.world].tolist()
            for bucket in torch.arange(len(utterances)).split(args.batch)]
    times: list[list[float]] = [[] for _ in mine]
    waits = []
    began = started = time.perf_counter()
    loader = data.batch_loader(dataset, mine * 1000, cfg.loader_workers)
    for i, batch in enumerate(itertools.repeat(next(iter(loader))) if args.one_batch else loader):
        step.train_step(trainer, [batch] * cfg.accumulation, i + 1, cfg.lr)
        times[i % len(mine)].append(time.perf_counter() - started)
        if hook_times:
            waits.append(hook_times["ended"] - hook_times["began"])
        late = time.perf_counter() - began > args.seconds and ranks.rank == 0
        late = all_sum(torch.tensor(int(late)), ranks) > 0  # rank 0 decides for all
        if late and i + 1 >= args.passes * len(mine):
            break
        started = time.perf_counter()
    if ranks.rank == 0:
        if waits:
            reduced["waits_s"] = sorted(waits[len(mine):])
        finish(reduced | {
            # The first step of a bucket builds oneDNN's kernels.
            "step_s": [statistics.median(bucket[1:]) for bucket in times],
            "steps": sum(map(len, times)), "peak_rss_gb": rss_gb(),
            "threads": torch.get_num_threads(), "parameters": num_parameters,
        })
    if ranks.world > 1:
        dist.barrier()  # rank 0 keeps the store of all


# Runs a command in a network namespace whose loopback sends $1 Gbit/s for all ranks together.
LIMIT = """
ip link set lo up
tc qdisc add dev lo root tbf rate "$1gbit" burst 1mb latency 50ms
shift
exec "$@"
"""


def limit_network(ranks: int, gbit: float) -> list[str]:
    """First arguments of a command line whose ranks each send `gbit` Gbit/s, as if on hosts."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--net", "sh", "-ec", LIMIT, "sh", f"{ranks * gbit:g}"]


def can_limit_network() -> bool:
    """Whether this user may limit a network; prints why not."""
    done = subprocess.run([*limit_network(1, 1), "true"], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"no hosts: needs iproute2 and root or user namespaces: {done.stderr.strip()}")
    return done.returncode == 0


def run_rung(argv: Sequence[str], ranks: int, env: dict[str, str], gbit: float = 0) -> dict:
    """Runs bench_rung in a process for each rank, started by torchrun, and returns its result.

    Args:
        argv: flags of `rung` and of train.py.
        env: more variables of the ranks.
        gbit: rate of the network between ranks, or 0 for that of this machine.
    Raises:
        ValueError: a rank failed; the message has its error.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "--nproc-per-node",
               str(ranks), "-m", "tools.bench", "rung", *argv]
    done = subprocess.run([*(limit_network(ranks, gbit) if gbit else []), *command],
                          env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("bench.py: ")]
        raise ValueError(f"{' '.join(command)}: {errors[0] if errors else done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------ ladder


class Rung(NamedTuple):
    """How to train: a preset and the ideas that are switched on."""

    argv: tuple[str, ...] = ("--preset", "baseline")
    ranks: int = 1
    fused: bool = False  # joint network and loss
    precision: str = "fp32"
    workers: int = 0  # processes that prepare features; 0: the training process, between steps


def make_rungs(ranks: int) -> tuple[dict[str, Rung], dict[str, Rung]]:
    """Name -> rung: the ideas on top of each other, and our ideas alone on the original's."""
    ladder = {"baseline, fp32": Rung()}
    flags = *Rung().argv, "--stack", "8"
    ladder["stack 8"] = Rung(flags)
    flags = *flags, "--enc-hidden", "512", "--post-layers", "2"
    ladder["LSTM 512 x 4"] = Rung(flags)
    # This is the model of the preset democratized, trained by MLPerf's recipe.
    ladder["normalisation"] = base = Rung((*flags, "--normalization"))
    ideas = {
        "fused joint and loss": {"fused": True}, "bf16": {"precision": "bf16"},
        "features in workers": {"workers": 1}, f"{ranks} ranks": {"ranks": ranks},
    }
    alone = {name: base._replace(**idea) for name, idea in ideas.items()}
    for name, idea in ideas.items():
        base = ladder[name] = base._replace(**idea)
    return ladder, alone


def measure_rung(rung: Rung, batch: int, threads: int, argv: Sequence[str]) -> dict:
    """The result of bench_rung in processes of its own, each rank bound to its own CPUs."""
    argv = ["--batch", str(batch), *argv, *rung.argv, "--batch-size", str(batch // rung.ranks),
            "--precision", rung.precision, "--loader-workers", str(rung.workers),
            *([] if rung.fused else ["--plain-loss"])]
    env = {"OMP_NUM_THREADS": str(max(1, threads // rung.ranks))}
    shares = np.array_split(sorted(os.sched_getaffinity(0)), rung.ranks)
    if rung.ranks > 1 and all(map(len, shares)):
        masks = (hex(sum(1 << int(cpu) for cpu in cpus)) for cpus in shares)
        env["I_MPI_PIN_DOMAIN"] = f"[{','.join(masks)}]"
    return run_rung(argv, rung.ranks, env)


def measure_rungs(args: argparse.Namespace, argv: Sequence[str], buckets: Sequence[Sequence],
                  ladder: dict[str, Rung], alone: dict[str, Rung]) -> dict[Rung, list[dict]]:
    """Results of measure_rung with the seconds of an epoch; two of each rung but the first two."""
    batch, threads = len(buckets[0]), torch.get_num_threads()
    # The first of our ideas is on the ladder and alone: one rung with two names.
    names = {rung: name for name, rung in (*alone.items(), *ladder.items())}
    rungs = list(dict.fromkeys((*ladder.values(), *alone.values())))
    measured: dict[Rung, list[dict]] = {rung: [] for rung in rungs}
    with tempfile.TemporaryDirectory() as folder:
        synthesize(Path(folder), [pair for bucket in buckets for pair in bucket])
        argv = ["--data", folder, "--split", "noise", "--seconds", str(args.seconds), *argv]
        # Two rounds show the noise; the gains of the first two rungs are far above it.
        for rung in (*rungs, *rungs[2:]):
            row = measure_rung(rung, batch, threads, argv)
            # Every bucket holds the same number of utterances, so their steps have equal weight.
            row["epoch_s"] = statistics.mean(row["step_s"]) * args.utterances / batch
            measured[rung].append(row)
            print(f"{names[rung]}: {row['epoch_s']:.0f} s an epoch", flush=True)
    return measured


def epochs_to(folder: Path, target_wer: float) -> dict:
    """Epochs until a run reached `target_wer` or None, all its epochs, its best WER and its CER."""
    evals = report.transducer_evals(report.read_run(folder)[1])
    if not evals:
        raise ValueError(f"{folder}/log.jsonl: no evaluation of the transducer yet")
    reached = next((row["epoch"] for row in evals if row["wer"] <= target_wer), None)
    best = min(evals, key=lambda row: row["wer"])
    return {"epochs": reached, "ran": evals[-1]["epoch"], "best_wer": best["wer"],
            "best_cer": best["cer"]}


def make_rows(ladder: dict[str, Rung], alone: dict[str, Rung],
              measured: dict[Rung, list[dict]]) -> list[dict]:
    """For each rung seconds of an epoch, and gains: over the rung before, over the first, and
    alone on top of the original's ideas. Other values are those of its first measurement."""
    epochs_s = {rung: [row["epoch_s"] for row in rows] for rung, rows in measured.items()}
    mean_s = {rung: statistics.mean(seconds) for rung, seconds in epochs_s.items()}
    first, *_ = rungs = list(ladder.values())
    base = rungs[ORIGINAL_RUNGS - 1]
    return [{
        "name": name, **rung._asdict(), **measured[rung][0],
        "epoch_s": mean_s[rung], "epochs_s": epochs_s[rung],
        "speedup": mean_s[before] / mean_s[rung], "cumulative": mean_s[first] / mean_s[rung],
        "alone": mean_s[base] / mean_s[alone[name]] if name in alone else None,
        "original": ORIGINAL.get(name),
    } for before, (name, rung) in zip([first, *rungs], ladder.items(), strict=False)]


def print_ladder(rows: Sequence[dict]) -> None:
    columns = ("speedup", "cumulative", "alone", "original")
    print(f"{'':<24}{'s an epoch':>12}" + "".join(f"{name:>12}" for name in columns))
    for row in rows:
        gains = ("-" if row[name] is None else f"{row[name]:.2f}x" for name in columns)
        print(f"{row['name']:<24}{row['epoch_s']:>12.0f}" + "".join(f"{x:>12}" for x in gains))
    twice = [row["epochs_s"] for row in rows if len(row["epochs_s"]) > 1]
    apart = [(max(pair) - min(pair)) / statistics.mean(pair) for pair in twice]
    print(f"two measurements of a rung were apart by {100 * statistics.median(apart):.1f} % "
          f"(median), {100 * max(apart):.1f} % at most: smaller gains are noise")


def draw_ladder(png: Path, rows: Sequence[dict]) -> None:
    """Left: seconds of an epoch and the cumulative speed-up. Right: the gain of our ideas alone."""
    figure = Figure(figsize=(11, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bars = left.barh([row["name"] for row in rows], [row["epoch_s"] for row in rows])
    left.bar_label(bars, [f" {row['epoch_s']:.0f} s, {row['cumulative']:.1f}x" for row in rows])
    left.set(xlabel="s an epoch of train-clean-100", title="each idea on top of the last")
    gains = {row["name"]: row["alone"] for row in rows[ORIGINAL_RUNGS:]}
    right.bar_label(right.barh(*zip(*gains.items(), strict=True), color="C1"), fmt=" %.2f")
    right.set(xlabel="speed-up", title=f"alone, on top of {rows[ORIGINAL_RUNGS - 1]['name']}")
    for ax in (left, right):
        ax.invert_yaxis()
        ax.margins(x=0.3)  # for the figures behind the bars
    figure.savefig(png)


def bench_ladder(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Seconds of an epoch of train-clean-100 on every rung: table, picture and JSON."""
    # Inputs and outputs are checked before the first of 50 minutes.
    runs = {folder.name: epochs_to(folder, args.target_wer) for folder in args.runs}
    if not os.access(args.png.parent, os.W_OK):
        raise ValueError(f"--png: {args.png.parent} cannot be written")
    buckets, args.utterances = read_shapes(args.shapes)
    if len(buckets[0]) % args.ranks:
        raise ValueError(f"--ranks {args.ranks} does not divide the batch of {len(buckets[0])}")
    ladder, alone = make_rungs(args.ranks)
    rows = make_rows(ladder, alone, measure_rungs(args, argv, buckets, ladder, alone))
    for name, run in runs.items():
        after = f"after {run['epochs']}" if run["epochs"] else f"not in {run['ran']}"
        print(f"{name}: WER {100 * args.target_wer:g} % {after} epochs, best "
              f"{100 * run['best_wer']:.1f} %, CER {100 * run['best_cer']:.1f} %")
    print_ladder(rows)
    hours = {"here": EPOCHS * min(row["epoch_s"] for row in rows) / 3600}
    print(f"{EPOCHS} epochs of train-clean-100 take {hours['here']:.1f} hours on the fastest rung, "
          "without evaluation and checkpoints")
    draw_ladder(args.png, rows)
    finish({"epoch_s": {row["name"]: row["epoch_s"] for row in rows}, "ladder": rows,
            "epochs_to_target": runs, "hours_of_49_epochs": hours}, args.png.with_suffix(".json"))


# ----------------------------------------------------------------------------------------- scaling

# Name -> ranks of one thread each; Gbit/s at which each sends as if on a host of its own, or 0;
# micro-batches of a step, after the last of which the gradients travel.
CASES = {
    "1 rank": (1, 0, 1), "2 ranks": (2, 0, 1), "2 hosts, 10 Gbit/s": (2, 10, 1),
    "2 hosts, 1 Gbit/s": (2, 1, 1), "2 hosts, 1 Gbit/s --accumulation 4": (2, 1, 4),
}


def measure_case(ranks: int, gbit: float, batch: int, argv: Sequence[str]) -> dict:
    """Seconds of a step, of its wait for the gradients and of an all-reduce alone: medians."""
    with tempfile.TemporaryDirectory() as folder:
        # Every rank computes the same batch, so that cases differ by their ranks alone.
        synthesize(Path(folder), [pair for pair in draw_shapes(batch) for _ in range(ranks)])
        argv = ["--data", folder, "--split", "noise", "--batch", str(ranks * batch), *argv]
        result = run_rung(argv, ranks, {"OMP_NUM_THREADS": "1"}, gbit)
    row = {"step": result["step_s"][0], "gradient_bytes": 4 * result["parameters"]}
    if ranks > 1:
        waits = result["waits_s"]
        row |= {"all_reduce": result["all_reduce_s"], "waits": statistics.median(waits),
                "turns": {"waits": waits}}
    return row


def bench_scaling(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Cost of more ranks: a table, and a projection to four hosts."""
    argv = ["--seconds", "0", "--passes", str(args.turns + 1), "--preset", "democratized",
            "--one-batch", "--loader-workers", "0", "--speed-min", "1", "--speed-max", "1", *argv]
    results: dict[str, dict] = {}
    layout = "{:<36}{:>8}{:>12}{:>22}{:>12}"
    print(layout.format("", "step s", "all-reduce", "waits, least to most", "efficiency"))
    has_hosts = can_limit_network()
    for name, (ranks, gbit, accumulation) in CASES.items():
        if gbit and not has_hosts:
            continue
        row = results[name] = measure_case(ranks, gbit, args.batch_size,
                                           [*argv, "--accumulation", str(accumulation)])
        cells = [f"{row['step']:.2f}", "", "", ""]
        if ranks > 1:
            waits = row["turns"]["waits"]
            row["efficiency"] = results["1 rank"]["step"] * accumulation / row["step"]
            cells[1:] = [f"{row['all_reduce']:.3f}",
                         f"{row['waits']:.2f} ({waits[0]:.2f} to {waits[-1]:.2f})",
                         f"{100 * row['efficiency']:.0f}%"]
        print(layout.format(name, *cells).rstrip(), flush=True)
    result = {"cases": results}
    if has_hosts:
        result["projected_speedup"] = project_hosts(results)
    finish(result, args.json)


def project_hosts(results: dict[str, dict]) -> dict[str, float]:
    """Speed-up from one host to four, of two ranks each, on the networks that were measured.

    In a ring all-reduce of n ranks each sends 2 (n-1)/n of the gradient: 8 ranks wait for 7/4 of
    the bytes for which 2 ranks wait.
    """
    here, speedups = results["2 ranks"], {}
    for network in ("10 Gbit/s", "1 Gbit/s"):
        waits = 7 / 4 * results[f"2 hosts, {network}"]["waits"]
        speedups[network] = 4 * here["step"] / (here["step"] - here["waits"] + waits)
        print(f"projected from 1 to 4 hosts of 2 ranks each: {speedups[network]:.2f} at {network}")
    print("The original says 5.16. Assumed: hosts as fast as this one, ranks that share nothing "
          "but the network, no latency, and for every rank the batch that it has here.")
    return speedups
