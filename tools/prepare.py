# SPDX-License-Identifier: Apache-2.0
"""Prepares corpora: speaks the demo, downloads LibriSpeech, imports other forms, checks any corpus.

    python -m tools.prepare demo ROOT                 # splits train-demo and dev-demo, by espeak-ng
    python -m tools.prepare mini-librispeech ROOT     # or librispeech-100, librispeech-960
    python -m tools.prepare import SOURCE ROOT SPLIT  # NeMo's, Common Voice's or Kaldi's form
    python -m tools.prepare check ROOT [SPLIT ...]    # exit status 1 if there is an error

After an interruption the same command continues. From a mirror, or without internet:
    python -m tools.prepare mini-librispeech ROOT --mirror https://openslr.elda.org/resources
    python -m tools.prepare mini-librispeech ROOT --archive train-clean-5.tar.gz dev-clean-2.tar.gz

Every corpus has LibriSpeech's form (Panayotov et al. 2015, doi:10.1109/ICASSP.2015.7178964):
    <ROOT>/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac    16 kHz, mono, int16
    <ROOT>/<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt        lines `ID TEXT`
The text is in capitals.
"""

import argparse
import ctypes
import fcntl
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import requests
import soundfile
import soxr
import urllib3
from tqdm import tqdm

from data import (
    describe,
    describe_layout,
    is_audio,
    is_transcript,
    read_transcripts,
    scan_split,
    separate,
)
from tools import corpora

# -------------------------------------------------------------------------------- demo: sentences

DEMO_RECIPE = 1  # must be raised if the same sizes and seed come to give other words or sounds
DEMO_TRAIN_UTTERANCES = 2000
DEMO_DEV_UTTERANCES = 100
DEMO_SEED = 1

# A context-free grammar: <name> stands for any alternative of that name; repeating an alternative
# makes it likelier. The numbers skip 13 to 19: THIRTEEN against THIRTY is hard even for people, and
# this corpus has to show within minutes whether training works.
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
    """Draw an alternative of GRAMMAR[name] and expand every <name> in it likewise."""
    return re.sub(r"<(\w+)>", lambda inner: expand(inner[1], rng), rng.choice(GRAMMAR[name]))


def is_held_out(text: str) -> bool:
    """Return True for the fifth of all sentences that only the dev split may say."""
    return zlib.crc32(text.encode()) % 5 == 0


def draw_train_sentences(count: int, rng: random.Random) -> list[str]:
    """Draw `count` training sentences; they may repeat, so that several voices say the same."""
    sentences = []
    while len(sentences) < count:
        text = expand("sentence", rng)
        if not is_held_out(text):
            sentences.append(text)
    return sentences


def draw_dev_sentences(count: int, known_words: set[str], rng: random.Random) -> list[str]:
    """Draw `count` different held-out sentences that have only words of `known_words`."""
    sentences: dict[str, None] = {}  # keys are a set in the order of drawing
    while len(sentences) < count:
        text = expand("sentence", rng)
        if is_held_out(text) and known_words.issuperset(text.split()):
            sentences[text] = None
    return list(sentences)


# --------------------------------------------------------------------------------- demo: speakers

# Accents are files in espeak-ng-data/lang, variants in espeak-ng-data/voices/!v. A variant is a
# vocal tract (formants, base pitch, breath). Variants that whisper, croak or distort are left out.
ACCENTS = (
    "gmw/en", "gmw/en-US", "gmw/en-GB-scotland", "gmw/en-US-nyc",
    "gmw/en-GB-x-rp", "gmw/en-029", "gmw/en-GB-x-gbclan", "gmw/en-GB-x-gbcwmd",
)
TRAIN_VARIANTS = (
    "m1", "m2", "m3", "m5", "m6", "m7", "Mike", "rob",
    "robert", "f2", "f3", "f5", "Annie", "linda", "grandma", "shelby",
)
DEV_VARIANTS = ("m4", "max", "f1", "f4")  # vocal tracts that training never hears
# Each voice draws its values between these limits, in espeak-ng's units.
RATE_WPM = (155, 190)  # words per minute; espeak-ng's default is 175
PITCH = (30, 70)  # 50 is the variant's own pitch
PITCH_RANGE = (35, 65)  # 50 is the variant's own range; a wider one sounds livelier


