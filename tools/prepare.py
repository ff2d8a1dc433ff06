# SPDX-License-Identifier: Apache-2.0
"""Corpora: speak the demo corpus, download LibriSpeech, check any corpus.

    python -m tools.prepare demo ROOT                 # splits train-demo and dev-demo, by espeak-ng
    python -m tools.prepare mini-librispeech ROOT     # or librispeech-100, librispeech-960
    python -m tools.prepare check ROOT [SPLIT ...]    # exit status 1 if an error was found

After an interruption the same call goes on where it stopped. From a mirror, or without internet:
    python -m tools.prepare mini-librispeech ROOT --mirror https://openslr.elda.org/resources
    python -m tools.prepare mini-librispeech ROOT --archive train-clean-5.tar.gz dev-clean-2.tar.gz

Every corpus has LibriSpeech's form (Panayotov et al. 2015, doi:10.1109/ICASSP.2015.7178964):
    <ROOT>/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac    16 kHz, mono, int16
    <ROOT>/<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt        lines `ID TEXT`
The text is in capitals.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import http.client
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from data import describe, is_audio, is_transcript, read_transcripts, scan_split, separate

# ------------------------------------------------------------------------------ demo: what is said

DEMO_RECIPE = 1  # raised whenever the same sizes and seed give other words or sounds
DEMO_TRAIN_UTTERANCES = 2000
DEMO_DEV_UTTERANCES = 100
DEMO_SEED = 1

# A context-free grammar: <name> stands for any alternative of that name, repeats make one likelier.
# The numbers skip 13 to 19: THIRTEEN against THIRTY is hard even for people, and this corpus is
# to show within minutes whether training works.
GRAMMAR = {
    "sentence": (
        "<turn> <on> THE <room> <device>",
        "SET <clock> FOR <number> <unit>",
        "<play> <music> IN THE <room>",
        "HEAT THE <room> TO <number> DEGREES",
        "WHAT IS <number> <operator> <number>",
        "<contact> <name> ON <weekday> <daytime>",
        "<contact> <name> ON THE <day> OF <month>",
        "<contact> <name> ON <weekday> THE <day> OF <month>",
    ),
    "turn": ("TURN", "SWITCH"),
    "on": ("ON", "OFF"),
    "room": ("KITCHEN", "BEDROOM", "BATHROOM", "GARDEN", "OFFICE", "CELLAR"),
    "device": ("LIGHT", "LAMP", "FAN", "RADIO", "HEATER", "CAMERA"),
    "clock": ("A TIMER", "AN ALARM"),
    "unit": ("SECONDS", "MINUTES", "HOURS"),
    "play": ("START", "STOP", "REPEAT"),
    "music": ("MUSIC", "JAZZ", "NEWS"),
    "operator": ("PLUS", "MINUS", "TIMES"),
    "contact": ("CALL", "MEET", "EMAIL"),
    "name": ("ANNA", "PETER", "MARIA", "DAVID", "SUSAN", "THOMAS", "LAURA", "GEORGE"),
    "weekday": ("MONDAY", "TUESDAY", "WEDNESDAY", "THURSDAY", "FRIDAY", "SATURDAY", "SUNDAY"),
    "daytime": ("MORNING", "EVENING"),
    "number": ("<digit>", "<digit>", "<ten>", "<tens>", "<tens> <digit>"),
    "digit": ("ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE"),
    "ten": ("TEN", "ELEVEN", "TWELVE"),
    "tens": ("TWENTY", "THIRTY", "FORTY", "FIFTY"),
    "day": ("<ordinal>", "<ordinal>", "<ordinal>", "TWENTY <ordinal>", "<late>"),
    "ordinal": (
        "FIRST", "SECOND", "THIRD", "FOURTH", "FIFTH", "SIXTH", "SEVENTH", "EIGHTH", "NINTH",
    ),
    "late": ("TENTH", "ELEVENTH", "TWELFTH"),
    "month": (
        "JANUARY", "FEBRUARY", "MARCH", "APRIL", "MAY", "JUNE",
        "JULY", "AUGUST", "SEPTEMBER", "OCTOBER", "NOVEMBER", "DECEMBER",
    ),
}


def expand(name: str, rng: random.Random) -> str:
    """One random alternative of GRAMMAR[name], every <name> in it expanded likewise."""
    return re.sub(r"<(\w+)>", lambda inner: expand(inner[1], rng), rng.choice(GRAMMAR[name]))


def is_held_out(text: str) -> bool:
    """True for the fifth of all sentences that only the dev split may say.

    A property of the sentence itself, so that the splits are disjoint whatever their sizes.
    """
    return zlib.crc32(text.encode()) % 5 == 0


def draw_train_sentences(count: int, rng: random.Random) -> list[str]:
    """`count` sentences of the training split, repeats allowed: several voices say the same."""
    sentences = []
    while len(sentences) < count:
        text = expand("sentence", rng)
        if not is_held_out(text):
            sentences.append(text)
    return sentences


def draw_dev_sentences(count: int, known_words: set[str], rng: random.Random) -> list[str]:
    """`count` different held-out sentences in which every word is one of `known_words`.

    Raises:
        ValueError: too few such sentences among 1000 draws for each one wanted.
    """
    sentences: dict[str, None] = {}  # a set that keeps the order of drawing
    for _ in range(1000 * count):
        text = expand("sentence", rng)
        if is_held_out(text) and known_words.issuperset(text.split()):
            sentences[text] = None
        if len(sentences) == count:
            return list(sentences)
    raise ValueError(
        f"{len(known_words)} training words give {len(sentences)} dev sentences, wanted {count}: "
        "more training utterances have more words"
    )


# ------------------------------------------------------------------------------- demo: who says it

# Accents are files in espeak-ng-data/lang, variants in espeak-ng-data/voices/!v. A variant is a
# vocal tract (formants, base pitch, breath); left out are those that whisper, croak or distort.
ACCENTS = (
    "gmw/en", "gmw/en-US", "gmw/en-GB-scotland", "gmw/en-US-nyc",
    "gmw/en-GB-x-rp", "gmw/en-029", "gmw/en-GB-x-gbclan", "gmw/en-GB-x-gbcwmd",
)
TRAIN_VARIANTS = (
    "m1", "m2", "m3", "m5", "m6", "m7", "Mike", "rob",
    "robert", "f2", "f3", "f5", "Annie", "linda", "grandma", "shelby",
)
DEV_VARIANTS = ("m4", "max", "f1", "f4")  # vocal tracts that training never hears
RATE_WPM = (155, 190)  # of a voice, in espeak-ng's words per minute; 175 is its default
PITCH = (30, 70)  # of a voice, relative to the variant's own pitch, which is 50
PITCH_RANGE = (35, 65)  # of a voice, likewise: how lively it is


class Voice(NamedTuple):
    """A speaker: an espeak-ng voice with its usual way of speaking."""

    speaker: int
    name: str  # "accent+variant"
    rate_wpm: int
    pitch: int
    pitch_range: int


class Line(NamedTuple):
    """One utterance to be spoken."""

    split: str
    id: str
    voice: Voice
    text: str


def draw_voices(variants: Sequence[str], step: int, first: int, rng: random.Random) -> list[Voice]:
    """Every variant with every `step`-th accent, numbered from `first`.

    The accents start one later for each variant, so that both splits hear all of them.
    """
    names = [
        f"{accent}+{variant}"
        for i, variant in enumerate(variants)
        for accent in ACCENTS[i % step :: step]
    ]
    return [
        Voice(speaker, name, *(rng.randint(*bounds) for bounds in (RATE_WPM, PITCH, PITCH_RANGE)))
        for speaker, name in enumerate(names, start=first)
    ]


def assign_lines(split: str, voices: Sequence[Voice], sentences: Sequence[str]) -> list[Line]:
    """Deal out the sentences to the voices like cards. A voice has one chapter, numbered 1."""
    lines = []
    for i, text in enumerate(sentences):
        number, turn = divmod(i, len(voices))
        voice = voices[turn]
        lines.append(Line(split, f"{voice.speaker}-1-{number:04d}", voice, text))
    return lines


def plan_demo(num_train: int, num_dev: int, seed: int) -> list[Line]:
    """Everything that the demo corpus says, and who says it."""
    rng = random.Random(seed)
    train_voices = draw_voices(TRAIN_VARIANTS, 2, 101, rng)
    dev_voices = draw_voices(DEV_VARIANTS, 4, 201, rng)
    train = draw_train_sentences(num_train, rng)
    dev = draw_dev_sentences(num_dev, set(" ".join(train).split()), rng)
    return [
        *assign_lines("train-demo", train_voices, train),
        *assign_lines("dev-demo", dev_voices, dev),
    ]


# ----------------------------------------------------------------------------- demo: how it sounds

SAMPLE_RATE_HZ = 16000
PEAK_DBFS = (-14.0, -2.0)  # of an utterance before noise: near and far from the microphone
NOISE_DB = (-40.0, -20.0)  # noise below speech, both as root mean square
PAUSE_S = (0.10, 0.20)  # before and after the words


class Espeak:
    """libespeak-ng in this process, through the C interface in its `speak_lib.h`.

    Args:
        scratch: an empty folder that outlives this object. It takes a copy of the library, because
            the synthesiser keeps state from one text to the next (the phase of its vibrato) that
            only loading clears, and two corpora made in one process have to be alike. And it takes
            a link to the voices, because the library finds none by a path of 160 bytes or more.
    Raises:
        ModuleNotFoundError: the package that brings the library is not installed.
        RuntimeError: the library or its voices cannot be loaded.
    """

    # Values of the enumerations in speak_lib.h.
    SYNCHRONOUS, DONT_EXIT = 2, 0x8000  # espeak_Synth returns when all is said, on this thread
    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4
    POS_CHARACTER, CHARS_UTF8 = 1, 1
    HALF_VOLUME = 50  # at 100, the default, some variants reach the limits of int16

    def __init__(self, scratch: Path) -> None:
        try:
            import espeakng_loader
        except ModuleNotFoundError as error:
            message = "espeak-ng speaks the demo corpus: pip install espeakng-loader"
            raise ModuleNotFoundError(message) from error
        library = shutil.copy(espeakng_loader.get_library_path(), scratch)
        voices = scratch / "espeak-ng-data"
        voices.symlink_to(espeakng_loader.get_data_path())
        self._lib = ctypes.CDLL(library)
        self._lib.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self._lib.espeak_Synth.argtypes = (
            [ctypes.c_char_p, ctypes.c_size_t] + [ctypes.c_uint] * 4 + [ctypes.c_void_p] * 2
        )
        self.sample_rate_hz = self._lib.espeak_Initialize(
            self.SYNCHRONOUS, 0, bytes(voices), self.DONT_EXIT
        )
        if self.sample_rate_hz <= 0:
            raise RuntimeError(f"{library}: espeak_Initialize found no voices in {voices}")
        self._chunks: list[bytes] = []
        callback_type = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
        )
        # The library keeps only a pointer: without this reference Python would free the callback.
        self._callback = callback_type(self._collect)
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, address: int | None, count: int, _events: int | None) -> int:
        if address is not None:  # a null pointer ends the utterance
            self._chunks.append(ctypes.string_at(address, count * np.dtype(np.int16).itemsize))
        return 0  # go on

    def say(self, text: str, voice: Voice, seed: int) -> np.ndarray:
        """Speak.

        Args:
            seed: for the breath of the voice; espeak-ng would take the time of day.
        Returns:
            float32 samples in [-1, 1) at `sample_rate_hz`, pauses at neither end.
        """
        if self._lib.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice.name}")
        self._lib.espeak_ng_SetRandSeed(seed)
        for parameter, value in (
            (self.RATE, voice.rate_wpm),
            (self.VOLUME, self.HALF_VOLUME),
            (self.PITCH, voice.pitch),
            (self.RANGE, voice.pitch_range),
        ):
            self._lib.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        spoken = text.lower().encode()  # it would stress TO in capitals
        status = self._lib.espeak_Synth(
            spoken, len(spoken) + 1, 0, self.POS_CHARACTER, 0, self.CHARS_UTF8, None, None
        )
        if status != 0 or not self._chunks:
            raise RuntimeError(f"espeak_Synth failed with status {status}: {voice.name}: {text}")
        return np.frombuffer(b"".join(self._chunks), np.int16).astype(np.float32) / 2**15


def vary(voice: Voice, rng: random.Random) -> Voice:
    """The same speaker, a little faster or higher: nobody says two sentences exactly alike."""
    return voice._replace(
        rate_wpm=round(voice.rate_wpm * rng.uniform(0.94, 1.06)),
        pitch=voice.pitch + rng.randint(-4, 4),
    )


def record(speech: np.ndarray, rng: random.Random) -> np.ndarray:
    """Put speech into a room: a random level, pauses around it, white noise under all of it.

    Args:
        speech: float32 samples at SAMPLE_RATE_HZ, any level but silence.
    Returns:
        int16 samples. They cannot clip: the peak of the noise is at most 1.8 times its RMS, which
        is at most a tenth of the RMS of the speech.
    """
    before, after = (round(rng.uniform(*PAUSE_S) * SAMPLE_RATE_HZ) for _ in range(2))
    peak = 10 ** (rng.uniform(*PEAK_DBFS) / 20)
    speech = speech * (peak / np.abs(speech).max())
    noise_rms = np.sqrt(np.mean(speech**2)) * 10 ** (rng.uniform(*NOISE_DB) / 20)
    samples = np.pad(speech, (before, after))
    noise = np.frombuffer(rng.randbytes(len(samples)), np.int8) / 2**7  # even in [-1, 1)
    samples = samples + noise * (noise_rms * np.sqrt(3))  # the RMS of such noise is 1 / sqrt(3)
    return np.rint(samples * 2**15).astype(np.int16)


def write_demo(folder: Path, lines: Sequence[Line], seed: int) -> float:
    """Speak all lines into `folder`, which has to be empty; returns the hours of audio."""
    rng = random.Random(seed)
    num_samples = 0
    with tempfile.TemporaryDirectory() as scratch:
        espeak = Espeak(Path(scratch))
        for line in tqdm(lines, desc="speaking", unit="utterance", disable=None, leave=False):
            speech = espeak.say(line.text, vary(line.voice, rng), rng.getrandbits(31))
            speech = soxr.resample(speech, espeak.sample_rate_hz, SAMPLE_RATE_HZ)
            samples = record(speech, rng)
            num_samples += len(samples)
            chapter = line.id.rpartition("-")[0]
            path = folder / line.split / chapter.replace("-", "/") / f"{line.id}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, samples, SAMPLE_RATE_HZ)
            with open(path.with_name(f"{chapter}.trans.txt"), "a", encoding="utf-8") as transcript:
                transcript.write(f"{line.id} {line.text}\n")
    return num_samples / SAMPLE_RATE_HZ / 3600


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here. Killed processes do not hold the lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def make_demo(
    root: Path,
    num_train: int = DEMO_TRAIN_UTTERANCES,
    num_dev: int = DEMO_DEV_UTTERANCES,
    seed: int = DEMO_SEED,
) -> None:
    """Write the demo corpus to `root`; nothing to do if it is there.

    Same sizes, seed and package versions give the same bytes. What an interrupted call has left is
    made again.

    Raises:
        FileExistsError: `root` holds something else.
    """
    recipe = f"demo recipe {DEMO_RECIPE}, {num_train} + {num_dev} utterances, seed {seed}\n"
    recipe_file, unfinished = root / "recipe.txt", root / ".unfinished"
    start = time.perf_counter()
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        if not unfinished.exists():
            if recipe_file.is_file() and recipe_file.read_text(encoding="utf-8") == recipe:
                print(f"{root}: is there already: {recipe}", end="")
                return
            if any(root.iterdir()):
                raise FileExistsError(
                    f"{root}: holds something other than {recipe.strip()}; choose another folder"
                )
        lines = plan_demo(num_train, num_dev, seed)
        # Built inside of `root`, which may be a mount point. `unfinished` came to an empty folder
        # and goes last, so what stands beside it is an interrupted call's.
        recipe_file.unlink(missing_ok=True)
        for name in (*sorted({line.split for line in lines}), unfinished.name):
            shutil.rmtree(root / name, ignore_errors=True)
        unfinished.mkdir()
        hours = write_demo(unfinished, lines, seed)
        for folder in sorted(unfinished.iterdir()):
            folder.rename(root / folder.name)
        recipe_file.write_text(recipe, encoding="utf-8")
        unfinished.rmdir()
    print(f"{root}: {len(lines)} utterances, {hours:.2f} h, {time.perf_counter() - start:.0f} s")


# --------------------------------------------------------------- LibriSpeech: what is published

OPENSLR = "https://www.openslr.org/resources"  # redirects to a mirror


class Archive(NamedTuple):
    """A split as published: <OPENSLR>/<resource>/<split>.tar.gz with LibriSpeech/<split> in it."""

    resource: int
    num_bytes: int
    md5: str
    utterances: int


# MD5 of resource 12: librispeech.csv of NVIDIA/DeepLearningExamples (Jasper) and librispeech.py of
# PaddlePaddle/PaddleSpeech agree. Its sizes: url_checksums/librispeech.txt of tensorflow/datasets.
# MD5 of resource 31: its md5sum.txt in danpovey/openslr, the source of that site, since commit
# f56e651 (the archive was replaced in 2017), and mini_librispeech.py of PaddleSpeech. Its sizes:
# egs/mini_librispeech/s5/local/download_and_untar.sh of kaldi-asr/kaldi.
ARCHIVES = {
    "train-clean-5": Archive(31, 332954390, "5df7d4e78065366204ca6845bb08f490", 1519),
    "dev-clean-2": Archive(31, 126046265, "6d7ab67ac6a1d2c993d050e16d61080d", 1089),
    "train-clean-100": Archive(12, 6387309499, "2a93770f6d5c6c964bc36631d331a522", 28539),
    "train-clean-360": Archive(12, 23049477885, "c0e676e450a7ff2f54aeade5171606fa", 104014),
    "train-other-500": Archive(12, 30593501606, "d1a0fd59409feb2c614ce4d30c387708", 148688),
    "dev-clean": Archive(12, 337926286, "42e2234ba48799c1f50f24a7926300a1", 2703),
    "dev-other": Archive(12, 314305928, "c8d0bcc9cca99d4f8b62fcc847357931", 2864),
    "test-clean": Archive(12, 346663984, "32fa31d27d2e1cad72775fee3f4849a9", 2620),
    "test-other": Archive(12, 328757843, "fb5a50374b501bb3bac4815ee91d3135", 2939),
}
CORPORA = {
    "mini-librispeech": ("train-clean-5", "dev-clean-2"),
    "librispeech-100": ("train-clean-100", "dev-clean", "test-clean"),
    "librispeech-960": (
        "train-clean-100", "train-clean-360", "train-other-500",
        "dev-clean", "dev-other", "test-clean", "test-other",
    ),
}


# ----------------------------------------------------------------------- LibriSpeech: download it

CHUNK_BYTES = 2**20
TIMEOUT_S = 60  # without a single byte
ATTEMPTS = 20  # of one file, in one call
FIRST_WAIT_S, LONGEST_WAIT_S = 2, 60  # before the next attempt: doubles each time
LOG_INTERVAL_S = 30


class LogLines:
    """Where tqdm writes if there is no terminal: each state of its bar becomes a line."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(what: str, num_bytes: int, done: int = 0) -> tqdm:
    """A bar with rate and remaining time; in a log a line now and then.

    Args:
        done: how many of the `num_bytes` an earlier call has done.
    """
    style = {"desc": what, "total": num_bytes, "initial": done, "unit": "B", "unit_scale": True}
    if not sys.stderr.isatty():
        line = "{desc}: {percentage:.0f} % of {total_fmt}B, {rate_fmt}, {remaining} left"
        style |= {"file": LogLines(), "mininterval": LOG_INTERVAL_S, "bar_format": line}
    return tqdm(**style)


