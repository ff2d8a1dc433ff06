# SPDX-License-Identifier: Apache-2.0
"""Timer, result line, synthetic recordings, trainer and plain loss that the benchmarks share.

    seconds = median_seconds(lambda: torch.randn(1000, 1000).inverse(), repeats=5)
    finish({"seconds": seconds})  # the last line of a benchmark, JSON
"""

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

import loss
import report
import step
from checkpoint import load_checkpoint
from data import Utterance
from features import FeatureConfig
from ranks import start_ranks
from recipe import make_configs, parse_flags

DOCS = Path(__file__).resolve().parent.parent / "docs"


# ------------------------------------------------------------------------------ time and memory


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after two calls in which oneDNN builds its kernels."""
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def rss_gb(field: str = "VmHWM") -> float:
    """Largest resident memory of this process (VmHWM) or that of now (VmRSS).

    The peak that getrusage returns would include the parent's.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 2**20


def finish(result: dict, path: Path | None = None) -> None:
    """Prints the result as the last line of a benchmark, and writes it to `path`.

    Commit, torch version and processor are added to it.
    """
    result |= {"commit": report.git_commit(), "torch": torch.__version__,
               "processor": report.processor_name()}
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


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
    """A tokenizer that returns one random label for each word of a text, and two characters."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        count = len(text.split())
        return np.random.default_rng(count).integers(0, self.vocab_size - 1, count).tolist()

    def encode_characters(self, text: str) -> list[int]:
        return [label for label in self.encode(text) for _ in range(2)]


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


def spread(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    """At most `count` utterances from all over a split."""
    return utterances[:: max(1, len(utterances) // count)][:count]


# ----------------------------------------------------------------------------- trainer and loss


def make_trainer(argv: Sequence[str]) -> tuple[step.Trainer, FeatureConfig, dict | None]:
    """A trainer for train.py's flags in `argv`, within the ranks that the launcher started.

    Its weights are random, or those of the checkpoint of --init, which is returned as well.
    """
    # The flags that train.py requires say where a run is, which a step does not depend on.
    required = ["--data", ".", "--train-splits", "x", "--dev-split", "x", "--out", "."]
    given = parse_flags([*required, *argv])
    origin = load_checkpoint(given["init"]) if "init" in given else None
    cfg, model_cfg, features = make_configs(given, origin)
    if origin is not None:
        model_cfg = replace(model_cfg, vocab_size=origin["model_config"]["vocab_size"])
    ranks, _ = start_ranks(cfg.ranks, cfg.backend, cfg.timeout_s)
    torch.set_flush_denormal(True)  # as in train.py: denormal numbers slow LSTMs
    # The last epoch trains everything, with full dropout.
    trainer = step.make_trainer(cfg, model_cfg, ranks, cfg.epochs)
    if origin is not None:
        trainer.model.load_state_dict(origin["model"])
    return trainer, features, origin


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
