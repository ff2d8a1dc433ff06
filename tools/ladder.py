# SPDX-License-Identifier: Apache-2.0
"""What every idea, rank and host is worth: the `ladder` and `scaling` of tools/bench.py."""

import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from ranks import all_sum, init_ranks
from tools.bench import (
    NEEDED,
    SCALING,
    SHAPES,
    LabelCount,
    finish,
    open_run,
    origin,
    peak_rss_gb,
    plain_loss,
    read_shapes,
    synthesize,
)

# ------------------------------------------------------------------------------------------ ladder


# Seconds to WER 0.25 in intel/e2eAIOK's overview of its RNN-T; what two of its ideas gave.
ORIGINAL_S = {"one node": 175_275, "four nodes": 33_965, "stack 8, LSTM 512 x 4": 18_200,
              "normalisation": 17_005, "fewer oneCCL workers": 15_849}


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
                      help=f"the logits of {PLAIN_ROWS} utterances exist at once")
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
    }
    alone = {name: base._replace(**idea) for name, idea in ideas.items()}
    for name, idea in ideas.items():
        base = ladder[name] = base._replace(**idea)
    return ladder, alone


def plain_joint_loss(encoded: Tensor, predicted: Tensor,
                     weight: Tensor, bias: Tensor, targets: Tensor, enc_lens: Tensor,
                     target_lens: Tensor, blank: int, dropout: float,
                     reduction: str) -> Tensor:
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
            "most_s": [max(t) for t in warm]}


def bench_rung(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Seconds of a step of --batch utterances in each bucket of a corpus sorted by bucket."""
    cfg, model_cfg, features = train.parse_configs([*NEEDED, *words])
    ranks, _ = init_ranks(cfg)
    torch.set_flush_denormal(True)
    if args.plain_loss:
        train.joint_transducer_loss = plain_joint_loss
    trainer = train.make_trainer(cfg, model_cfg, ranks)
    utterances = data.read_split(args.data, args.split, features)
    tokenizer = LabelCount(model_cfg.vocab_size)
    dataset = data.SpeechDataset(utterances, tokenizer, features, cfg.seed, epoch=1)
    mine = [bucket[ranks.rank :: ranks.world].tolist()
            for bucket in torch.arange(len(utterances)).split(args.batch)]
    times: list[list[float]] = [[] for _ in mine]
    began = started = time.perf_counter()
    for i, batch in enumerate(data.batch_loader(dataset, mine * 1000, cfg.loader_workers)):
        train.train_step(trainer, [batch], i + 1, cfg.lr)
        times[i % len(mine)].append(time.perf_counter() - started)
        late = time.perf_counter() - began > args.seconds
        # Rank 0 decides for all.
        late = all_sum(torch.tensor(int(late and ranks.rank == 0)), ranks) > 0
        if late and i + 1 >= 2 * len(mine):
            break
        started = time.perf_counter()
    if ranks.rank == 0:
        finish(steady(times) | {
            "steps": sum(map(len, times)),
            "peak_rss_gb": peak_rss_gb(), "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        })


def measure_rung(rung: Rung, batch: int, threads: int, words: Sequence[str]) -> dict:
    """bench_rung in processes of its own. Raises ValueError with its last line if it fails."""
    launcher = [sys.executable]
    if rung.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone",
                     "--nproc-per-node", str(rung.ranks)]
    command = [*launcher, "-m", "tools.bench", "rung", "--batch", str(batch), *words, *rung.words,
               "--batch-size", str(batch // rung.ranks), "--precision", rung.precision,
               "--loader-workers", str(rung.workers),
               *([] if rung.fused else ["--plain-loss"])]
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
    }


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
              f"{100 * run['best_wer']:.1f} %")
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
    }


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
          f"(median), {100 * max(apart):.1f} % at most: gains of less are none")
    results["original_s"] = ORIGINAL_S
    story = ", ".join(f"{name} {seconds:,} s ({ORIGINAL_S['one node'] / seconds:.2f}x)"
                      for name, seconds in ORIGINAL_S.items())
    print(f"the original, time to WER 0.25: {story}; stack 8 and its LSTM are one; oneCCL's "
          "workers are cases of bench.py scaling where its bindings are installed")
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
          "some 0.7 in float32 and 0.6 in bfloat16")
    args.png.with_suffix(".json").write_text(json.dumps(origin() | results, indent=1) + "\n")
    draw_ladder(args.png, results)
    finish({"epoch_s": {row["name"]: row["epoch_s"] for row in results["ladder"]},
            "hours_of_49_epochs": results["hours_of_49_epochs"]})


def draw_ladder(png: Path, results: dict) -> None:
    """Bars: seconds of an epoch; line: cumulative speed-up. Right: what our ideas give alone."""
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(3, 2))
    names, seconds, total = ([row[key] for row in results["ladder"]]
                             for key in ("name", "epoch_s", "cumulative"))
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


# ----------------------------------------------------------------------------------------- scaling


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
               "MASTER_ADDR": f"{SUBNET}1" if self.gbit else "127.0.0.1"}
        if self.ccl_workers:  # there is no mpirun to tell oneCCL who is who
            env |= {"CCL_WORKER_COUNT": str(self.ccl_workers), "CCL_PROCESS_LAUNCHER": "none",
                    "CCL_LOCAL_RANK": str(rank), "CCL_LOCAL_SIZE": str(self.ranks)}
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
                all_sum(torch.zeros(1), trainer.ranks)  # all begin together
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
               f"{gbit}gbit", "burst", "1mb", "latency", "50ms")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        # A namespace goes with its last process, which may take a while to end; its link now.
        gone = [words for name in names
                for words in (("link", "del", f"{name}-p"), ("netns", "del", name))]
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
                    [*prefix, sys.executable, "-m", "tools.bench", "member", "--backend", backend,
                     *case.words, *words],
                    env=os.environ | case.environment(rank, port), stderr=said, text=True,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                ))
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
                  slow._replace(words=("--micro-batches", "4"))]
    results = {}
    print(f"{'':<34}{'step s':>8}{'all-reduce':>12}{'waits, least to most':>24}"
          f"{'efficiency':>12}")
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
             for c, r in plain.items()]
    (latency, slope), *_ = np.linalg.lstsq(terms, [r["all_reduce"] for r in plain.values()])
    fit = {"latency_s": latency, "slope": slope}
    print(f"all-reduce between n hosts = 2 (n-1) x {latency:.4f} s + {slope:.2f} x 2 (n-1)/n x "
          "bytes over the network's rate")
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
          "nothing but the network, one ring")
    return {"projected_speedup": speedups} | fit
