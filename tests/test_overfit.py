# SPDX-License-Identifier: Apache-2.0
"""The whole system learns 29 real recordings by heart, to a word error rate of zero:

    python -m pytest -m slow tests/test_overfit.py        # some three minutes on two cores

A model that cannot do that has a fault somewhere between the audio files and the text. Training
and scoring are the command lines; the recordings are ../shared/librispeech/smoke.
"""

import json

import pytest
from tones import REPO, run_script

SMOKE = REPO.parent / "shared" / "librispeech" / "smoke"
SPLIT = "dev-clean-2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SMOKE.is_dir(), reason="../shared/librispeech is not here"),
]

FLAGS = [
    # Eight times in an epoch, so that there are as many evaluations fewer.
    "--data", SMOKE, "--train-splits", *[SPLIT] * 8, "--dev-split", SPLIT, "--preset", "demo",
    # The longest recording has 31.7 s, 438 letters and, with 72 classes, some 285 tokens: with
    # 64 classes it has 302, and decoding ends at 300.
    "--max-utterance-s", "40", "--vocab-size", "72", "--enc-hidden", "192",
    # Nothing that keeps a model from learning by heart.
    "--speed-min", "1", "--speed-max", "1", "--freq-masks", "0", "--time-masks", "0",
    "--dither", "0", "--enc-dropout", "0", "--pred-dropout", "0", "--joint-dropout", "0",
    "--weight-decay", "0",
    "--precision", "fp32", "--batch-size", "8", "--eval-batch-size", "8", "--lr", "0.007",
    "--warmup-epochs", "1", "--hold-epochs", "7", "--lr-gamma", "0.8", "--ema-decay", "0.95",
    "--epochs", "30",
]


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    """Run directory of a training that ended at WER 0 or gave up."""
    out = tmp_path_factory.mktemp("overfit") / "run"
    run_script("train.py", *FLAGS, "--out", out)
    return out


def test_training_stops_at_the_default_target_of_no_error(memorised):
    lines = (memorised / "log.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    wers = [e["wer"] for e in logged if e["event"] == "eval"]
    assert logged[0]["train_config"]["target_wer"] == 0.0
    assert logged[-1]["reason"] == "target wer", wers
    assert wers[-1] == 0.0 < min(wers[:-1])  # the first of its kind ended the run


def test_the_best_checkpoint_scores_no_error(memorised):
    printed = run_script("decode.py", "--checkpoint", memorised / "best.pt", "--data", SMOKE,
                  "--split", SPLIT)
    assert "WER 0.00 % (0 errors in 266 words)" in printed


def test_single_files_are_transcribed_without_error(memorised):
    folders = sorted(path for path in (SMOKE / SPLIT).glob("*/*") if path.is_dir())
    texts = {}
    for folder in folders[:6]:
        (transcript,) = folder.glob("*.trans.txt")
        for line in transcript.read_text(encoding="utf-8").splitlines():
            utterance, _, text = line.partition(" ")
            texts[str(folder / f"{utterance}.flac")] = text
    printed = run_script("decode.py", "--checkpoint", memorised / "best.pt", *texts)
    assert dict(line.split("\t") for line in printed.splitlines()) == texts
