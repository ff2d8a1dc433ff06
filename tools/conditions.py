# SPDX-License-Identifier: Apache-2.0
"""WER of a checkpoint on one split, as it is, in noise, silence, other file formats, and joined.

    python -m tools.bench conditions --checkpoint C --data ROOT --split S

Every condition is applied to all recordings of the split. Digital silence comes from editors and
muted microphones, quiet noise from a room before and after the sentence, 8 kHz and A-law from
telephones. The utterances are also joined to recordings of some utterances and of ten minutes, or
to one if the split is shorter, which decode.py has to cut at pauses. The last row counts recordings
without any speech that give words nevertheless.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch

import data
import decode
from checkpoint import load_checkpoint
from data import Utterance
from features import load_audio, resample
from tools.measure import finish

NUM_EMPTY = 40  # recordings without speech
JOINED_S = (8, 600)  # least lengths of joined recordings


class Condition(NamedTuple):
    """A condition changes the samples of a recording and writes them in a file format."""

    change: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    suffix: str = ".wav"
    subtype: str = "FLOAT"
    rate_hz: int = 16000


def unchanged(samples: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    return samples


def append_zeros(samples: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    return np.append(samples, np.zeros(4000, np.float32))  # 0.25 s


def mute(samples: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    """Zeros in place of the quietest 60 ms."""
    count = min(960, len(samples))
    energy = np.cumsum(np.append(0.0, samples.astype(np.float64) ** 2))
    start = int(np.argmin(energy[count:] - energy[:-count]))
    return np.concatenate([samples[:start], np.zeros(count, np.float32), samples[start + count :]])


def surround(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White noise of -80 dB of full scale, half a second on either side."""
    noise = 1e-4 * rng.standard_normal((2, 8000))
    return np.concatenate([noise[0], samples, noise[1]]).astype(np.float32)


