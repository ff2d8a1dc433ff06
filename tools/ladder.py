# SPDX-License-Identifier: Apache-2.0
"""Gain of every idea, and cost of more ranks and hosts.

    python -m tools.bench ladder [--ranks 2] [--runs RUN ...]
    python -m tools.bench scaling [flags of train.py]
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import report
import train
from ranks import all_sum
from tools import measure
from tools.measure import SUBNET, can_make_hosts, made_hosts

# Gains of two of the original's ideas: ratios of seconds to WER 0.25 in intel/e2eAIOK's overview of
# its RNN-T. Stack 8 is part of the first.
ORIGINAL = {"LSTM 512 x 4": 33_965 / 18_200, "normalisation": 18_200 / 17_005}
ORIGINAL_RUNGS = 4  # ideas of the original; the rungs after them are ours
EPOCHS = 49  # of the published recipe


def add_flags(commands: dict[str, argparse.ArgumentParser]) -> None:
    """Flags of `ladder` and `scaling`, and of `rung` and `member`, the processes they start."""
    rung, ladder, member, scaling = (commands[n] for n in ("rung", "ladder", "member", "scaling"))
    rung.add_argument("--batch", type=int, required=True, help="utterances of a bucket, all ranks")
    rung.add_argument("--plain-loss", action="store_true",
                      help=f"the logits of {measure.PLAIN_ROWS} utterances exist at once")
    ladder.add_argument("--ranks", type=int, default=2, help="of the rung that has several")
    ladder.add_argument("--shapes", type=Path, default=measure.DOCS / "train-clean-100.json",
                        help="buckets of (seconds, labels)")
    ladder.add_argument("--png", type=Path, default=measure.DOCS / "ladder.png")
    ladder.add_argument("--runs", type=Path, nargs="+", default=[], help="run directories")
    ladder.add_argument("--target-wer", type=float, default=0.1, help="epochs that --runs took")
    ladder.add_argument("--scaling", type=Path, default=measure.DOCS / "scaling.json",
                        help="from bench.py scaling")
    ladder.add_argument("--server-cores", type=int, default=64, help="projection: of a server")
    ladder.add_argument("--server-ranks", type=int, default=2, help="projection: of a server")
    ladder.add_argument("--network-gbit", type=float, default=10, help="projection: per second")
    ladder.add_argument("--global-batch", type=int, default=1024, help="projection")
    for command in (rung, ladder):
        command.add_argument("--seconds", type=float, default=60, help="a rung, two passes or more")
    member.add_argument("--exchange-only", action="store_true", help="all-reduces alone")
    member.add_argument("--compress", action="store_true", help="gradients travel as bfloat16")
    member.add_argument("--bucket-mb", type=int, default=0, help="of an all-reduce; 0: torch's 25")
    scaling.add_argument("--json", type=Path, default=measure.DOCS / "scaling.json",
                         help="written, for the ladder")
    for command in (member, scaling):
        command.add_argument("--turns", type=int, default=5, help="of every measure")


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
    democratized = ("--preset", "democratized")
    ladder = {"baseline, fp32": Rung()}
    ladder["stack 8"] = Rung((*Rung().argv, "--stack", "8"))
    ladder["LSTM 512 x 4"] = Rung((*democratized, "--no-normalization"))
    ladder["normalisation"] = base = Rung(democratized)
    ideas = {
        "fused joint and loss": {"fused": True}, "bf16": {"precision": "bf16"},
        "features in workers": {"workers": 1}, f"{ranks} ranks": {"ranks": ranks},
    }
    alone = {name: base._replace(**idea) for name, idea in ideas.items()}
    for name, idea in ideas.items():
        base = ladder[name] = base._replace(**idea)
    return ladder, alone


def bench_rung(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Seconds of a step of --batch utterances in each bucket of a corpus sorted by bucket."""
    if args.plain_loss:
        train.joint_transducer_loss = measure.plain_joint_loss
    trainer, features = measure.make_trainer(argv)
    ranks, cfg = trainer.ranks, trainer.cfg
    utterances = data.read_split(args.data, args.split, features)
    tokenizer = measure.LabelCount(trainer.model.cfg.vocab_size)
    dataset = data.SpeechDataset(utterances, tokenizer, features, cfg.seed, epoch=1)
    mine = [bucket[ranks.rank :: ranks.world].tolist()
            for bucket in torch.arange(len(utterances)).split(args.batch)]
    times: list[list[float]] = [[] for _ in mine]
    began = started = time.perf_counter()
    for i, batch in enumerate(data.batch_loader(dataset, mine * 1000, cfg.loader_workers)):
        train.train_step(trainer, [batch], i + 1, cfg.lr)
        times[i % len(mine)].append(time.perf_counter() - started)
        late = time.perf_counter() - began > args.seconds and ranks.rank == 0
        late = all_sum(torch.tensor(int(late)), ranks) > 0  # rank 0 decides for all
        if late and i + 1 >= 2 * len(mine):
            break
        started = time.perf_counter()
    if ranks.rank == 0:
        measure.finish({
            # The first step of a bucket builds oneDNN's kernels.
            "step_s": [statistics.median(bucket[1:]) for bucket in times],
            "steps": sum(map(len, times)),
            "peak_rss_gb": measure.peak_rss_gb(), "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        })
    if ranks.world > 1:
        dist.barrier()  # rank 0 keeps the store of all


def measure_rung(rung: Rung, batch: int, threads: int, argv: Sequence[str]) -> dict:
    """The result of bench_rung in processes of its own, each rank bound to its own CPUs."""
    command = [sys.executable, "-m", "tools.bench", "rung", "--batch", str(batch), *argv,
               *rung.argv, "--batch-size", str(batch // rung.ranks),
               "--precision", rung.precision, "--loader-workers", str(rung.workers),
               *([] if rung.fused else ["--plain-loss"])]
    own, port = max(1, threads // rung.ranks), measure.free_port()
    environments = [measure.rank_environment(i, rung.ranks, own, port) for i in range(rung.ranks)]
    cpus = sorted(os.sched_getaffinity(0))
    if 1 < rung.ranks <= len(cpus) // own:
        masks = (sum(1 << cpu for cpu in cpus[i * own : (i + 1) * own]) for i in range(rung.ranks))
        domain = {"I_MPI_PIN_DOMAIN": f"[{','.join(map(hex, masks))}]"}
        environments = [environment | domain for environment in environments]
    return measure.run_ranks([command] * rung.ranks, environments)


def measure_rungs(args: argparse.Namespace, argv: Sequence[str], buckets: Sequence[Sequence],
                  ladder: dict[str, Rung], alone: dict[str, Rung]) -> dict[Rung, list[dict]]:
    """Results of measure_rung with the seconds of an epoch; two of each rung but the first two."""
    batch, threads = len(buckets[0]), torch.get_num_threads()
    # The first of our ideas is on the ladder and alone: one rung with two names.
    names = {rung: name for name, rung in (*alone.items(), *ladder.items())}
    rungs = list(dict.fromkeys((*ladder.values(), *alone.values())))
    measured: dict[Rung, list[dict]] = {rung: [] for rung in rungs}
    with tempfile.TemporaryDirectory() as folder:
        measure.synthesize(Path(folder), [pair for bucket in buckets for pair in bucket])
        argv = ["--data", folder, "--split", "noise", "--seconds", str(args.seconds), *argv]
        # Two rounds show the noise; the gains of the first two rungs are far above it.
        for rung in (*rungs, *rungs[2:]):
            row = measure_rung(rung, batch, threads, argv)
            # Every bucket holds the same number of utterances, so their steps have equal weight.
            row["epoch_s"] = statistics.mean(row["step_s"]) * args.utterances / batch
            measured[rung].append(row)
            print(f"{names[rung]}: {row['epoch_s']:.0f} s an epoch", flush=True)
    return measured


def project_hours(row: dict, servers: int, scaling: dict, args: argparse.Namespace) -> float:
    """Hours of EPOCHS on `servers` servers, from a rung of the ladder.

    All cores share the work, each as fast as a core here. After it, once in --global-batch
    utterances, the float32 gradient goes round all ranks at the speed that `scaling` found: within
    a server that of two ranks here, otherwise that of the fit to its networks.
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
    return EPOCHS * (work_s + args.utterances / args.global_batch * reduce_s) / 3600


def epochs_to(folder: Path, target_wer: float) -> dict:
    """Epochs until a run reached `target_wer` or None, and what tells it from other runs."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    start = next(e for e in map(json.loads, lines) if e["event"] == "start")
    evals = report.read_run(folder)[1]
    reached = next((row["epoch"] for row in evals if row["wer"] <= target_wer), None)
    return {
        "epochs": reached, "ran": evals[-1]["epoch"], "best_wer": min(r["wer"] for r in evals),
        "normalization": start["model_config"]["normalization"],
        "preset": start["train_config"]["preset"], "seed": start["train_config"]["seed"],
    }


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


def project_ladder(rows: Sequence[dict], scaling: dict, args: argparse.Namespace) -> dict:
    """Hours of EPOCHS here, on one server and on four, from the fastest rung."""
    best = min(rows, key=lambda row: row["epoch_s"])
    hours = {"here": EPOCHS * best["epoch_s"] / 3600,
             "one server": project_hours(best, 1, scaling, args),
             "four servers": project_hours(best, 4, scaling, args)}
    print(f"hours of {EPOCHS} epochs of train-clean-100: "
          + ", ".join(f"{name} {h:.1f}" for name, h in hours.items()))
    print(f"from {best['name']!r}; assumed of a server: {args.server_ranks} ranks, one a socket, "
          f"{args.server_cores} cores, each as fast as here with all at work; the threads of a "
          f"rank share its work without loss, of which {best['threads']} was the most here; a "
          f"network of {args.network_gbit:g} Gbit/s; all-reduce not overlapped; global batch "
          f"{args.global_batch}, with which {EPOCHS} epochs must still be enough; evaluation and "
          "checkpoints left out; lattices as of an untrained model")
    return hours


def draw_ladder(png: Path, rows: Sequence[dict]) -> None:
    """Left: seconds of an epoch and the cumulative speed-up. Right: the gain of our ideas alone."""
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(3, 2))
    names, seconds, total = ([row[k] for row in rows] for k in ("name", "epoch_s", "cumulative"))
    axes[0].bar_label(axes[0].bar(names, seconds), fmt="%.0f")
    axes[0].set(ylabel="s an epoch of train-clean-100", title="each idea on top of the last")
    line = axes[0].twinx()
    line.plot(names, total, color="black", marker="o")
    line.set(ylabel="cumulative speed-up", ylim=(0, 1.15 * max(total)))
    gains = {row["name"]: row["alone"] for row in rows[ORIGINAL_RUNGS:]}
    axes[1].bar_label(axes[1].bar(*zip(*gains.items(), strict=True), color="C1"), fmt="%.2f")
    axes[1].set(ylabel="speed-up", title=f"alone, on top of {rows[ORIGINAL_RUNGS - 1]['name']}")
    for ax in axes:
        ax.margins(y=0.1)  # for the figures on the bars
        for label in ax.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    figure.savefig(png)


def bench_ladder(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Seconds of an epoch of train-clean-100 on every rung: table, picture, JSON, projection."""
    # Inputs and outputs are checked before the first of 50 minutes.
    runs = {folder.name: epochs_to(folder, args.target_wer) for folder in args.runs}
    if not os.access(args.png.parent, os.W_OK):
        raise ValueError(f"--png: {args.png.parent} cannot be written")
    buckets, args.utterances = measure.read_shapes(args.shapes)
    if len(buckets[0]) % args.ranks:
        raise ValueError(f"--ranks {args.ranks} does not divide the batch of {len(buckets[0])}")
    scaling = json.loads(args.scaling.read_text())
    if "slope" not in scaling:
        raise ValueError(f"--scaling {args.scaling}: without hosts, see what bench.py scaling "
                         "printed")
    ladder, alone = make_rungs(args.ranks)
    rows = make_rows(ladder, alone, measure_rungs(args, argv, buckets, ladder, alone))
    for name, run in runs.items():
        after = f"after {run['epochs']}" if run["epochs"] else f"not in {run['ran']}"
        print(f"{name}: WER {100 * args.target_wer:g} % {after} epochs, best "
              f"{100 * run['best_wer']:.1f} %")
    print_ladder(rows)
    hours = project_ladder(rows, scaling, args)
    results = {"ladder": rows, "epochs_to_target": runs, "hours_of_49_epochs": hours}
    measure.write_json(args.png.with_suffix(".json"), results)
    draw_ladder(args.png, rows)
    measure.finish({"epoch_s": {row["name"]: row["epoch_s"] for row in rows},
                    "hours_of_49_epochs": hours})


# ----------------------------------------------------------------------------------------- scaling


class Case(NamedTuple):
    """Ranks of one thread each, and how their gradients travel."""

    ranks: int
    gbit: float = 0  # per second, each rank on a host of its own; 0: all on this one
    argv: tuple[str, ...] = ()  # flags of bench_member
    ccl_workers: int = 0  # threads of oneCCL in each rank; 0: gloo

    def __str__(self) -> str:
        where = f"{self.ranks} hosts, {self.gbit:g} Gbit/s" if self.gbit else f"{self.ranks} ranks"
        ccl = [f"oneCCL with {self.ccl_workers}"] if self.ccl_workers else []
        return " ".join([where, *self.argv, *ccl])

    def environment(self, rank: int, port: int) -> dict[str, str]:
        address = f"{SUBNET}1" if self.gbit else "127.0.0.1"
        env = measure.rank_environment(rank, self.ranks, 1, port, address)
        if self.ccl_workers:  # without mpirun, oneCCL has to be told the ranks
            env |= {"CCL_WORKER_COUNT": str(self.ccl_workers), "CCL_PROCESS_LAUNCHER": "none",
                    "CCL_LOCAL_RANK": str(rank), "CCL_LOCAL_SIZE": str(self.ranks)}
        return env


def exchange(state: dict, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook of DistributedDataParallel: the mean over all ranks.

    The gradients travel as state["dtype"]. state["began"] is when the last bucket was ready, with
    which the backward pass ends, and state["ended"] when the last mean arrived.
    """
    def receive(future: torch.futures.Future) -> Tensor:
        mean = bucket.buffer().copy_(future.value()[0])
        state["ended"] = time.perf_counter()
        return mean

    state["began"] = time.perf_counter()
    sent = bucket.buffer().to(state["dtype"]).div_(dist.get_world_size())
    return dist.all_reduce(sent, async_op=True).get_future().then(receive)


def bench_member(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """One rank of a case: medians over --turns of a step, its wait, and an all-reduce alone.

    The wait for the gradients begins at the end of this rank's backward pass and so includes the
    wait for slower ranks. Every rank of every case computes the same batch, so that cases differ
    by their ranks alone.
    """
    with measure.open_workload(args, argv, 1) as workload:
        trainer, features = workload.trainer, workload.features
        dataset = data.SpeechDataset(workload.utterances, workload.tokenizer, features, seed=1)
        batch = data.collate([dataset[i] for i in range(trainer.cfg.batch_size)], features)
    batches = [batch] * trainer.cfg.accumulation
    dtype = torch.bfloat16 if args.compress else torch.float32
    gradient = torch.zeros(sum(p.numel() for p in trainer.model.parameters()), dtype=dtype)
    state, seconds, measures = {"dtype": dtype}, defaultdict(list), {}
    if trainer.ranks.world > 1:
        if args.bucket_mb:
            trainer = trainer._replace(parallel=DistributedDataParallel(
                trainer.model, gradient_as_bucket_view=True, bucket_cap_mb=args.bucket_mb))
        trainer.parallel.register_comm_hook(state, exchange)
        measures["all_reduce"] = lambda: dist.all_reduce(gradient)
    if not args.exchange_only:
        measures["step"] = lambda: train.train_step(trainer, batches, 1, trainer.cfg.lr)
    for _ in range(args.turns + 1):
        for name, function in measures.items():
            all_sum(torch.zeros(1), trainer.ranks)  # all begin together
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
        if "began" in state:
            seconds["waits"].append(state["ended"] - state["began"])
    if trainer.ranks.rank == 0:
        turns = {name: sorted(s[1:]) for name, s in seconds.items()}  # without the first turn
        medians = {name: statistics.median(s) for name, s in turns.items()}
        measure.finish(medians | {"turns": turns, "gradient_bytes": gradient.nbytes})
    if trainer.ranks.world > 1:
        dist.barrier()  # rank 0 keeps the store of all


def measure_case(case: Case, argv: Sequence[str]) -> dict:
    """The result of bench_member in a process for each rank."""
    port = measure.free_port()
    command = [sys.executable, "-m", "tools.bench", "member", "--backend",
               "ccl" if case.ccl_workers else "gloo", *case.argv, *argv]
    hosts = made_hosts(case.ranks, case.gbit) if case.gbit else contextlib.nullcontext()
    with hosts as prefixes:
        return measure.run_ranks([[*prefix, *command] for prefix in prefixes or [[]] * case.ranks],
                         [case.environment(rank, port) for rank in range(case.ranks)])


def ring_s(ranks: int, num_bytes: int, gbit: float) -> float:
    """Seconds of a ring all-reduce: each rank sends and receives 2 (n-1)/n of the gradient."""
    return 2 * (ranks - 1) / ranks * num_bytes * 8 / (gbit * 1e9)


def fitted_s(fit: dict, ranks: int, num_bytes: int, gbit: float) -> float:
    """Seconds of a ring all-reduce with a latency for each of its 2 (n-1) turns."""
    return 2 * (ranks - 1) * fit["latency_s"] + fit["slope"] * ring_s(ranks, num_bytes, gbit)


def make_cases() -> list[Case]:
    cases = [Case(1), Case(2)]
    if importlib.util.find_spec("oneccl_bindings_for_pytorch"):
        cases += [Case(2, ccl_workers=n) for n in (1, 2, 4)]
    if can_make_hosts():
        remedies = (("--bucket-mb", "5"), ("--bucket-mb", "100"), ("--compress",),
                    ("--accumulation", "4"))
        cases += [Case(2, 10), Case(2, 1), Case(4, 10, ("--exchange-only",)),
                  Case(4, 1, ("--exchange-only",)), *(Case(2, 1, remedy) for remedy in remedies)]
    return cases


def bench_scaling(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Cost of more ranks: table, remedies on a slow network, and a projection to four hosts."""
    argv = ["--turns", str(args.turns), "--preset", "democratized", "--batch-size", "8", *argv]
    results: dict[Case, dict] = {}
    print(f"{'':<34}{'step s':>8}{'all-reduce':>12}{'waits, least to most':>24}"
          f"{'efficiency':>12}")
    for case in make_cases():
        row = results[case] = measure_case(case, argv)
        cells = ["", "", "", ""]
        if "step" in row:
            single = results[Case(1)]["step"] * (4 if "--accumulation" in case.argv else 1)
            row["efficiency"] = single / row["step"]
            cells[0] = f"{row['step']:.2f}"
        if "all_reduce" in row:
            cells[1] = f"{row['all_reduce']:.3f}"
        if "waits" in row:
            least, most = row["turns"]["waits"][0], row["turns"]["waits"][-1]
            cells[2] = f"{row['waits']:.2f} ({least:.2f} to {most:.2f})"
            cells[3] = f"{100 * row['efficiency']:.0f}%"
        print("{:<34}{:>8}{:>12}{:>24}{:>12}".format(str(case), *cells).rstrip(), flush=True)
    result = {"cases": {str(case): row for case, row in results.items()}}
    if Case(2, 1) in results:
        result |= project_hosts(results)
    measure.write_json(args.json, result)
    measure.finish(result)


def project_hosts(results: dict[Case, dict]) -> dict:
    """Speed-up from one host to four, of two ranks each, on the networks that were measured."""
    plain = {c: r for c, r in results.items() if c.gbit and c.argv in ((), ("--exchange-only",))}
    terms = [(2 * (c.ranks - 1), ring_s(c.ranks, r["gradient_bytes"], c.gbit))
             for c, r in plain.items()]
    (latency, slope), *_ = np.linalg.lstsq(terms, [r["all_reduce"] for r in plain.values()])
    fit = {"latency_s": latency, "slope": slope}
    print(f"all-reduce between n hosts = 2 (n-1) x {latency:.4f} s + {slope:.2f} x 2 (n-1)/n x "
          "bytes over the network's rate")
    slow, here, speedups = results[Case(2, gbit=1)], results[Case(2)], {}
    # The backward pass hides the rest.
    exposed = min(1.0, slow["waits"] / slow["all_reduce"])
    compute_s = here["step"] - here["waits"]
    for gbit in (10, 1):
        reduce_s = fitted_s(fit, 8, here["gradient_bytes"], gbit)
        one, four = (compute_s + exposed * s for s in (here["all_reduce"], reduce_s))
        speedups[f"{gbit} Gbit/s"] = 4 * one / four
    projected = ", ".join(f"{speedup:.2f} at {name}" for name, speedup in speedups.items())
    print(f"projected from 1 to 4 hosts of 2 ranks each, every rank with the batch it has here: "
          f"{projected}; the original says 5.16. Assumed: hosts as fast as this one, ranks that "
          "share nothing but the network, one ring")
    return {"projected_speedup": speedups} | fit