class Voice(NamedTuple):
    """A speaker: an espeak-ng voice with a usual rate and pitch."""

    speaker: int
    name: str  # "accent+variant"
    rate_wpm: int
    pitch: int
    pitch_range: int


class Prompt(NamedTuple):
    """An utterance before it is spoken."""

    split: str
    id: str
    voice: Voice
    text: str


def draw_voices(variants: Sequence[str], accent_step: int, first_speaker: int,
                rng: random.Random) -> list[Voice]:
    """Combine every variant with every `accent_step`-th accent, each from another one on."""
    names = [f"{accent}+{variant}" for i, variant in enumerate(variants)
             for accent in ACCENTS[i % accent_step :: accent_step]]
    return [Voice(speaker, name, rng.randint(*RATE_WPM), rng.randint(*PITCH),
                  rng.randint(*PITCH_RANGE))
            for speaker, name in enumerate(names, start=first_speaker)]


def assign_prompts(split: str, voices: Sequence[Voice], sentences: Sequence[str]) -> list[Prompt]:
    """Give the sentences to the voices in turn. A voice has one chapter, numbered 1."""
    prompts = []
    for i, text in enumerate(sentences):
        number, turn = divmod(i, len(voices))
        voice = voices[turn]
        prompts.append(Prompt(split, f"{voice.speaker}-1-{number:04d}", voice, text))
    return prompts


def plan_demo(num_train: int, num_dev: int, seed: int) -> list[Prompt]:
    """Draw speakers and sentences of the demo corpus."""
    rng = random.Random(seed)
    train_voices = draw_voices(TRAIN_VARIANTS, 2, 101, rng)
    dev_voices = draw_voices(DEV_VARIANTS, 4, 201, rng)
    train = draw_train_sentences(num_train, rng)
    dev = draw_dev_sentences(num_dev, set(" ".join(train).split()), rng)
    return (assign_prompts("train-demo", train_voices, train)
            + assign_prompts("dev-demo", dev_voices, dev))


# ------------------------------------------------------------------------------------ demo: audio

SAMPLE_RATE_HZ = 16000
# Each utterance draws its values between these limits.
PEAK_DBFS = (-14.0, -2.0)  # peak of the speech without noise: far from and near the microphone
NOISE_DB = (-40.0, -20.0)  # level (RMS) of the noise, relative to that of the speech
PAUSE_S = (0.10, 0.20)  # before the first word and after the last


@contextmanager
def late_interrupts() -> Iterator[None]:
    """Handle Ctrl-C after the body: ctypes prints and drops an exception of a callback from C."""
    pending: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pending and callable(handler):  # a number stands for a signal that is ignored
        handler(signal.SIGINT, None)


