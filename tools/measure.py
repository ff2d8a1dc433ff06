# SPDX-License-Identifier: Apache-2.0
"""Shared by bench.py and ladder.py: timing, synthetic recordings, a trainer, ranks and hosts.

The synthetic recordings have lengths and numbers of labels drawn from train-clean-100
(docs/train-clean-100.json), so that a benchmark needs no corpus.
"""

import argparse
import contextlib
import json
import math
import os
import re
import secrets
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import loss
import report
import train
from features import FeatureConfig
from ranks import start_ranks

DOCS = Path(__file__).resolve().parent.parent / "docs"
MOST_RECORDINGS = 512  # synthetic files; larger workloads repeat them

# ------------------------------------------------------------------------------ time and memory


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after two calls in which oneDNN builds its kernels."""
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def peak_rss_gb() -> float:
    """Largest resident memory of this process; getrusage would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 2**20


def origin() -> dict:
    """Commit, torch version and processor that a result belongs to."""
    return {"commit": report.git_commit(), "torch": torch.__version__,
            "processor": report.processor_name()}


def finish(result: dict) -> None:
    """Prints the result as the last line of a benchmark."""
    print(json.dumps(result | origin()))


def write_json(path: Path, result: dict) -> None:
    path.write_text(json.dumps(origin() | result, indent=1) + "\n")


# ------------------------------------------------------------------------- synthetic recordings


def read_shapes(
    path: Path = DOCS / "train-clean-100.json",
) -> tuple[list[list[tuple[float, int]]], int]:
    """Buckets of (seconds, labels) in the sampler's order, and the utterances of an epoch."""
    shapes = json.loads(path.read_text(encoding="utf-8"))
    return [[tuple(pair) for pair in bucket] for bucket in shapes["buckets"]], shapes["utterances"]


def draw_shapes(count: int) -> list[tuple[float, int]]:
    """(seconds, labels) of `count` random utterances of train-clean-100."""
    pairs = [pair for bucket in read_shapes()[0] for pair in bucket]
    return [pairs[i] for i in np.random.default_rng(1).integers(0, len(pairs), count)]


class LabelCount:
    """A tokenizer that returns one random label for each word of a text."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        count = len(text.split())
        return np.random.default_rng(count).integers(0, self.vocab_size - 1, count).tolist()


def synthesize(root: Path, shapes: Sequence[tuple[float, int]]) -> None:
    """Writes a split `noise` in LibriSpeech's form: FLAC at speech level, one word a label."""
    rng, folder, lines = np.random.default_rng(1), root / "noise/1/1", []
    folder.mkdir(parents=True)
    for i, (seconds, labels) in enumerate(shapes):
        noise = rng.standard_normal(round(seconds * 16000))
        # The envelope of syllables gives FLAC pauses to compress, as speech has them.
        envelope = np.abs(np.sin(np.arange(len(noise)) * math.pi / 4000)) ** 3
        name = f"1-1-{i:04d}"
        soundfile.write(folder / f"{name}.flac", (800 * noise * envelope).astype(np.int16), 16000)
        lines.append(name + " A" * labels + "\n")
    (folder / "1-1.trans.txt").write_text("".join(lines), encoding="utf-8")


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


# ------------------------------------------------------------------------- trainer and its data


class Workload(NamedTuple):
    """A trainer and the data for its steps."""

    trainer: train.Trainer
    features: FeatureConfig
    tokenizer: data.Tokenizer | LabelCount
    utterances: list[data.Utterance]

    @property
    def global_batch(self) -> int:
        cfg = self.trainer.cfg
        return cfg.batch_size * cfg.accumulation * self.trainer.ranks.world


def make_trainer(argv: Sequence[str]) -> tuple[train.Trainer, FeatureConfig]:
    """A trainer for train.py's flags in `argv`, within the ranks that the launcher started."""
    # The flags that train.py requires say where a run is, which a step does not depend on.
    required = ["--data", ".", "--train-splits", "x", "--dev-split", "x", "--out", "."]
    cfg, model_cfg, features = train.parse_configs([*required, *argv])
    ranks, _ = start_ranks(cfg.ranks, cfg.backend, cfg.timeout_s)
    torch.set_flush_denormal(True)  # as in train.py: denormal numbers slow LSTMs
    return train.make_trainer(cfg, model_cfg, ranks), features


@contextlib.contextmanager
def open_workload(args: argparse.Namespace, argv: Sequence[str],
                  num_steps: int) -> Iterator[Workload]:
    """A trainer for train.py's flags in `argv`, with recordings for `num_steps` steps.

    Raises:
        ValueError: the split has fewer utterances than one step takes.
    """
    trainer, features = make_trainer(argv)
    tokenizer = LabelCount(trainer.model.cfg.vocab_size)
    needed = Workload(trainer, features, tokenizer, []).global_batch
    with recordings(args, num_steps * needed, features) as utterances:
        if len(utterances) < needed:
            raise ValueError(f"{args.data}/{args.split}: {len(utterances)} utterances, expected "
                             f"at least a batch of {needed}")
        if args.data:
            texts = (u.text for u in utterances)
            tokenizer = data.Tokenizer(data.train_tokenizer(texts, tokenizer.vocab_size))
        yield Workload(trainer, features, tokenizer, utterances)