def first_byte(url: str, response: http.client.HTTPResponse, start: int, num_bytes: int) -> int:
    """Where in the file the response begins: `start`, or 0 from a server that knows no ranges.

    Raises:
        ValueError: the response announces other bytes than `num_bytes` in all.
    """
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        name, expected = "Content-Range", f"bytes {start}-{num_bytes - 1}/{num_bytes}"
        found = response.headers[name]
    else:
        start, name, expected = 0, "Content-Length", str(num_bytes)
        found = response.headers.get(name, expected)  # may be left out
    if found != expected:
        raise ValueError(f"{url}: {name} is {found!r}, expected {expected!r}")
    return start


def receive(url: str, start: int, num_bytes: int) -> Iterator[tuple[int, bytes]]:
    """One request for the bytes from `start` on; yields (position in the file, some bytes).

    Raises:
        ConnectionError: something that may be better at the next attempt.
        ValueError: something that will not.
    """
    # Some servers refuse the name that urllib gives itself.
    headers = {"Range": f"bytes={start}-", "User-Agent": "rnnt-cpu"}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            position = first_byte(url, response, start, num_bytes)
            # read1 gives what has arrived; read would lose it if the connection broke.
            while chunk := response.read1(min(CHUNK_BYTES, num_bytes - position)):
                yield position, chunk
                position += len(chunk)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code < 500 and error.code not in (408, 429):  # timeout, too many requests
            raise ValueError(f"{url}: {error}") from error
        raise ConnectionError(str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(str(error) or type(error).__name__) from error
    if position < num_bytes:
        raise ConnectionError(f"connection closed after byte {position:,} of {num_bytes:,}")


def download(url: str, path: Path, num_bytes: int) -> None:
    """Append to `path` what it lacks of the `num_bytes` at `url`.

    Raises:
        ConnectionError: the last attempt failed; what has arrived stays for the next call.
    """
    path.touch()
    done = path.stat().st_size
    with open(path, "r+b") as file, progress(f"download {path.name}", num_bytes, done) as bar:
        for attempt in range(1, ATTEMPTS + 1):
            if file.seek(0, os.SEEK_END) >= num_bytes:
                return
            try:
                for position, chunk in receive(url, file.tell(), num_bytes):
                    if position < file.tell():
                        file.truncate(file.seek(position))
                    file.write(chunk)
                    bar.update(file.tell() - bar.n)
            except ConnectionError as error:
                problem = f"{url}: {error}; attempt {attempt} of {ATTEMPTS}"
                if attempt == ATTEMPTS:
                    raise ConnectionError(f"{problem}; call again to go on") from error
                wait_s = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S)
                tqdm.write(f"{problem}, next in {wait_s} s", file=sys.stderr)
                time.sleep(wait_s)