class EspeakEvent(ctypes.Structure):
    """The espeak_EVENT of `speak_lib.h`."""

    _fields_ = [
        ("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_ms", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("name", ctypes.c_char * 8),
    ]


class Espeak:
    """The synthesiser libespeak-ng, through the C interface in its `speak_lib.h`.

    `word_starts` has the first sample of each word of the last text, by the word's place in it.
    The library tells no place for a word that it speaks together with the one before.

    Args:
        scratch: an empty folder that outlives this object. It holds a copy of the library, because
            a loaded library keeps state from one text to the next (the phase of the vibrato), and
            two corpora made in one process have to be equal. It also holds a link to the voices,
            because the library does not find them below a path of 160 bytes or more.
    Raises:
        ModuleNotFoundError: the package espeakng-loader is not installed.
        RuntimeError: the library does not find its voices.
    """

    # speak_lib.h defines these values.
    SYNCHRONOUS, DONT_EXIT = 2, 0x8000  # espeak_Synth returns when it has spoken the whole text
    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4
    POS_CHARACTER, CHARS_UTF8 = 1, 1
    LIST_END, WORD = 0, 1  # types of events
    HALF_VOLUME = 50  # at the default of 100 some variants clip

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
        self._lib.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_uint] * 4, *[ctypes.c_void_p] * 2]
        self.sample_rate_hz = self._lib.espeak_Initialize(
            self.SYNCHRONOUS, 0, bytes(voices), self.DONT_EXIT)
        if self.sample_rate_hz <= 0:
            raise RuntimeError(f"{library}: espeak_Initialize found no voices in {voices}")
        self._chunks: list[bytes] = []
        self._words: list[tuple[int, int]] = []  # position in the text from 1 on, first sample
        self.word_starts: dict[int, int] = {}
        callback_type = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        # The library keeps only a pointer: without this reference Python would free the callback.
        self._callback = callback_type(self._collect)
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, address: int | None, num_samples: int, events: int) -> int:
        if address is not None:  # a null pointer ends the utterance
            num_bytes = num_samples * np.dtype(np.int16).itemsize
            self._chunks.append(ctypes.string_at(address, num_bytes))
        event = ctypes.cast(events, ctypes.POINTER(EspeakEvent))
        number = 0
        while event[number].type != self.LIST_END:
            if event[number].type == self.WORD:
                self._words.append((event[number].text_position, event[number].sample))
            number += 1
        return 0  # 1 would stop the synthesis

    def say(self, text: str, voice: Voice, seed: int) -> np.ndarray:
        """Speak a text: float32 samples at `sample_rate_hz`, without a pause at either end.

        The seed is that of the breath noise, which espeak-ng would draw from the time of day.
        """
        if self._lib.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice.name}")
        self._lib.espeak_ng_SetRandSeed(seed)
        for parameter, value in ((self.RATE, voice.rate_wpm), (self.VOLUME, self.HALF_VOLUME),
                                 (self.PITCH, voice.pitch), (self.RANGE, voice.pitch_range)):
            self._lib.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        self._words.clear()
        small_letters = text.lower().encode()  # espeak-ng stresses words in capitals
        with late_interrupts():
            status = self._lib.espeak_Synth(small_letters, len(small_letters) + 1, 0,
                                            self.POS_CHARACTER, 0, self.CHARS_UTF8, None, None)
        if status != 0 or not self._chunks:
            raise RuntimeError(f"espeak_Synth failed with status {status}: {voice.name}: {text}")
        self.word_starts = {text[: position - 1].count(" "): sample
                            for position, sample in self._words}
        return np.frombuffer(b"".join(self._chunks), np.int16).astype(np.float32) / 2**15


def vary(voice: Voice, rng: random.Random) -> Voice:
    """Change rate and pitch a little: nobody says two sentences exactly alike."""
    return voice._replace(rate_wpm=round(voice.rate_wpm * rng.uniform(0.94, 1.06)),
                          pitch=voice.pitch + rng.randint(-4, 4))


def record(speech: np.ndarray, rng: random.Random) -> np.ndarray:
    """Scale float32 speech to a random level, pad it with pauses and add white noise.

    The int16 samples do not clip: the peak of the noise is 1.8 times its RMS, which is at most a
    tenth of the RMS of the speech.
    """
    before, after = (round(rng.uniform(*PAUSE_S) * SAMPLE_RATE_HZ) for _ in range(2))
    peak = 10 ** (rng.uniform(*PEAK_DBFS) / 20)
    speech = speech * (peak / np.abs(speech).max())
    noise_rms = np.sqrt(np.mean(speech**2)) * 10 ** (rng.uniform(*NOISE_DB) / 20)
    samples = np.pad(speech, (before, after))
    noise = np.frombuffer(rng.randbytes(len(samples)), np.int8) / 2**7  # uniform in [-1, 1)
    samples = samples + noise * (noise_rms * np.sqrt(3))  # uniform noise has RMS 1 / sqrt(3)
    return np.rint(samples * 2**15).astype(np.int16)