def add_noise(snr_db: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """White noise, `snr_db` below the power of the recording."""
    def change(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        level = np.sqrt(np.mean(samples.astype(np.float64) ** 2)) * 10 ** (-snr_db / 20)
        return (samples + level * rng.standard_normal(len(samples))).astype(np.float32)
    return change


def scale(gain_db: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    return lambda samples, _rng: samples * np.float32(10 ** (gain_db / 20))


CONDITIONS = {
    "as recorded": Condition(unchanged),
    "0.25 s of zeros behind": Condition(append_zeros),
    "60 ms of zeros in a pause": Condition(mute),
    "0.5 s of -80 dB noise around": Condition(surround),
    "white noise, SNR 20 dB": Condition(add_noise(20)),
    "white noise, SNR 10 dB": Condition(add_noise(10)),
    "20 dB quieter": Condition(scale(-20)),
    "20 dB louder, not clipped": Condition(scale(20)),
    "8 kHz": Condition(unchanged, rate_hz=8000),
    "A-law, 8 kHz": Condition(unchanged, ".wav", "ALAW", 8000),
    "8 bits": Condition(unchanged, ".wav", "PCM_U8"),
    "MP3": Condition(unchanged, ".mp3", "MPEG_LAYER_III"),
}


def record(path: Path, samples: np.ndarray, condition: Condition,
           rng: np.random.Generator) -> None:
    """Writes a recording after a condition."""
    samples = condition.change(samples, rng)
    if condition.rate_hz != 16000:
        samples = resample(samples, 16000, condition.rate_hz)
    soundfile.write(path, samples, condition.rate_hz, subtype=condition.subtype)


def join(utterances: Sequence[Utterance], folder: Path, least_s: float) -> list[Utterance]:
    """Joins neighbouring utterances to recordings of at least `least_s`; the last may be shorter.

    White noise of -70 dB of full scale lasts for 0.5 to 1.5 s before each utterance.
    """
    rng, joined, parts, texts = np.random.default_rng(3), [], [], []
    for i, utterance in enumerate(utterances, 1):
        pause = rng.standard_normal(int(rng.uniform(0.5, 1.5) * 16000))
        parts += [10 ** (-70 / 20) * pause, load_audio(utterance.path)]
        texts.append(utterance.text)
        length_s = sum(map(len, parts)) / 16000
        if length_s >= least_s or i == len(utterances):
            path = folder / f"joined{least_s}-{len(joined)}.wav"
            samples = np.concatenate(parts).astype(np.float32)
            soundfile.write(path, samples, 16000, subtype="FLOAT")
            joined.append(Utterance(path.stem, str(path), length_s, " ".join(texts)))
            parts, texts = [], []
    return joined


def empty_recordings() -> list[np.ndarray]:
    """Silence and noises of one to four seconds: white, red, and a mains hum."""
    rng, recordings = np.random.default_rng(2), []
    for i in range(NUM_EMPTY):
        count = int(rng.uniform(1, 4) * 16000)
        white = rng.standard_normal(count)
        red = np.cumsum(white - white.mean())
        hum = np.sin(2 * np.pi * 50 * np.arange(count) / 16000)
        noise = (white, red / red.std(), hum + 0.01 * white, np.zeros(count))[i % 4]
        level_db = rng.uniform(-80, -20)
        recordings.append((10 ** (level_db / 20) * noise).astype(np.float32))
    return recordings


def bench_conditions(args: argparse.Namespace) -> None:
    """Prints WER and CER of every condition and the number of empty recordings that give words."""
    torch.set_flush_denormal(True)
    model, tokenizer, cfg = decode.restore(load_checkpoint(args.checkpoint))
    utterances = data.read_split(args.data, args.split, cfg)

    def recognise(recorded: Sequence[Utterance]) -> dict[str, str]:
        dataset = data.SpeechDataset(recorded, None, cfg)
        batches = decode.evaluation_batches(recorded, args.batch_size)
        return decode.decode_batches(model, tokenizer, data.batch_loader(dataset, batches, 1))[0]

    def score(name: str, texts: Sequence[str], references: Sequence[str]) -> None:
        rates["wer"][name] = wer = decode.error_rate(*decode.word_errors(texts, references))
        rates["cer"][name] = cer = decode.error_rate(*decode.char_errors(texts, references))
        print(f"{name:30} WER {100 * wer:6.2f} %  CER {100 * cer:6.2f} %", flush=True)

    rates: dict[str, dict[str, float]] = {"wer": {}, "cer": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, condition in CONDITIONS.items():
            recorded = []
            for i, utterance in enumerate(utterances):
                path = Path(folder, f"{i}{condition.suffix}")
                record(path, load_audio(utterance.path), condition, np.random.default_rng(i))
                recorded.append(utterance._replace(path=str(path)))
            texts = recognise(recorded)
            score(name, [texts[u.id] for u in utterances], [u.text for u in utterances])
        sizes = []
        for least_s in JOINED_S:
            joined = join(utterances, Path(folder), least_s)
            transcribed = decode.transcribe_files([u.path for u in joined], model, tokenizer, cfg,
                                                  args.batch_size)
            texts = [t.text for t in transcribed]
            score(f"joined to {least_s} s", texts, [u.text for u in joined])
            sizes.append(f"{len(joined)} of at most {max(u.duration_s for u in joined):.0f} s")
        print(f"joined recordings: {', '.join(sizes)}")
        empty = []
        for i, samples in enumerate(empty_recordings()):
            path = Path(folder, f"empty{i}.wav")
            soundfile.write(path, samples, 16000, subtype="FLOAT")
            empty.append(Utterance(f"empty{i}", str(path), len(samples) / 16000, ""))
        heard = sum(bool(text) for text in recognise(empty).values())
    print(f"{heard} of {NUM_EMPTY} recordings without speech give words")
    finish({**rates, "empty_with_words": heard, "empty": NUM_EMPTY})
