# SPDX-License-Identifier: Apache-2.0
"""Writes what was heard in audio files: CTM, JSON, subtitles, a picture.

    write_srt("a.srt", transcription)
    write_ctm("all.ctm", transcriptions, frame_s=0.12)

Times are in seconds from the beginning of the file.
"""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from features import FeatureConfig, log_mel

CUE_S = 7.0  # words that take longer to say are too much text for one subtitle
PLOT_LONGEST_S = 600  # a second is 100 pixels wide, and a picture has fewer than 2^16
LEAD_S = 1.0  # a subtitle stands at most this long before its first and after its last word


class Word(NamedTuple):
    """A word of a hypothesis; it starts and ends with the frames that emit its pieces."""

    text: str
    start_s: float
    end_s: float
    confidence: float  # posterior of the piece that is least certain


class Segment(NamedTuple):
    """Part of a recording that was decoded on its own: a whole short file, a part of a long one."""

    start_s: float  # start of the first encoder frame
    end_s: float  # end of the last one
    text: str
    words: list[Word]
    arcs: list  # decode.Arc: the path through the lattice
    samples: np.ndarray | None = None  # without their silent ends, if they are to be drawn


class Transcription(NamedTuple):
    """One decoded audio file."""

    path: str
    segments: list[Segment]

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.text)

    @property
    def words(self) -> list[Word]:
        return [word for segment in self.segments for word in segment.words]


def write_text(path: str, text: str) -> None:
    """Writes a text file; an OSError names it."""
    try:
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise type(error)(f"{path} could not be written: {error.strerror}") from error


# ----------------------------------------------------------------------------- tables of words


def write_ctm(path: str, transcriptions: Sequence[Transcription], frame_s: float) -> None:
    """NIST's CTM: file, channel, start, duration, word, confidence; times are in seconds.

    A file is called by its name without suffix, or by its path where two have one name. White
    space separates columns, so it becomes `_` in names.
    """
    stems = [re.sub(r"\s", "_", Path(t.path).stem) for t in transcriptions]
    times = Counter(stems)
    lines = [f";; times are those of emissions, in frames of {frame_s:.3f} s\n"]
    for t, stem in zip(transcriptions, stems, strict=True):
        name = stem if times[stem] == 1 else re.sub(r"\s", "_", t.path)
        for w in t.words:
            lines.append(f"{name} 1 {w.start_s:.3f} {w.end_s - w.start_s:.3f} "
                         f"{w.text} {w.confidence:.3f}\n")
    write_text(path, "".join(lines))


def write_json(path: str, transcriptions: Sequence[Transcription], frame_s: float) -> None:
    """Writes one object: `precision_s`, seconds of an encoder frame, and `files`, one for each.

    A file has its path, text and words, a word its text, `start_s`, `end_s` and confidence.
    """
    files = [{"path": t.path, "text": t.text, "words": [w._asdict() for w in t.words]}
             for t in transcriptions]
    text = json.dumps({"precision_s": frame_s, "files": files}, indent=1)
    write_text(path, text + "\n")


# ------------------------------------------------------------------------------------- subtitles


class Cue(NamedTuple):
    """A text on the screen; players break it into lines."""

    start_s: float
    end_s: float
    text: str


def split_words(words: Sequence[Word]) -> list[Sequence[Word]]:
    """Splits words at the widest gaps until no part lasts longer than CUE_S."""
    if len(words) < 2 or words[-1].end_s - words[0].start_s <= CUE_S:
        return [words]
    # The gap nearest to the middle wins among equally wide ones.
    gaps = [(round(words[i].start_s - words[i - 1].end_s, 3), min(i, len(words) - i), i)
            for i in range(1, len(words))]
    *_, i = max(gaps)
    return split_words(words[:i]) + split_words(words[i:])