def write_demo(folder: Path, prompts: Sequence[Prompt], seed: int) -> float:
    """Speak all prompts into `folder`, which has to be empty; returns the hours of audio."""
    rng = random.Random(seed)
    num_samples = 0
    with tempfile.TemporaryDirectory() as scratch:
        espeak = Espeak(Path(scratch))
        for prompt in tqdm(prompts, desc="speaking", unit="utterance", disable=None, leave=False):
            speech = espeak.say(prompt.text, vary(prompt.voice, rng), rng.getrandbits(31))
            speech = soxr.resample(speech, espeak.sample_rate_hz, SAMPLE_RATE_HZ)
            samples = record(speech, rng)
            num_samples += len(samples)
            chapter = prompt.id.rpartition("-")[0]
            path = folder / prompt.split / chapter.replace("-", "/") / f"{prompt.id}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, samples, SAMPLE_RATE_HZ)
            with open(path.with_name(f"{chapter}.trans.txt"), "a", encoding="utf-8") as transcript:
                transcript.write(f"{prompt.id} {prompt.text}\n")
    return num_samples / SAMPLE_RATE_HZ / 3600


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder, then hold it. A killed process releases its lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def make_demo(root: Path, num_train: int = DEMO_TRAIN_UTTERANCES,
              num_dev: int = DEMO_DEV_UTTERANCES, seed: int = DEMO_SEED) -> None:
    """Write the demo corpus to `root`, unless it is there.

    The same sizes, seed and package versions give the same bytes. The files of an interrupted call
    are replaced.

    Raises:
        FileExistsError: `root` holds another corpus or other files.
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
                raise FileExistsError(f"{root}: holds something other than {recipe.strip()}; "
                                      "choose another folder")
        prompts = plan_demo(num_train, num_dev, seed)
        # The corpus is built inside of `root`, which may be a mount point. Each call creates
        # `unfinished` in an empty folder and removes it at the end: the files that stand beside it
        # come from an interrupted call.
        recipe_file.unlink(missing_ok=True)
        for name in (*sorted({prompt.split for prompt in prompts}), unfinished.name):
            shutil.rmtree(root / name, ignore_errors=True)
        unfinished.mkdir()
        hours = write_demo(unfinished, prompts, seed)
        for folder in sorted(unfinished.iterdir()):
            folder.rename(root / folder.name)
        recipe_file.write_text(recipe, encoding="utf-8")
        unfinished.rmdir()
    print(f"{root}: {len(prompts)} utterances, {hours:.2f} h, {time.perf_counter() - start:.0f} s")


# ------------------------------------------------------------------ LibriSpeech: published archives

OPENSLR = "https://www.openslr.org/resources"  # redirects to a mirror


class Archive(NamedTuple):
    """A split as it is published: <OPENSLR>/<resource>/<split>.tar.gz has LibriSpeech/<split>."""

    resource: int
    num_bytes: int
    md5: str
    utterances: int


# Resource 12: librispeech.csv of NVIDIA/DeepLearningExamples (Jasper) and librispeech.py of
# PaddlePaddle/PaddleSpeech agree on the MD5; the sizes are in url_checksums/librispeech.txt of
# tensorflow/datasets. Resource 31: md5sum.txt of danpovey/openslr (the source of that site, since
# commit f56e651) and mini_librispeech.py of PaddleSpeech agree on the MD5; the sizes are in
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


# ------------------------------------------------------------------------- LibriSpeech: downloading

CHUNK_BYTES = 2**20
TIMEOUT_S = 60  # a server that sends no byte for so long is asked again
ATTEMPTS = 20  # failed requests for one file, in one call
LONGEST_WAIT_S = 60  # before the next request; the wait doubles from 2 s
LOG_INTERVAL_S = 30


class LogLines:
    """A file for tqdm that makes a line of stderr of every state of a bar."""

    def write(self, text: str) -> None:
        if state := text.strip():  # tqdm begins with a carriage return
            print(state, file=sys.stderr, flush=True)


def progress(stream: BinaryIO, method: str, label: str, num_bytes: int,
             start: int = 0) -> AbstractContextManager[BinaryIO]:
    """Wrap a stream so that a tqdm bar counts, from `start`, the bytes that its "read" or "write"
    moves. A log, unlike a terminal, gets a line every LOG_INTERVAL_S."""
    is_log = not sys.stderr.isatty()
    return tqdm.wrapattr(stream, method, num_bytes, bytes=False, desc=label, initial=start,
                         unit="B", unit_scale=True, file=LogLines() if is_log else sys.stderr,
                         mininterval=LOG_INTERVAL_S if is_log else 0.1, maxinterval=LOG_INTERVAL_S)


def request_rest(url: str, path: Path, num_bytes: int) -> None:
    """Request the bytes that `path` lacks and append them.

    A server that does not know ranges sends the whole file, which then replaces `path`.

    Raises:
        requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError: the next request
            may succeed; `path` keeps every byte that arrived.
        requests.HTTPError: the server refuses the request.
        ValueError: the server announces a size other than `num_bytes`.
    """
    start = path.stat().st_size
    headers = {"Range": f"bytes={start}-", "User-Agent": "rnnt-cpu"}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise requests.ConnectionError(f"HTTP status {response.status_code} {response.reason}")
        response.raise_for_status()
        name, expected = "Content-Range", f"bytes {start}-{num_bytes - 1}/{num_bytes}"
        if response.status_code != requests.codes.partial_content:
            start, name, expected = 0, "Content-Length", str(num_bytes)
        announced = response.headers.get(name, expected)  # servers may leave it out
        if announced != expected:
            raise ValueError(f"{url}: {name} is {announced!r}, expected {expected!r}")
        with (
            open(path, "ab" if start else "wb") as file,
            progress(file, "write", f"download {path.name}", num_bytes, start) as counted,
        ):
            # `raw` does not decode: some servers call a .tar.gz a gzip-encoded .tar. `read1`
            # returns what has arrived; `read` would lose it when the connection breaks.
            while chunk := response.raw.read1(min(CHUNK_BYTES, num_bytes - start)):
                counted.write(chunk)
                start += len(chunk)
    if start < num_bytes:
        raise requests.ConnectionError(f"connection closed after byte {start:,} of {num_bytes:,}")


def download(url: str, path: Path, num_bytes: int) -> None:
    """Append to `path` the bytes that it lacks of the `num_bytes` at `url`.

    Raises:
        ConnectionError: the last attempt failed; the next call continues `path`.
        requests.HTTPError, ValueError: as of `request_rest`, without another attempt.
    """
    path.touch()
    attempt = 0
    while path.stat().st_size < num_bytes:
        try:
            request_rest(url, path, num_bytes)
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            attempt += 1
            problem = f"{url}: {error.args[0]}; attempt {attempt} of {ATTEMPTS}"
            if attempt == ATTEMPTS:
                raise ConnectionError(f"{problem}; call again to continue") from error
            wait_s = min(2**attempt, LONGEST_WAIT_S)
            print(f"{problem}, next in {wait_s} s", file=sys.stderr, flush=True)
            time.sleep(wait_s)


def verify(path: Path, archive: Archive) -> None:
    """Raise ValueError if the file does not have the published size and MD5."""
    size = path.stat().st_size
    if size != archive.num_bytes:
        raise ValueError(f"{path}: {size:,} bytes, expected {archive.num_bytes:,}")
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, progress(file, "read", f"verify {path.name}", size) as counted:
        while chunk := counted.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != archive.md5:
        raise ValueError(f"{path}: MD5 is {digest.hexdigest()}, expected {archive.md5}")


# -------------------------------------------------------------------------- LibriSpeech: unpacking

# An unpacked utterance takes this much more than its share of the archive: 8.3 kB of zeros in the
# FLAC header, which gzip compresses to nothing (dataset_size of openslr/librispeech_asr), half a
# block of the file system and a share of the folders.
UNPACKED_BYTES = 2**14


def partial_path(root: Path, split: str) -> Path:
    """Return the path of an archive while it is downloaded, verified and unpacked."""
    return root / f"{split}.tar.gz.partial"


def check_space(root: Path, missing: Sequence[str], local: Mapping[str, Path]) -> None:
    """Raise OSError if the disk cannot hold all `missing` splits and the largest archive."""
    needed = sum(ARCHIVES[s].num_bytes + UNPACKED_BYTES * ARCHIVES[s].utterances for s in missing)
    partials = {s: partial_path(root, s) for s in missing if s not in local}
    done = {s: path.stat().st_size for s, path in partials.items() if path.exists()}
    needed += max((ARCHIVES[s].num_bytes - done.get(s, 0) for s in partials), default=0)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(f"{root}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for "
                      f"{', '.join(missing)}")


def count_utterances(folder: Path) -> int:
    """Count the utterances in the split `folder` that have a transcript and a FLAC file."""
    count = 0
    for transcript in folder.glob("*/*/*.trans.txt"):
        lines, _ = separate(read_transcripts(transcript))
        ids = {line.id for line in lines}
        count += len(ids & {path.stem for path in transcript.parent.glob("*.flac")})
    return count


def unpack(archive: Path, root: Path, split: str) -> None:
    """Unpack an archive to `root`/`split`, whole or not at all; SPEAKERS.TXT etc. go to `root`.

    Raises:
        ValueError: the archive lacks utterances, or tarfile's data filter refuses a member.
    """
    unpacking = root / f".{split}.unpacking"  # on the disk of `root`: the last step is one rename
    unpacking.mkdir()
    size = archive.stat().st_size
    try:
        with (
            open(archive, "rb") as file,
            progress(file, "read", f"unpack {archive.name}", size) as counted,
            tarfile.open(fileobj=counted, mode="r:gz") as members,
        ):
            members.extractall(unpacking, filter="data")
        top = unpacking / "LibriSpeech"
        found, expected = count_utterances(top / split), ARCHIVES[split].utterances
        if found != expected:
            raise ValueError(f"{archive}: {found:,} utterances, expected {expected:,}")
        for text in top.glob("*.TXT"):
            text.replace(root / text.name)
        (top / split).rename(root / split)
    except tarfile.TarError as error:
        raise ValueError(f"{archive}: {error}") from error
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def find_missing(root: Path, splits: Sequence[str]) -> list[str]:
    """List the splits that are not in `root`; raise ValueError if one is incomplete."""
    missing = []
    for split in splits:
        folder, expected = root / split, ARCHIVES[split].utterances
        if not folder.exists():
            missing.append(split)
        elif (found := count_utterances(folder)) != expected:
            raise ValueError(f"{folder}: {found:,} utterances, expected {expected:,}; remove it "
                             "and call again")
    return missing


def match_archives(files: Sequence[Path], splits: Sequence[str]) -> dict[str, Path]:
    """Map splits to local archives, which must have their published names, <split>.tar.gz."""
    split_of = {f"{split}.tar.gz": split for split in splits}
    for path in files:
        if path.name not in split_of:
            raise ValueError(f"{path}: expected the name {' or '.join(split_of)}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    return {split_of[path.name]: path for path in files}


def fetch(root: Path, split: str, mirror: str) -> Path:
    """Download what is missing of a split's archive; remove the file if its MD5 is wrong."""
    path, archive = partial_path(root, split), ARCHIVES[split]
    download(f"{mirror.rstrip('/')}/{archive.resource}/{split}.tar.gz", path, archive.num_bytes)
    try:
        verify(path, archive)
    except ValueError:
        path.unlink()
        raise
    return path


