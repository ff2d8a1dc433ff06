# SPDX-License-Identifier: Apache-2.0
"""From audio files and folders to pieces that a model can decode.

    for piece in read_pieces("meeting.flac", cfg): ...  # piece.start_s, piece.samples

A model recognises recordings well that are about as long as its training utterances. A recording of
at most `max_utterance_s` is one piece. A longer one is read in blocks, so its length does not
matter for memory, and is cut where its level stays near its own noise floor.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import is_transcript
from features import FeatureConfig, is_audio, open_audio, read_blocks, to_mono, to_rate

BLOCK_S = 60  # seconds that are read at once, and whose levels give the noise floor
FRAME_S = 0.01  # levels are measured in frames of this length
SMOOTH = 10  # frames over which power is averaged
FLOOR_PERCENTILE, LOUD_PERCENTILE = 10, 95  # of levels: the noise floor, and loud speech
SILENCE_DB = -90.0  # least level, that of digital silence, which tells nothing of the noise
PAUSE_FRAMES = 40  # shortest pause that ends a piece
PAD_FRAMES = 20  # kept of a pause on either side of a piece: soft beginnings and ends of words
RANGE_DB = 50.0  # ends of a piece that are further below its loudest frame are cut off
SHORTEST_FRAMES = 15  # a shorter sound is a click


# ------------------------------------------------------------------------------ files and folders


def list_audio(paths: Sequence[str]) -> tuple[list[str], int]:
    """Files as given, and all audio below the folders, by name.

    Files and folders whose names begin with a dot are hidden: they are passed over. Prints on
    stderr how many other files a folder has. Returns also the number of folders that cannot be
    read, or have no audio; each is named on stderr.
    """
    files: list[str] = []
    errors: list[OSError] = []
    num_empty = 0
    for path in paths:
        inside, others, visited = [], Counter(), set()
        for folder, subfolders, names in os.walk(path, onerror=errors.append, followlinks=True):
            if os.path.realpath(folder) in visited:  # links lead to a folder twice, or in a circle
                subfolders.clear()
                continue
            visited.add(os.path.realpath(folder))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            inside += (str(Path(folder, name)) for name in names if is_audio(name)
                       and not name.startswith("."))
            others.update(Path(name).suffix or "none" for name in names if not is_audio(name)
                          and not is_transcript(name) and not name.startswith("."))
        files += sorted(inside) if os.path.isdir(path) else [path]
        if others:
            kinds = ", ".join(f"{kind} ({n})" for kind, n in sorted(others.items()))
            print(f"{path}: files without a suffix of audio are passed over: {kinds}",
                  file=sys.stderr)
        if os.path.isdir(path) and not inside and path not in {e.filename for e in errors}:
            num_empty += 1
            print(f"{path}: no audio in this folder", file=sys.stderr)
    errors = [error for error in errors if os.path.isdir(error.filename)]
    for error in errors:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return files, len(errors) + num_empty


# ---------------------------------------------------------------------------------------- pieces


class Piece(NamedTuple):
    """Part of a recording that is decoded on its own."""

    start_s: float
    samples: np.ndarray  # (n,) float32 at the model's rate
    share: float  # of the recording's length, for the progress bar


def read_pieces(path: str | Path, cfg: FeatureConfig) -> Iterator[Piece]:
    """The pieces of an audio file in their order; raises as `features.read_audio` does."""
    with open_audio(path) as audio:
        rate = audio.samplerate
        longest = round(cfg.max_utterance_s * rate)
        size = min(audio.frames, max(BLOCK_S * rate, longest)) + 1  # holds all of a short file
        blocks = map(to_mono, read_blocks(audio, size))
        first = next(blocks)
        if len(first) <= longest:
            yield Piece(0.0, to_rate(first, rate, cfg), 1.0)
            return
        end = 0
        for start, samples in cut(chain([first], blocks), rate, longest):
            share = (start + len(samples) - end) / audio.frames
            end = start + len(samples)
            yield Piece(start / rate, to_rate(samples, rate, cfg), share)


def cut(blocks: Iterable[np.ndarray], rate: int, longest: int) -> Iterator[tuple[int, np.ndarray]]:
    """Number of the first sample, and samples, of each piece of at most `longest` samples.

    A piece that may go on in the next block is held until that block is there.
    """
    frame = max(1, round(FRAME_S * rate))  # samples
    held, start = np.zeros(0, np.float32), 0  # samples from number `start` on
    recent = np.zeros(0)  # levels of the last BLOCK_S seconds
    for block in chain(blocks, [None]):
        if block is not None:
            held = np.concatenate([held, block])
        levels = frame_levels(held, frame)
        recent = np.concatenate([recent, levels])[-round(BLOCK_S / FRAME_S) :]
        done = 0  # frames that need no further look
        for first, end in find_speech(levels, *thresholds(recent), max(1, longest // frame)):
            if block is not None and end > len(levels) - PAUSE_FRAMES:
                break
            yield start + first * frame, held[first * frame : end * frame]
            done = end
        else:
            done = max(done, len(levels) - 2 * PAUSE_FRAMES)
        held, start = held[done * frame :], start + done * frame


# ---------------------------------------------------------------------------- speech and pauses


def frame_levels(samples: np.ndarray, frame: int) -> np.ndarray:
    """(n,) samples -> (n // frame,) decibels of full scale: power averaged over SMOOTH frames."""
    whole = samples[: len(samples) // frame * frame]
    power = np.square(whole, dtype=np.float64).reshape(-1, frame).mean(1)
    if len(power) >= SMOOTH:
        power = np.convolve(power, np.ones(SMOOTH) / SMOOTH, "same")
    return decibels(power)


def decibels(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, 10 ** (SILENCE_DB / 10)))


def thresholds(levels: np.ndarray) -> tuple[float, float]:
    """Levels above which speech begins and below which a pause begins, from (n,) recent levels.

    Both stand above the noise floor by a share of the range between it and loud speech: speech
    without a pause, or in loud noise, has a small range, and no part of it must be lost.
    """
    audible = levels[levels > SILENCE_DB + 1]
    if len(audible) == 0:
        audible = np.array([SILENCE_DB])
    floor, loud = np.percentile(audible, (FLOOR_PERCENTILE, LOUD_PERCENTILE)).tolist()
    margin = min(max((loud - floor) / 3, 3.0), 9.0)  # dB
    return floor + margin, floor + margin * 2 / 3


def find_speech(levels: np.ndarray, speech_db: float, pause_db: float,
                longest: int) -> list[tuple[int, int]]:
    """First frame and end of every piece in (n,) levels, none longer than `longest` frames."""
    # Hysteresis: a frame between both thresholds continues the state of the frame before it.
    is_decided = (levels > speech_db) | (levels < pause_db)
    latest = np.maximum.accumulate(np.where(is_decided, np.arange(len(levels)), 0))
    is_speech = (levels > speech_db)[latest]
    edges = np.flatnonzero(np.diff(is_speech, prepend=False, append=False))
    sounds: list[list[int]] = []
    for first, end in edges.reshape(-1, 2).tolist():
        if sounds and first - sounds[-1][1] < PAUSE_FRAMES:
            sounds[-1][1] = end
        else:
            sounds.append([first, end])
    pieces = []
    for first, end in sounds:
        if end - first >= SHORTEST_FRAMES:
            first, end = max(0, first - PAD_FRAMES), min(len(levels), end + PAD_FRAMES)
            audible = first + np.flatnonzero(levels[first:end] > levels[first:end].max() - RANGE_DB)
            pieces += cut_at_quietest(levels, int(audible[0]), int(audible[-1]) + 1, longest)
    return pieces


def cut_at_quietest(levels: np.ndarray, first: int, end: int,
                    longest: int) -> list[tuple[int, int]]:
    """Cuts the frames from `first` to `end` at quiet places into pieces of at most `longest`.

    Each piece but the last has at least half of that length.
    """
    pieces = []
    while end - first > longest:
        earliest = first + longest // 2
        place = earliest + int(levels[earliest : first + longest].argmin())
        pieces.append((first, max(place, first + 1)))
        first = pieces[-1][1]
    return [*pieces, (first, end)]
