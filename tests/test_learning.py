# SPDX-License-Identifier: Apache-2.0
"""The whole system learns to emit words while they are spoken.

    python -m pytest -m slow tests/test_learning.py

Training and transcribing are the command lines. Recordings of LibriSpeech are learnt by heart in
test_oracles.py.
"""

import json
import random

import numpy as np
import pytest
import soundfile
import soxr
from test_mllog import judge, read
from tones import SIMPLE, run_script

from tools import demo

pytestmark = pytest.mark.slow

RATE_HZ = demo.SAMPLE_RATE_HZ
WORDS = ("ONE", "TWO", "THREE", "SEVEN", "MONDAY", "KITCHEN", "OFFICE", "RADIO", "MARCH", "EVENING")
VOICE = demo.Voice(1, "gmw/en+m3", 165, 50, 50)
SPOKEN = [
    "--train-splits", "train", "--dev-split", "dev", "--preset", "demo", *SIMPLE,
    "--vocab-size", "32",
    "--enc-dropout", "0", "--pred-dropout", "0", "--joint-dropout", "0", "--batch-size", "16",
    "--warmup-epochs", "1", "--hold-epochs", "8", "--epochs", "12", "--lr", "0.006",
    "--ema-decay", "0.95", "--precision", "fp32",
]


def speak(espeak, rng):
    """One utterance with pauses: its text, samples, and (start_s, end_s) of each word."""
    texts = rng.choices(WORDS, k=rng.randint(2, 4))
    parts, spans, length = [], [], 0

    def add(samples):
        nonlocal length
        parts.append(samples)
        length += len(samples)

    for text in texts:
        add(np.zeros(round(rng.uniform(0.2, 0.5) * RATE_HZ), np.float32))
        voice = VOICE._replace(rate_wpm=rng.randint(150, 180), pitch=rng.randint(40, 60))
        speech = espeak.say(text, voice, rng.getrandbits(31))
        speech = soxr.resample(speech, espeak.sample_rate_hz, RATE_HZ)
        loud = np.flatnonzero(np.abs(speech) > 0.02 * np.abs(speech).max())
        spans.append(((length + loud[0]) / RATE_HZ, (length + loud[-1]) / RATE_HZ))
        add(speech)
    add(np.zeros(round(rng.uniform(0.3, 0.5) * RATE_HZ), np.float32))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(length)
    samples = np.concatenate(parts) + 1e-3 * noise  # noise keeps the pauses from being trimmed
    return " ".join(texts), samples.astype(np.float32), spans


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Corpus root, and (text, spans of words) of every dev file."""
    root, rng, references = tmp_path_factory.mktemp("spoken"), random.Random(7), {}
    espeak = demo.Espeak(tmp_path_factory.mktemp("espeak"))
    for split, count in (("train", 320), ("dev", 24)):
        folder = root / split / "1" / "1"
        folder.mkdir(parents=True)
        lines = []
        for i in range(count):
            text, samples, spans = speak(espeak, rng)
            path = folder / f"1-1-{i:04d}.flac"
            soundfile.write(path, samples, RATE_HZ)
            lines.append(f"{path.stem} {text}\n")
            if split == "dev":
                references[str(path)] = (text, spans)
        (folder / "1-1.trans.txt").write_text("".join(lines), encoding="utf-8")
    return root, references


@pytest.fixture(scope="module")
def trained(spoken, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    run_script("train.py", "--data", spoken[0], "--out", out, *SPOKEN)
    return out


def test_mlperfs_checker_passes_a_whole_run_as_open(trained, tmp_path):
    assert judge(read(trained / "mllog.log"), tmp_path) == "pass"


def test_words_are_emitted_while_they_are_spoken(spoken, trained, tmp_path):
    _, references = spoken
    words_json = tmp_path / "words.json"
    run_script("decode.py", "--checkpoint", trained / "best.pt", "--json", words_json, *references)
    output = json.loads(words_json.read_text(encoding="utf-8"))
    correct = [f for f in output["files"] if f["text"] == references[f["path"]][0]]
    assert len(correct) > len(references) / 2
    for file in correct:
        _, spans = references[file["path"]]
        for word, (start_s, end_s) in zip(file["words"], spans, strict=True):
            # A frame may begin before the word that it ends in.
            assert start_s - output["precision_s"] < word["start_s"], (file["path"], word)
            assert word["end_s"] < end_s + 0.25, (file["path"], word)
