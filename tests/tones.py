# SPDX-License-Identifier: Apache-2.0
"""A corpus of tones in LibriSpeech's form, for tests of the command lines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16000


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