def verify(path: Path, archive: Archive) -> None:
    """Raise ValueError unless the file has the published size and MD5."""
    size = path.stat().st_size
    if size != archive.num_bytes:
        raise ValueError(f"{path}: {size:,} bytes, expected {archive.num_bytes:,}")
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, progress(f"verify {path.name}", size) as bar:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != archive.md5:
        raise ValueError(f"{path}: MD5 is {digest.hexdigest()}, expected {archive.md5}")


# ------------------------------------------------------------------------- LibriSpeech: unpack it

# What an utterance takes on the disk beyond its share of the archive: 8.3 kB of zeros in the FLAC
# header that gzip removes (dataset_size of openslr/librispeech_asr), half a block, its folders.
UNPACKED_BYTES = 2**14


def partial_path(root: Path, split: str) -> Path:
    """Where the archive of a split is while it is downloaded, verified and unpacked."""
    return root / f"{split}.tar.gz.partial"


def hidden_path(root: Path, split: str) -> Path:
    """Where a split is unpacked: on the disk of `root`, so that the last step is one rename."""
    return root / f".{split}.unpacking"


def check_space(root: Path, missing: Sequence[str], local: Mapping[str, Path]) -> None:
    """Raise OSError unless all `missing` splits fit, and beside them the largest archive."""
    needed = sum(ARCHIVES[s].num_bytes + UNPACKED_BYTES * ARCHIVES[s].utterances for s in missing)
    partials = {s: partial_path(root, s) for s in missing if s not in local}
    done = {s: path.stat().st_size for s, path in partials.items() if path.exists()}
    needed += max((ARCHIVES[s].num_bytes - done.get(s, 0) for s in partials), default=0)
    free = shutil.disk_usage(root).free
    if free < needed:
        sizes = f"{free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed"
        raise OSError(f"{root}: {sizes} for {', '.join(missing)}")