def make_librispeech(root: Path, corpus: str, mirror: str, files: Sequence[Path]) -> None:
    """Bring the missing splits of a corpus to `root`.

    They are downloaded from `mirror`, a copy of OPENSLR, unless there are local archives, `files`.
    Downloaded archives are removed, local ones are kept.
    """
    local = match_archives(files, CORPORA[corpus])
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError("unpacking needs Python 3.10.12, 3.11.4 or 3.12, or a later one: "
                           f"{sys.version.split()[0]} does not refuse members that lead outside")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        missing = find_missing(root, CORPORA[corpus])
        if files and (lacking := [f"{split}.tar.gz" for split in missing if split not in local]):
            raise ValueError(f"--archive lacks {', '.join(lacking)}")
        for abandoned in root.glob(".*.unpacking"):  # by a call that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
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
    """List the folders in `root` that have audio or a transcript at LibriSpeech's depth."""
    return sorted({path.parents[2].name for path in root.glob("*/*/*/*")
                   if is_audio(path.name) or is_transcript(path.name)})


def check(root: Path, splits: Sequence[str]) -> bool:
    """Print size and problems of the splits, or of all in `root`; returns True without errors."""
    splits = splits or find_splits(root)
    if not splits:
        raise FileNotFoundError(f"{root}: no audio in it as <split>/<speaker>/<chapter>/*.flac; "
                                f"{describe_layout(root)}")
    num_errors = 0
    for split in splits:
        utterances, problems = separate(scan_split(root, split, decode=True))
        words = [word for utterance in utterances for word in utterance.text.split()]
        hours = sum(utterance.duration_s for utterance in utterances) / 3600
        speakers = {utterance.id.split("-")[0] for utterance in utterances}
        print(f"{split}: {len(utterances)} utterances, {hours:.2f} h, {len(words)} words, "
              f"{len(set(words))} distinct words, {len(speakers)} speakers")
        for line in describe(problems):
            print(f"  {line}")
        num_errors += sum(problem.level == "error" for problem in problems)
    return num_errors == 0