# ------------------------------------------------------------------------------ ranks and hosts

SUBNET = "10.213.78."  # of the hosts that `made_hosts` makes, from 1

# Hosts $prefix-1, $prefix-2, ... are network namespaces on a bridge, each with one link.
MAKE_HOSTS = f"""
ip link add $prefix type bridge
ip link set $prefix up
for i in $(seq $count); do
  host=$prefix-$i
  ip netns add $host
  ip link add $host-p type veth peer name eth0 netns $host
  ip link set $host-p master $prefix up
  ip -n $host addr add {SUBNET}$i/24 dev eth0
  ip -n $host link set eth0 up
  ip -n $host link set lo up
  ip netns exec $host tc qdisc add dev eth0 root tbf rate ${{gbit}}gbit burst 1mb latency 50ms
done
"""
# A namespace lives as long as its last process; its link is removed at once.
REMOVE_HOSTS = """
for i in $(seq $count); do
  ip link del $prefix-$i-p || true
  ip netns del $prefix-$i || true
done
ip link del $prefix
"""


@contextlib.contextmanager
def made_hosts(count: int, gbit: float) -> Iterator[list[list[str]]]:
    """Makes hosts on this machine, connected by a network of `gbit` Gbit/s.

    Yields:
        For each host the first arguments of a command line that runs in it.
    Raises:
        OSError: without iproute2 or the rights to use it.
    """
    # A random name, since several processes may make hosts; Linux allows 15 letters.
    prefix = f"rnnt{secrets.token_hex(3)}"
    env = os.environ | {"prefix": prefix, "count": str(count), "gbit": str(gbit)}
    try:
        made = subprocess.run(["bash", "-ec", MAKE_HOSTS], env=env, capture_output=True, text=True)
        if made.returncode:
            raise OSError(f"no hosts made, needs root and iproute2: {made.stderr.strip()}")
        yield [["ip", "netns", "exec", f"{prefix}-{i}"] for i in range(1, count + 1)]
    finally:
        subprocess.run(["bash", "-c", REMOVE_HOSTS], env=env, capture_output=True)


def can_make_hosts() -> bool:
    """Whether this user may make hosts; prints why not."""
    try:
        with made_hosts(1, gbit=1):
            return True
    except OSError as error:
        print(error)
        return False


def rank_environment(rank: int, num_ranks: int, threads: int, port: int,
                     address: str = "127.0.0.1") -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": str(threads), "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_ranks(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> dict:
    """Runs one process for each rank until all have ended or one has failed.

    Returns:
        The object that rank 0 prints as its last line.
    Raises:
        ValueError: a rank failed; the message has the last line of standard error.
    """
    processes = []
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            for command, environment in zip(commands, environments, strict=True):
                stdout = subprocess.DEVNULL if processes else output
                processes.append(subprocess.Popen(command, env=os.environ | environment,
                                                  stdout=stdout, stderr=errors))
            while None in (statuses := [p.poll() for p in processes]) and not any(statuses):
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        output.seek(0)
        errors.seek(0)
        if any(statuses):
            message = (errors.read().strip() or "no message").splitlines()[-1]
            raise ValueError(f"{' '.join(commands[0])}: statuses {statuses}: {message}")
        return json.loads(output.read().splitlines()[-1])


# ------------------------------------------------------------------------- loss without fusion

PLAIN_ROWS = 4  # utterances whose logits plain_joint_loss holds at the same time


def plain_loss(inputs: Sequence[Tensor], lattice: Sequence[Tensor], blank: int, dropout: float,
               reduction: str = "mean") -> Tensor:
    """The loss without fusion: all (B, T, U+1, V) logits exist at the same time.

    Args:
        inputs: encoded (B, T, J), predicted (B, U+1, J), weight (V, J), bias (V,).
        lattice: targets (B, U), enc_lens (B,), target_lens (B,).
    """
    encoded, predicted, weight, bias = inputs
    hidden = F.dropout(F.relu(encoded[:, :, None] + predicted[:, None]), dropout)  # (B, T, U+1, J)
    return loss.transducer_loss(F.linear(hidden, weight, bias), *lattice, blank, reduction)


def plain_joint_loss(encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor,
                     targets: Tensor, enc_lens: Tensor, target_lens: Tensor, blank: int,
                     dropout: float, reduction: str) -> Tensor:
    """Costs (B,) like loss.joint_transducer_loss, by plain_loss on PLAIN_ROWS utterances at a time.

    The gradient is right only where all costs have the same weight, as in train_step: it is
    computed at once for some utterances, so that their graph can be freed, and attached to the
    cost by a term of value 0.
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
