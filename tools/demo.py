# SPDX-License-Identifier: Apache-2.0
"""The demo corpus: sentences of a small grammar, spoken by espeak-ng in many voices.

    make_demo(Path("data/demo"))  # or python -m tools.prepare demo data/demo
"""

import contextlib
import ctypes
import random
import re
import shutil
import signal
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from tools import locked

# -------------------------------------------------------------------------------------- sentences

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
    """Draws an alternative of GRAMMAR[name] and expands every <name> in it likewise."""
    return re.sub(r"<(\w+)>", lambda inner: expand(inner[1], rng), rng.choice(GRAMMAR[name]))


def is_held_out(text: str) -> bool:
    """Returns True for the fifth of all sentences that only the dev split may say."""
    return zlib.crc32(text.encode()) % 5 == 0


def draw_train_sentences(count: int, rng: random.Random) -> list[str]:
    """Draws `count` training sentences; they may repeat, so that several voices say the same."""
    sentences = []
    while len(sentences) < count:
        text = expand("sentence", rng)
        if not is_held_out(text):
            sentences.append(text)
    return sentences


def draw_dev_sentences(count: int, known_words: set[str], rng: random.Random) -> list[str]:
    """Draws `count` different held-out sentences that have only words of `known_words`."""
    sentences: dict[str, None] = {}  # keys are a set in the order of drawing
    while len(sentences) < count:
        text = expand("sentence", rng)
        if is_held_out(text) and known_words.issuperset(text.split()):
            sentences[text] = None
    return list(sentences)


# --------------------------------------------------------------------------------------- speakers

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
    """Combines variant i with every `accent_step`-th accent from accent i % accent_step on."""
    names = [f"{accent}+{variant}" for i, variant in enumerate(variants)
             for accent in ACCENTS[i % accent_step :: accent_step]]
    return [Voice(speaker, name, rng.randint(*RATE_WPM), rng.randint(*PITCH),
                  rng.randint(*PITCH_RANGE))
            for speaker, name in enumerate(names, start=first_speaker)]


def assign_prompts(split: str, voices: Sequence[Voice], sentences: Sequence[str]) -> list[Prompt]:
    """Gives the sentences to the voices in turn. A voice has one chapter, numbered 1."""
    prompts = []
    for i, text in enumerate(sentences):
        number, turn = divmod(i, len(voices))
        voice = voices[turn]
        prompts.append(Prompt(split, f"{voice.speaker}-1-{number:04d}", voice, text))
    return prompts


def plan_demo(num_train: int, num_dev: int, seed: int) -> list[Prompt]:
    """Draws speakers and sentences of the demo corpus."""
    rng = random.Random(seed)
    train_voices = draw_voices(TRAIN_VARIANTS, 2, 101, rng)
    dev_voices = draw_voices(DEV_VARIANTS, 4, 201, rng)
    train = draw_train_sentences(num_train, rng)
    dev = draw_dev_sentences(num_dev, set(" ".join(train).split()), rng)
    return (assign_prompts("train-demo", train_voices, train)
            + assign_prompts("dev-demo", dev_voices, dev))


# ------------------------------------------------------------------------------------------ audio

SAMPLE_RATE_HZ = 16000
# Each utterance draws its values between these limits.
PEAK_DBFS = (-14.0, -2.0)  # peak of the speech without noise: far from and near the microphone
NOISE_DB = (-40.0, -20.0)  # level (RMS) of the noise, relative to that of the speech
PAUSE_S = (0.10, 0.20)  # before the first word and after the last


@contextlib.contextmanager
def late_interrupts() -> Iterator[None]:
    """Handles Ctrl-C after the body: ctypes prints and drops an exception of a callback from C."""
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
        """Speaks a text: float32 samples at `sample_rate_hz`, without a pause at either end.

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
    """Changes rate and pitch a little: nobody says two sentences exactly alike."""
    return voice._replace(rate_wpm=round(voice.rate_wpm * rng.uniform(0.94, 1.06)),
                          pitch=voice.pitch + rng.randint(-4, 4))


def record(speech: np.ndarray, rng: random.Random) -> np.ndarray:
    """Scales float32 speech to a random level, pads it with pauses and adds white noise.

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
    """Speaks all prompts into `folder`, which has to be empty; returns the hours of audio."""
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


def make_demo(root: Path, num_train: int = DEMO_TRAIN_UTTERANCES,
              num_dev: int = DEMO_DEV_UTTERANCES, seed: int = DEMO_SEED) -> None:
    """Writes the demo corpus to `root`, unless it is there.

    The same sizes, seed and package versions give the same bytes. The files of an interrupted call
    are replaced.

    Raises:
        FileExistsError: `root` holds another corpus or other files.
    """
    recipe = f"demo recipe {DEMO_RECIPE}, {num_train} + {num_dev} utterances, seed {seed}\n"
    recipe_file, unfinished = root / "recipe.txt", root / ".unfinished"
    start = time.perf_counter()
    root.mkdir(parents=True, exist_ok=True)

    def is_complete() -> bool:
        return (not unfinished.exists() and recipe_file.is_file()
                and recipe_file.read_text(encoding="utf-8") == recipe)

    # A complete corpus may lie on a disk that nobody can write to.
    with contextlib.nullcontext() if is_complete() else locked(root):
        if is_complete():
            print(f"{root}: is there already: {recipe}", end="")
            return
        # A file system that was just made has a folder lost+found.
        others = {path.name for path in root.iterdir()} - {".lock", "lost+found"}
        if others and not unfinished.exists():
            raise FileExistsError(f"{root}: holds something other than {recipe.strip()}; choose "
                                  "another folder")
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
