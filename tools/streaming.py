# SPDX-License-Identifier: Apache-2.0
"""Time that a stream computes on one core, and the delay of its words.

    python -m tools.bench stream --checkpoint C

The model must not need later samples: train.py --no-trim --normalize none --no-bidirectional. The
sentences of the demo's dev split are spoken anew, because espeak-ng then tells where each word
begins. They arrive in pieces of 20 ms, as from a microphone. The delay of a word is the time from
its end, which is the beginning of the next word, to its text. It counts for words that are
recognised.
"""

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from decode import Stream, align
from features import resample
from tools.demo import DEMO_SEED, DEMO_TRAIN_UTTERANCES, Espeak, plan_demo, vary
from tools.measure import finish

PIECE_S = 0.02
WINDOW = 12  # pieces whose computing time is one measurement: 240 ms of audio
BEFORE_S, AFTER_S = 0.2, 1.0  # quiet before and after a sentence
QUIET = 1e-4  # level of the white noise that is everywhere


class Spoken(NamedTuple):
    """A sentence and the ends of those of its words whose ends are known."""

    samples: np.ndarray  # (n,) float32
    text: str
    ends_s: dict[int, float]  # place of a word -> time


def speak(count: int, rate_hz: int) -> list[Spoken]:
    """The first `count` sentences of the demo's dev split, at `rate_hz`."""
    prompts = [p for p in plan_demo(DEMO_TRAIN_UTTERANCES, count, DEMO_SEED)
               if p.split == "dev-demo"]
    rng, noise, spoken = random.Random(DEMO_SEED), np.random.default_rng(DEMO_SEED), []
    with tempfile.TemporaryDirectory() as scratch:
        espeak = Espeak(Path(scratch))
        for prompt in prompts:
            speech = espeak.say(prompt.text, vary(prompt.voice, rng), rng.getrandbits(31))
            starts = espeak.word_starts | {len(prompt.text.split()): len(speech)}
            ends_s = {place - 1: BEFORE_S + sample / espeak.sample_rate_hz
                      for place, sample in starts.items() if place > 0}
            speech = resample(speech / np.abs(speech).max() / 2, espeak.sample_rate_hz, rate_hz)
            samples = np.pad(speech, [round(s * rate_hz) for s in (BEFORE_S, AFTER_S)])
            samples += QUIET * noise.standard_normal(len(samples))
            spoken.append(Spoken(samples.astype(np.float32), prompt.text, ends_s))
    return spoken


def listen(stream: Stream, samples: np.ndarray) -> tuple[list[float], list[tuple[str, float]]]:
    """Gives one sentence to a stream.

    Returns:
        Seconds of computing for each piece, and every word with the time at which its last letter
        was there. Words that only the end of the sentence completes have the time of that end.
    """
    size = round(PIECE_S * stream.cfg.sample_rate_hz)
    seconds, texts, done_s, now_s = [], [], [], 0.0
    for start in range(0, len(samples), size):
        began = time.perf_counter()
        text = stream.accept(samples[start : start + size])
        seconds.append(time.perf_counter() - began)
        texts.append(text.split())
        # A piece waits for its samples and until the piece before has been worked off.
        now_s = max(now_s, PIECE_S * len(texts)) + seconds[-1]
        done_s.append(now_s)
    words = stream.finish().split()
    stream.sentences.clear()
    timed = []
    for place, word in enumerate(words):
        pieces = (i for i, text in enumerate(texts) if text[place : place + 1] == [word])
        timed.append((word, done_s[next(pieces, -1)]))
    return seconds, timed


def word_delays(timed: Sequence[tuple[str, float]], spoken: Spoken) -> list[float]:
    """Seconds from the end of every recognised word, if it is known, to its text."""
    heard, places, delays = iter(timed), itertools.count(), []
    said = spoken.text.split()
    for hypothesis, reference in align([word for word, _ in timed], said):
        if hypothesis is not None:
            _, time_s = next(heard)
        if reference is not None:
            place = next(places)
        if hypothesis == reference and place in spoken.ends_s:
            delays.append(time_s - spoken.ends_s[place])
    return delays


def bench_stream(args: argparse.Namespace) -> None:
    """Prints real-time factor, computing time for 240 ms of audio, and the delay of words."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    stream = Stream(args.checkpoint)
    windows, delays, computing_s, audio_s, num_words = [], [], 0.0, 0.0, 0
    sentences = speak(args.count, stream.cfg.sample_rate_hz)
    listen(stream, sentences[0].samples)  # the first steps are slower
    for spoken in sentences:
        seconds, timed = listen(stream, spoken.samples)
        whole = len(seconds) // WINDOW * WINDOW
        windows += np.reshape(seconds[:whole], (-1, WINDOW)).sum(1).tolist()
        delays += word_delays(timed, spoken)
        computing_s += sum(seconds)
        # The samples behind the last whole step are left to `finish`, which is not measured.
        steps = len(spoken.samples) // stream.step
        audio_s += steps * stream.step / stream.cfg.sample_rate_hz
        num_words += len(spoken.text.split())
    rtf = computing_s / audio_s
    median_ms, slow_ms = (1e3 * np.percentile(windows, p) for p in (50, 99))
    print(f"{audio_s:.0f} s of audio: real-time factor {rtf:.3f} on one core; for 240 ms of audio "
          f"the median is {median_ms:.1f} ms, the 99th percentile {slow_ms:.1f} ms")
    result = {"rtf": rtf, "median_ms": median_ms, "p99_ms": slow_ms, "frame_s": stream.frame_s,
              "words": num_words, "delays": len(delays)}
    if delays:
        middle, late = (np.percentile(delays, p) for p in (50, 90))
        print(f"{len(delays)} delays for {num_words} words: median {middle:.2f} s, "
              f"90th percentile {late:.2f} s")
        result |= {"delay_s": middle, "p90_delay_s": late}
    finish(result)