def make_cues(transcription: Transcription) -> list[Cue]:
    """One cue a segment, or several where it is long; segments without words have none.

    Words are emitted after they begin, so the first cue of a segment appears with the segment,
    but not more than LEAD_S before its first word. Every cue stays LEAD_S longer than its last
    word, but not beyond the next cue or its segment.
    """
    cues = []
    for segment in transcription.segments:
        parts = split_words(segment.words) if segment.words else []
        for i, words in enumerate(parts):
            start_s = words[0].start_s
            if i == 0:
                start_s = max(segment.start_s, start_s - LEAD_S)
            end_s = min(segment.end_s, words[-1].end_s + LEAD_S)
            cues.append(Cue(start_s, end_s, " ".join(word.text for word in words)))
    for i, after in enumerate(cues[1:]):
        cues[i] = cues[i]._replace(end_s=min(cues[i].end_s, after.start_s))
    return cues


def clock(seconds: float, mark: str) -> str:
    """Hours, minutes, seconds and milliseconds; SubRip's decimal mark is a comma."""
    minutes, ms = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{ms // 1000:02d}{mark}{ms % 1000:03d}"


def write_srt(path: str, transcription: Transcription) -> None:
    """SubRip: number, times and text of each cue, then an empty line."""
    lines = [f"{number}\n{clock(cue.start_s, ',')} --> {clock(cue.end_s, ',')}\n{cue.text}\n\n"
             for number, cue in enumerate(make_cues(transcription), 1)]
    write_text(path, "".join(lines))


def write_vtt(path: str, transcription: Transcription) -> None:
    """WebVTT (W3C): times and text of each cue, then an empty line."""
    lines = [f"{clock(cue.start_s, '.')} --> {clock(cue.end_s, '.')}\n"
             f"{html.escape(cue.text, quote=False)}\n\n" for cue in make_cues(transcription)]
    write_text(path, "".join(["WEBVTT\n\n", *lines]))


# --------------------------------------------------------------------------------------- picture


def plot(png: str, segments: Sequence[Segment], labels: Sequence[tuple[float, str, str]],
         cfg: FeatureConfig, frame_s: float) -> None:
    """Draws the log-mel picture of the segments, with labels above, and the posterior of blank.

    A frame may emit several labels; its posterior is the one before the first of them.

    Args:
        labels: time, text and colour of each.
    Raises:
        ValueError: there is no segment, or the picture would be wider than matplotlib allows.
    """
    if not segments:
        raise ValueError("--plot: the recording has no speech to draw")
    from matplotlib.figure import Figure  # imported here because it takes long to load

    start_s = segments[0].start_s
    end_s = segments[-1].start_s + len(segments[-1].samples) / cfg.sample_rate_hz
    if end_s - start_s > PLOT_LONGEST_S:
        raise ValueError(f"--plot: {end_s - start_s:.0f} s, expected at most {PLOT_LONGEST_S}")
    width = max(8.0, end_s - start_s)  # inches
    figure = Figure(figsize=(width, 5), dpi=100, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for segment in segments:
        seconds = len(segment.samples) / cfg.sample_rate_hz
        extent = (segment.start_s, segment.start_s + seconds, 0, cfg.num_mels)
        upper.imshow(log_mel(segment.samples, cfg).T, origin="lower", aspect="auto", extent=extent)
        first = {arc.frame: arc for arc in reversed(segment.arcs)}
        edges = [segment.start_s + frame_s * t for t in range(len(first) + 1)]
        lower.stairs([math.exp(first[t].blank_log_prob) for t in sorted(first)], edges, color="C0")
    x = -math.inf
    for time_s, label, colour in labels:
        x = max(time_s, x + (end_s - start_s) / width / 5)  # labels must not cover each other
        upper.axvline(time_s, color="white", linewidth=0.8, linestyle="--")
        upper.text(x, cfg.num_mels + 1, label, color=colour, rotation=45)
    upper.set(ylabel="mel bin", xlim=(start_s, end_s))
    lower.set(xlabel="seconds", ylabel="P(blank)", ylim=(0, 1.05))
    figure.savefig(png)