def count_utterances(folder: Path) -> int:
    """How many utterances of the split in `folder` have both a transcript and a FLAC file."""
    count = 0
    for transcript in folder.glob("*/*/*.trans.txt"):
        lines, _ = separate(read_transcripts(transcript))
        ids = {line.id for line in lines}
        count += len(ids & {path.stem for path in transcript.parent.glob("*.flac")})
    return count


def extract(members: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write a member below `folder` if it is a file. Only its name and its contents count.

    Raises:
        ValueError: the name leads out of the folder, or the member is a link or a device.
    """
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{members.name}: {member.name!r} leads out of the folder")
    if not member.isreg() and not member.isdir():
        raise ValueError(f"{members.name}: {member.name!r} is neither file nor folder")
    if member.isreg():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as copy:
            shutil.copyfileobj(members.extractfile(member), copy)


def unpack(archive: Path, root: Path, split: str) -> None:
    """Make `root`/`split` from its archive, whole or not at all; SPEAKERS.TXT etc. go to `root`."""
    hidden = hidden_path(root, split)
    hidden.mkdir()
    try:
        with (
            open(archive, "rb") as file,
            tarfile.open(archive, "r:gz", file) as members,
            progress(f"unpack {archive.name}", archive.stat().st_size) as bar,
        ):
            for member in members:
                extract(members, member, hidden)
                bar.update(file.tell() - bar.n)
        top = hidden / "LibriSpeech"
        found, expected = count_utterances(top / split), ARCHIVES[split].utterances
        if found != expected:
            raise ValueError(f"{archive}: {found:,} utterances, expected {expected:,}")
        for text in top.glob("*.TXT"):
            text.replace(root / text.name)
        (top / split).rename(root / split)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def find_missing(root: Path, splits: Sequence[str]) -> list[str]:
    """Those of the splits that are not in `root`.

    Raises:
        ValueError: one of the others is incomplete.
    """
    missing = []
    for split in splits:
        folder, expected = root / split, ARCHIVES[split].utterances
        if not folder.exists():
            missing.append(split)
        elif (found := count_utterances(folder)) != expected:
            sizes = f"{found:,} utterances, expected {expected:,}"
            raise ValueError(f"{folder}: {sizes}; remove it and call again")
    return missing


def match_archives(files: Sequence[Path], splits: Sequence[str]) -> dict[str, Path]:
    """The split that each local archive is for, told by its published name."""
    split_of = {f"{split}.tar.gz": split for split in splits}
    for path in files:
        if path.name not in split_of:
            raise ValueError(f"{path}: expected the name {' or '.join(split_of)}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    return {split_of[path.name]: path for path in files}


def fetch(root: Path, split: str, mirror: str) -> Path:
    """Download the archive of a split, or the rest of it; what has a wrong MD5 is removed."""
    path, archive = partial_path(root, split), ARCHIVES[split]
    download(f"{mirror.rstrip('/')}/{archive.resource}/{split}.tar.gz", path, archive.num_bytes)
    try:
        verify(path, archive)
    except ValueError:
        path.unlink()
        raise
    return path


def make_librispeech(root: Path, corpus: str, mirror: str, files: Sequence[Path]) -> None:
    """Put those splits of a corpus into `root` that are not there yet.

    Args:
        mirror: URL of OPENSLR or a copy of it.
        files: archives to take instead of downloading; unlike downloaded ones they are kept.
    """
    local = match_archives(files, CORPORA[corpus])
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        missing = find_missing(root, CORPORA[corpus])
        if files and (lacking := [f"{split}.tar.gz" for split in missing if split not in local]):
            raise ValueError(f"--archive lacks {', '.join(lacking)}")
        for split in missing:  # what a call that was killed has left
            shutil.rmtree(hidden_path(root, split), ignore_errors=True)
        if missing:
            check_space(root, missing, local)
        for split in missing:
            if split in local:
                verify(local[split], ARCHIVES[split])
                unpack(local[split], root, split)
            else:
                archive = fetch(root, split, mirror)
                unpack(archive, root, split)
                archive.unlink()
    count = sum(ARCHIVES[split].utterances for split in CORPORA[corpus])
    print(f"{root}: {corpus} is complete, {count:,} utterances")


# ------------------------------------------------------------------------------------------- check


def find_splits(root: Path) -> list[str]:
    """Names of the folders in `root` that hold a transcript or audio where LibriSpeech has them."""
    return sorted({path.parents[2].name for path in root.glob("*/*/*/*")
                   if is_audio(path.name) or is_transcript(path.name)})


def check(root: Path, splits: Sequence[str]) -> bool:
    """Print size and problems of the splits, all in `root` if none is named; True if no error."""
    splits = splits or find_splits(root)
    if not splits:
        raise FileNotFoundError(f"{root}: no audio in it as <split>/<speaker>/<chapter>/*.flac")
    error_found = False
    for split in splits:
        utterances, problems = separate(scan_split(root, split, decode=True))
        words = [word for utterance in utterances for word in utterance.text.split()]
        hours = sum(utterance.duration_s for utterance in utterances) / 3600
        speakers = {utterance.id.split("-")[0] for utterance in utterances}
        print(
            f"{split}: {len(utterances)} utterances, {hours:.2f} h, {len(words)} words, "
            f"{len(set(words))} distinct words, {len(speakers)} speakers"
        )
        for line in describe(problems):
            print(f"  {line}")
        error_found = error_found or any(problem.level == "error" for problem in problems)
    return not error_found


# ------------------------------------------------------------------------------------ command line


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """One subcommand for each thing this file does."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser("demo", help="speak the demo corpus", allow_abbrev=False)
    demo.add_argument("root", metavar="ROOT", type=Path, help="new folder")
    for corpus, splits in CORPORA.items():
        libri = commands.add_parser(corpus, help=", ".join(splits), allow_abbrev=False)
        libri.add_argument("root", metavar="ROOT", type=Path, help="folder of the splits")
        source = libri.add_mutually_exclusive_group()
        source.add_argument("--mirror", metavar="URL", default=OPENSLR, help="%(default)s")
        source.add_argument("--archive", metavar="FILE", type=Path, nargs="+", default=[],
                            help="downloaded elsewhere: <split>.tar.gz of every split")
    checks = commands.add_parser("check", help="find what is wrong", allow_abbrev=False)
    checks.add_argument("root", metavar="ROOT", type=Path, help="folder of the splits")
    checks.add_argument("splits", metavar="SPLIT", nargs="*", help="all in ROOT if none is given")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the subcommand in `words`, the command line if None; returns the exit status."""
    args = parse_arguments(words)
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        if args.command == "check":
            return 0 if check(args.root, args.splits) else 1
        if args.command == "demo":
            make_demo(args.root)
        else:
            make_librispeech(args.root, args.command, args.mirror, args.archive)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
