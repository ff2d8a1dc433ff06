# SPDX-License-Identifier: Apache-2.0
"""A corpus of tones in LibriSpeech's form, and runs of train.py on it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import train

REPO = Path(__file__).resolve().parent.parent
RATE_HZ = 16000

TRAIN_TEXTS = ["ONE TWO", "TWO", "THREE ONE TWO", "ONE", "TWO THREE", "THREE", "ONE ONE", "TWO ONE",
               "THREE THREE TWO ONE"]
TRAIN_SECONDS = [0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 1.20]
DEV_TEXTS, DEV_SECONDS = ["TWO ONE THREE", "ONE", "THREE TWO"], [0.40, 0.30, 0.50]
# The preset's recipe without its CTC heads and noise; a test that needs them turns them on.
PLAIN = [
    "--eval-epochs", "1", "--ctc-epochs", "0", "--ctc-weight", "0", "--char-weight", "0",
    "--hold-share", "0", "--hold-epochs", "8", "--lr-gamma", "0.7", "--weight-decay", "0.001",
    "--clip-norm", "1", "--beta2", "0.999", "--noise-prob", "0", "--pad-max-s", "0",
    "--empty-prob", "0", "--gain-db", "0", "--band-prob", "0", "--ramp-begin", "0",
    "--ramp-epochs", "0",
]
# And without residuals and orthogonal weights: it learns few recordings in few steps.
SIMPLE = [*PLAIN, "--no-residual", "--no-orthogonal-init", "--weights-init-scale", "0.5",
          "--lr-min", "1e-5"]
# Two utterances a step, four steps an epoch: the longest of the nine is too long. The learning
# rate is so high that the hypotheses change from epoch to epoch.
TINY = [
    "--train-splits", "train", "--dev-split", "dev", "--preset", "demo", "--precision", "fp32",
    "--enc-hidden", "16", "--pred-hidden", "8", "--joint-hidden", "8", "--vocab-size", "20",
    "--batch-size", "2", "--eval-batch-size", "2", "--epochs", "3", "--warmup-epochs", "1",
    "--lr", "0.2", "--ema-decay", "0.7", "--num-buckets", "2", "--max-utterance-s", "1.0",
    "--loader-workers", "0",
    *PLAIN,
]


def write_tones(
    root: Path, split: str, texts: Sequence[str], seconds: Sequence[float]
) -> list[Path]:
    """One speaker, one chapter, one rising tone for each text; returns the audio files."""
    folder = root / split / "1" / "2"
    folder.mkdir(parents=True)
    paths = [folder / f"1-2-{i:04d}.flac" for i in range(len(texts))]
    for i, (path, duration_s) in enumerate(zip(paths, seconds, strict=True)):
        t = np.arange(round(duration_s * RATE_HZ)) / RATE_HZ
        tone = 0.4 * np.sin(2 * np.pi * (300 + 250 * (i % 9)) * t * (1 + t))
        soundfile.write(path, tone.astype(np.float32), RATE_HZ)
    lines = [f"{path.stem} {text}\n" for path, text in zip(paths, texts, strict=True)]
    (folder / "1-2.trans.txt").write_text("".join(lines), encoding="utf-8")
    return paths


def tiny_corpus(root: Path) -> Path:
    """Splits train and dev."""
    write_tones(root, "train", TRAIN_TEXTS, TRAIN_SECONDS)
    write_tones(root, "dev", DEV_TEXTS, DEV_SECONDS)
    return root


def run_train(corpus, out, *argv, launcher=()):
    command = [sys.executable, *launcher, str(REPO / "train.py"), "--data", str(corpus),
               "--out", str(out), *TINY, *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)


def run_script(script, *argv):
    """Runs a script of the project, which must succeed; returns its standard output."""
    command = [sys.executable, *(["-m"] if script.startswith("tools.") else []), script]
    command += map(str, argv)
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def heed_signals():
    """Resets signals in a child: bash cannot trap a signal that its parent ignores, as the tests do
    in the background or under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def live(corpus, out, *argv):
    """Runs train.py in the calling process, a multiprocessing.Process that a test kills."""
    torch.set_num_threads(1)
    sys.argv = ["train.py", "--data", str(corpus), "--out", str(out), *TINY, *argv]
    sys.exit(train.main())


def run_here(*argv, draw=False):
    """Runs train.main in this process without its signal handlers; returns the status.

    Without `draw` no evaluation draws the curves, which takes longer than a tiny epoch.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(train.Log, "draw", lambda _: None)
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        patch.setattr(train.signal, "signal", lambda *_: None)
        try:
            return train.main()
        finally:
            torch.set_flush_denormal(False)  # main turns it on for good


def events(out, kind=None):
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [e for e in map(json.loads, lines) if kind in (None, e["event"])]


def checkpoints(out):
    return sorted(path.name for path in out.glob("checkpoint-*.pt"))