# ------------------------------------------------------------------------------------ command line


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line: a subcommand for each corpus, and `check`."""
    parser = argparse.ArgumentParser(prog="python -m tools.prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser("demo", help="speak the demo corpus", allow_abbrev=False)
    demo.add_argument("root", metavar="ROOT", type=Path, help="new folder")
    for corpus, splits in CORPORA.items():
        libri = commands.add_parser(corpus, help=", ".join(splits), allow_abbrev=False)
        libri.add_argument("root", metavar="ROOT", type=Path, help="folder of the splits")
        source = libri.add_mutually_exclusive_group()
        source.add_argument("--mirror", metavar="URL", default=OPENSLR, help="%(default)s")
        source.add_argument("--archive", metavar="FILE", type=Path, nargs="+", default=[],
                            help="local files <split>.tar.gz of all splits, instead of downloading")
    imports = commands.add_parser("import", help="bring a corpus of another form into the tree",
                                  allow_abbrev=False)
    imports.add_argument("source", metavar="SOURCE", type=Path,
                         help="NeMo's JSON lines, Common Voice's .tsv or Kaldi's data folder")
    imports.add_argument("root", metavar="ROOT", type=Path, help="folder of the splits")
    imports.add_argument("split", metavar="SPLIT", help="name of the new split")
    imports.add_argument("--keep-case", action="store_true", help="do not write in capitals")
    imports.add_argument("--keep-punctuation", action="store_true",
                         help="do not turn punctuation and symbols into spaces")
    checks = commands.add_parser("check", help="list the problems of a corpus", allow_abbrev=False)
    checks.add_argument("root", metavar="ROOT", type=Path, help="folder of the splits")
    checks.add_argument("splits", metavar="SPLIT", nargs="*", help="default: all splits in ROOT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    args = parse_arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        if args.command == "check":
            return 0 if check(args.root, args.splits) else 1
        if args.command == "import":
            rule = corpora.TextRule(args.keep_case, args.keep_punctuation)
            args.root.mkdir(parents=True, exist_ok=True)
            with locked(args.root):
                is_whole = corpora.import_split(args.source, args.root, args.split, rule)
            return 0 if is_whole else 1
        if args.command == "demo":
            make_demo(args.root)
        else:
            make_librispeech(args.root, args.command, args.mirror, args.archive)
    except BrokenPipeError:
        raise  # tools/__init__.py ends the process
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"tools.prepare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
