# SPDX-License-Identifier: Apache-2.0
"""From an audio file to input frames: decode, trim, log-mel, normalise, splice, augment.

    samples = load_audio("1272-128104-0000.flac")        # float32, 16 kHz
    feats = features(samples)                            # (T_in, 256) float32
    feats = features(samples, rng=np.random.default_rng(7))   # augmented for training

This file needs no other file of the project: numpy, torch, soundfile and soxr are enough.

The front end is that of the MLPerf Training v1.0 RNN-T (NVIDIA DALI graph of intel/e2eAIOK,
modelzoo/rnnt/pytorch/common/data/dali/pipeline.py), which comments call the original.
"""

import contextlib
import functools
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

# ----------------------------------------------------------------------------------- configuration


def check_ranges(config: object, rules: Iterable[tuple], may_be_infinite: str = "") -> None:
    """Checks fields by rules: (names, function that tells if a value is valid, range in words).

    Raises:
        ValueError: names the field, its value and what is expected.
    """
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value) and name != may_be_infinite:
            raise ValueError(f"{name}: {value}, expected a finite number")
    for names, is_valid, expected in rules:
        for name in names:
            value = getattr(config, name)
            if not is_valid(value):
                raise ValueError(f"{name}: {value}, expected {expected}")


@dataclass(frozen=True)
class FeatureConfig:
    """The front end. The values are those of the original's configs/baseline_v3-1023sp.yaml. Fields
    that it does not have are off, but for round_frames and round_labels, which only pad."""

    sample_rate_hz: int = 16000  # recordings at other rates are resampled
    preemphasis: float = 0.97  # share of the previous sample that is subtracted
    window: int = 0  # samples; 0: 20 ms
    hop: int = 0  # samples; 0: 10 ms
    fft_size: int = 512  # points of the Fourier transform
    num_mels: int = 80  # Slaney's filters, from 0 Hz to half the sample rate
    splice: int = 3  # consecutive log-mel frames that make one input frame
    align: int = 32  # input frames are zero-padded to a multiple of this size: 240 -> 256
    trim: bool = True  # cut off the silent ends, for which the whole recording must be there
    trim_db: float = -60.0  # silence threshold, relative to the loudest window
    trim_window: int = 0  # samples of the moving mean square; 0: 128 ms
    dither: float = 1e-5  # deviation of added white noise; evaluation adds fixed numbers
    normalize: str = "utterance"  # utterance: every bin to mean 0, deviation 1; none: a fixed scale
    speed_min: float = 0.85  # smallest factor on the length, above 1 is slower; training only
    speed_max: float = 1.15  # largest factor, in steps of 0.01; training only
    band_prob: float = 0.0  # share of recordings cut off above 3.4, 4 or 5.5 kHz; training only
    pad_max_s: float = 0.0  # longest silence or faint noise added at either end; training only
    empty_prob: float = 0.0  # share that becomes silence or noise, without words; training only
    noise_prob: float = 0.0  # share of recordings with added noise, white to red; training only
    snr_min_db: float = 5.0  # smallest signal-to-noise ratio of noise_prob, in decibels
    snr_max_db: float = 40.0  # largest signal-to-noise ratio; the draw is uniform in decibels
    gain_db: float = 0.0  # largest change of level, up or down; training only
    mel_warp: float = 0.0  # largest change of the mel axis' scale, up or down; training only
    freq_masks: int = 2  # number of SpecAugment's frequency masks (Park et al., arXiv:1904.08779)
    freq_mask_max: int = 20  # widest frequency mask, in mel bins
    time_masks: int = 10  # number of time masks
    time_mask_max: float = 0.03  # widest time mask, as a share of the utterance's own length
    max_utterance_s: float = 16.7  # longest training utterance, and longest piece when decoding
    num_buckets: int = 6  # groups of similar duration after augmentation, which batches come from
    round_frames: int = 32  # padded T_in is a multiple of this, so that few shapes occur
    round_labels: int = 8  # padded U is a multiple of this

    @property
    def feature_size(self) -> int:
        """Size D of an input frame."""
        return -(-self.num_mels * self.splice // self.align) * self.align

    @property
    def frame_s(self) -> float:
        """Seconds from one input frame to the next."""
        return self.hop * self.splice / self.sample_rate_hz

    def __post_init__(self) -> None:
        for name, ms in (("window", 20), ("hop", 10), ("trim_window", 128)):
            if getattr(self, name) == 0:  # a frozen dataclass has no other way to set a field
                object.__setattr__(self, name, ms * self.sample_rate_hz // 1000)
        check_ranges(self, (
            (("sample_rate_hz", "window", "hop", "num_mels", "splice", "align", "trim_window",
              "num_buckets", "round_frames", "round_labels"), lambda x: x >= 1, "at least 1"),
            (("dither", "freq_masks", "freq_mask_max", "time_masks", "pad_max_s", "gain_db"),
             lambda x: x >= 0, "at least 0"),
            (("preemphasis", "time_mask_max", "mel_warp", "band_prob", "empty_prob", "noise_prob"),
             lambda x: 0 <= x <= 1, "0 <= x <= 1"),
            (("normalize",), lambda x: x in ("utterance", "none"), "utterance or none"),
            (("max_utterance_s",), lambda x: x > 0, "more than 0"),
            (("speed_min",), lambda x: x >= 0.01, "at least 0.01"),
            (("trim_db",), lambda x: x <= 0, "at most 0"),
            (("fft_size",), lambda x: x >= self.window, f"at least window, {self.window}"),
            (("freq_mask_max",), lambda x: x <= self.num_mels, f"at most {self.num_mels} bins"),
            (("speed_max",), lambda x: x >= self.speed_min, f"at least {self.speed_min}"),
            (("snr_max_db",), lambda x: x >= self.snr_min_db, f"at least {self.snr_min_db}"),
        ))


DEFAULT = FeatureConfig()

# --------------------------------------------------------------------------- audio file to samples

# Names of the formats that libsndfile reads. A WAV file may hold NIST's format, as in TIMIT.
SUFFIXES = (".flac", ".wav", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au",
            ".snd", ".sph", ".nist", ".caf", ".w64", ".rf64")
LOUDEST = 1e10  # largest sample value that is accepted: squares of much larger ones overflow
BLOCK = 2**20  # samples per channel that are read at once
UNKNOWN_LENGTH = 2**60  # libsndfile reports at least this many samples where a header does not tell


def is_audio(name: str) -> bool:
    """Whether a file name is that of audio. macOS puts a file `._a.flac` beside `a.flac`."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith("._")


def load_audio(path: str | Path, cfg: FeatureConfig = DEFAULT) -> np.ndarray:
    """(n,) samples of an audio file, float32 at 16 kHz; raises as `read_audio` does.

    Channels are averaged and other rates are resampled; each gives a warning.
    """
    samples, rate = read_audio(path)
    return to_rate(to_mono(samples), rate, cfg)


def to_mono(samples: np.ndarray) -> np.ndarray:
    """(n,) or (n, channels) -> (n,) average of the channels."""
    if samples.ndim == 2:
        warn_once(f"audio of {samples.shape[1]} channels is averaged to one")
        samples = samples.mean(1)
    return samples


def to_rate(samples: np.ndarray, rate: int, cfg: FeatureConfig = DEFAULT) -> np.ndarray:
    """(n,) samples at `rate` -> (m,) at the rate of `cfg`."""
    if rate != cfg.sample_rate_hz:
        warn_once(f"audio of {rate} Hz is resampled to {cfg.sample_rate_hz} Hz")
        samples = resample(samples, rate, cfg.sample_rate_hz)
    return samples


class AudioFile(soundfile.SoundFile):
    """An open audio file that is read from its beginning to its end.

    soundfile would seek after every read of a seekable file. That takes time, and fails at the end
    of a FLAC file whose header does not tell its length.
    """

    def __init__(self, file: BinaryIO, path: str | Path) -> None:
        super().__init__(os.dup(file.fileno()))  # libsndfile closes its descriptor
        self.path = path

    def seekable(self) -> bool:
        return False


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Samples, float32 (n,) or (n, channels), and their rate. int16 is scaled by 1/32768.

    `-` is standard input.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is not audio, is empty, truncated or damaged, or a sample is NaN or beyond
            LOUDEST.
    """
    with open_audio(path) as audio:
        blocks = list(read_blocks(audio, min(audio.frames, BLOCK)))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks), audio.samplerate


def read_blocks(audio: AudioFile, size: int) -> Iterator[np.ndarray]:
    """The samples, float32 (size,) or (size, channels) and a shorter last block if need be.

    Raises as `read_audio` does.
    """
    is_first, is_last = True, False
    while not is_last:
        try:
            samples = audio.read(size, dtype="float32")
        except soundfile.LibsndfileError as error:
            message = error.error_string or f"libsndfile error {error.code}"
            raise ValueError(f"{audio.path}: damaged audio: {message}") from error
        if is_first and len(samples) == 0:
            raise ValueError(f"{audio.path}: the file has no samples")
        # Integer samples are scaled into [-1, 1]; a floating-point WAV can hold any value.
        is_integer = audio.subtype.startswith("PCM")
        if not is_integer and not (good := np.abs(samples) <= LOUDEST).all():
            bad = np.count_nonzero(~good)
            raise ValueError(f"{audio.path}: {bad} samples not finite, or larger than {LOUDEST:g}")
        is_first, is_last = False, len(samples) < size
        if len(samples):
            yield samples


def count_samples(audio: AudioFile) -> int:
    """Samples per channel. A file whose header does not tell is read; raises as `read_audio`."""
    if audio.frames < UNKNOWN_LENGTH:
        return audio.frames
    return sum(len(block) for block in read_blocks(audio, BLOCK))


def open_audio(path: str | Path) -> AudioFile:
    """Opens an audio file whose header and last sample are good; raises as `read_audio` does."""
    try:
        with open_seekable(0 if str(path) == "-" else path) as file:
            try:
                audio = AudioFile(file, path)
            except soundfile.LibsndfileError as error:
                file.seek(0)
                raise diagnose(path, file.read(64), error) from error
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror}") from error
    if audio.frames == 0:
        raise ValueError(f"{path}: the file has no samples")
    if is_truncated(audio):
        raise ValueError(f"{path}: truncated: the end is missing")
    return audio


@contextlib.contextmanager
def open_seekable(path: str | Path | int) -> Iterator[BinaryIO]:
    """Opens a file, or a temporary copy of what a pipe holds: libsndfile must be able to seek.

    The path may be 0, the descriptor of standard input, which stays open.
    """
    with open(path, "rb", closefd=path != 0) as file:
        if file.seekable():
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            try:
                shutil.copyfileobj(file, copy)
                copy.seek(0)
            except OSError as error:
                why = f"a copy of it in {tempfile.gettempdir()}: {error.strerror}"
                raise type(error)(error.errno, why) from error
            yield copy


def is_truncated(audio: AudioFile) -> bool:
    """Whether samples that the header promises are missing. Only the last sample is read."""
    # Compressed WAV is not seekable.
    if soundfile.SoundFile.seekable(audio) and audio.frames < UNKNOWN_LENGTH:
        try:
            audio.seek(audio.frames - 1)
            last = audio.read(1)
            audio.seek(0)
        except soundfile.LibsndfileError:
            return True
        if len(last) == 0:
            return True
    # `frames` of a WAV or RF64 file are those it holds; libsndfile logs what its header promises.
    if "does not match value from 'ds64' chunk" in audio.extra_info:
        return True
    promised = re.search(r"^data *: *(\d+) .*should be", audio.extra_info, re.MULTILINE)
    # A program that writes to a pipe cannot know the size and promises the largest possible one.
    return promised is not None and int(promised[1]) < 0x7FFF_F000


def diagnose(path: str | Path, head: bytes, error: soundfile.LibsndfileError) -> ValueError:
    """The exception that says why a file that begins with `head` is not audio."""
    if not head:
        return ValueError(f"{path}: the file is empty")
    if head.startswith(b"version https://git-lfs"):
        return ValueError(f"{path}: a git-LFS pointer; `git lfs pull` fetches the audio")
    return ValueError(f"{path}: not readable as audio: {error.error_string} If it is audio, ffmpeg "
                      "may convert it to FLAC.")


@functools.cache
def warn_once(message: str) -> None:
    """Warns once in a process. The warnings module itself forgets which warnings it has shown
    whenever a library changes its filters."""
    warnings.warn(message, stacklevel=3)


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """(n,) -> (ceil(n * to_hz / from_hz),): librosa.resample with res_type="soxr_hq"."""
    size = -(-len(samples) * to_hz // from_hz)
    resampled = soxr.resample(samples, from_hz, to_hz)[:size]
    return np.pad(resampled, (0, size - len(resampled)))


# --------------------------------------------------------------- speed, band limit and silent ends


@functools.cache
def speed_filters(new: int, band: float = 1.0) -> tuple[Tensor, int]:
    """Filters (rows, 100, new) that turn every 100 samples into `new`, and their reach in samples.

    Band-limited interpolation, Smith & Gossett (1984): a sinc of 32 lobes under a Kaiser window,
    within 1e-4 up to 0.9 of the narrowest band: the old one, the new one, or the share `band` of
    the new one. It reaches as far back as ahead, so `rows` rows of 100 samples contribute to each
    row of the result.
    """
    cutoff = min(1.0, new / 100 * band)
    reach = math.ceil(32 / cutoff)
    rows = -(-(100 + 2 * reach) // 100)
    taps = np.arange(100 * rows)[:, None] - reach
    at = np.arange(new) * 100 / new - taps  # (taps, new) distances
    window = np.i0(9 * np.sqrt(np.clip(1 - (at / reach) ** 2, 0, None))) / np.i0(9)
    filters = cutoff * np.sinc(cutoff * at) * window * (np.abs(at) < reach)
    return torch.from_numpy(filters).float().view(rows, 100, new), reach


def change_speed(samples: np.ndarray, factor: float, band: float = 1.0) -> np.ndarray:
    """(n,) -> (ceil(factor * n),) samples, to be played at the old rate.

    A `band` below 1 removes the frequencies above that share of the band. The factor is rounded to
    hundredths so that `speed_filters` can keep its filters: soxr designs its own at every call, and
    for a convolution oneDNN would build a kernel for every length.
    """
    new = round(100 * factor)
    filters, reach = speed_filters(new, band)
    size = -(-len(samples) * new // 100)
    count = -(-size // new)
    end = 100 * (count + len(filters) - 1) - reach - len(samples)
    rows = F.pad(torch.from_numpy(samples).float(), (reach, end)).view(-1, 100)
    changed = rows[:count] @ filters[0]  # (count, new)
    for i, taps in enumerate(filters[1:], start=1):
        changed.addmm_(rows[i : i + count], taps)
    return changed.view(-1)[:size].numpy()


def nonsilent_region(samples: np.ndarray, cfg: FeatureConfig = DEFAULT) -> tuple[int, int]:
    """Start and end, in samples, of the part between the silent ends.

    The rule is DALI's NonsilentRegion: the part reaches from the start of the first window of
    `trim_window` samples to the end of the last one whose mean square is within `trim_db` of the
    loudest window's. It is the whole recording if that is all zero, or without `cfg.trim`.
    """
    if not cfg.trim:
        return 0, len(samples)
    window = min(cfg.trim_window, len(samples))
    # torch sums faster than numpy.
    squares = torch.from_numpy(samples).to(torch.float64, copy=True).square_()
    running_sum = squares.cumsum(0).numpy()
    sums = running_sum[window - 1 :].copy()  # (n - window + 1,) over samples[i : i + window]
    sums[1:] -= running_sum[:-window]
    loud = sums >= sums.max() * 10 ** (cfg.trim_db / 10)
    return int(loud.argmax()), len(loud) - 1 - int(loud[::-1].argmax()) + window


def trim_silence(samples: np.ndarray, cfg: FeatureConfig = DEFAULT) -> np.ndarray:
    """Cuts off the silent ends; see nonsilent_region."""
    start, end = nonsilent_region(samples, cfg)
    return samples[start:end]


# ----------------------------------------------------------------------- noise, silence and level


@functools.cache
def white_noise() -> np.ndarray:
    """2^20 numbers of the standard normal distribution, drawn once because drawing is slow."""
    return torch.randn(2**20, generator=torch.Generator().manual_seed(1)).numpy()


@functools.cache
def coloured_noise(fall: int) -> np.ndarray:
    """2^20 numbers of deviation 1 whose power per hertz is that of 1 / frequency^fall.

    Noise is called pink for a fall of 1 and red for 2. The power is constant below a 4000th of the
    band, 2 Hz at a rate of 16 kHz.
    """
    spectrum = torch.fft.rfft(torch.from_numpy(white_noise()))  # (2^19 + 1,)
    spectrum /= torch.arange(len(spectrum)).clamp_min(len(spectrum) // 4000) ** (fall / 2)
    noise = torch.fft.irfft(spectrum)  # (2^20,)
    return (noise / noise.std()).numpy()


def make_tables(cfg: FeatureConfig) -> None:
    """Computes tables of noise and filters once, for all workers that will be forked."""
    white_noise()
    coloured_noise(1)
    coloured_noise(2)
    mel_filters(cfg)


def excerpt(table: np.ndarray, start: int, count: int) -> np.ndarray:
    """(count,) numbers of a table from `start` on, over its end and from its beginning again."""
    start %= len(table)
    if start + count <= len(table):
        return table[start : start + count]
    return np.resize(np.roll(table, -start), count)


def draw_noise(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,) noise of deviation about 1: white noise, and pink or red noise with a random share
    of the power."""
    share = rng.random()
    white_start, start, is_red = rng.integers((2**20, 2**20, 2)).tolist()
    noise = math.sqrt(1 - share) * excerpt(white_noise(), white_start, count)
    noise += math.sqrt(share) * excerpt(coloured_noise(2 if is_red else 1), start, count)
    return noise


def happens(rng: np.random.Generator, probability: float) -> bool:
    """True with this probability; draws no number for 0, so that a flag that is off changes no
    other draw."""
    return probability > 0 and rng.random() < probability


class Layout(NamedTuple):
    """How an augmented recording differs from the file in length and words."""

    speed: float = 1.0  # factor on the number of samples
    before_s: float = 0.0  # seconds of background before the recording
    after_s: float = 0.0  # and behind it
    is_empty: bool = False  # background stands in the recording's place, so it has no words


def draw_layout(rng: np.random.Generator, cfg: FeatureConfig = DEFAULT,
                strength: float = 1.0) -> Layout:
    """Draws speed, background and emptiness; a quarter of all ends get no background.

    `perturb` draws these numbers first, so an equal `rng` tells the length before the file is read.
    """
    speed = rng.uniform(cfg.speed_min, cfg.speed_max)
    longest, ends = cfg.pad_max_s * strength, [0.0, 0.0]
    if longest > 0:
        ends = rng.uniform(-0.33 * longest, longest, 2).clip(0).tolist()
    return Layout(speed, *ends, is_empty=happens(rng, cfg.empty_prob * strength))


def draw_background(rng: np.random.Generator, count: int, rms: float) -> np.ndarray:
    """(count,) digital silence, or, three quarters of the time, noise 10 to 80 dB below `rms`."""
    if not happens(rng, 0.75):
        return np.zeros(count, np.float32)
    return rms * 10 ** (-rng.uniform(10, 80) / 20) * draw_noise(rng, count)


BANDS_HZ = (3400, 4000, 5500)  # upper limits of telephones, of audio at 8 kHz and at 11 kHz


def perturb(samples: np.ndarray, rng: np.random.Generator, cfg: FeatureConfig = DEFAULT,
            strength: float = 1.0) -> np.ndarray:
    """(n,) -> (m,) samples as another speaker, line, place and microphone would give them.

    It changes speed and bandwidth, puts background around the recording or in its place, adds noise
    and changes the level. Levels of noise are relative to the recording's own power. All but the
    speed has `strength` times its full probability or size.
    """
    layout, band = draw_layout(rng, cfg, strength), 1.0
    if happens(rng, cfg.band_prob * strength):
        band = min(1.0, 2 * BANDS_HZ[rng.integers(len(BANDS_HZ))] / cfg.sample_rate_hz)
    samples = change_speed(samples, layout.speed, band)
    rms = float(np.linalg.norm(samples)) / math.sqrt(len(samples))
    if layout.is_empty:
        samples = draw_background(rng, len(samples), rms)
    if cfg.pad_max_s > 0:
        before, after = (draw_background(rng, round(seconds * cfg.sample_rate_hz), rms)
                         for seconds in (layout.before_s, layout.after_s))
        samples = np.concatenate([before, samples, after])
    if happens(rng, cfg.noise_prob * strength):
        amplitude = rms * 10 ** (-rng.uniform(cfg.snr_min_db, cfg.snr_max_db) / 20)
        samples = samples + amplitude * draw_noise(rng, len(samples))
    if cfg.gain_db > 0:
        samples = samples * 10 ** (strength * rng.uniform(-cfg.gain_db, cfg.gain_db) / 20)
    return samples


# ----------------------------------------------------------------------------- samples to features


@functools.cache
def mel_filters(cfg: FeatureConfig) -> tuple[Tensor, Tensor]:
    """Window (320,) and mel filterbank (257, 80): triangles of area 1 Hz on Slaney's mel scale.

    The scale of Slaney (1998), Auditory Toolbox, has 200/3 Hz a mel up to 1000 Hz (15 mel), from
    there on 27 mel for every factor of 6.4. The filterbank is that of librosa.filters.mel, whose
    import would take longer than decoding a short file.
    """
    # DALI samples the Hann window between the integers, unlike torch (periodic or symmetric).
    phase = 2 * math.pi * (torch.arange(cfg.window, dtype=torch.float64) + 0.5) / cfg.window
    window = (0.5 * (1 - torch.cos(phase))).float()
    nyquist_hz = cfg.sample_rate_hz / 2
    top = 15 + 27 * math.log(nyquist_hz / 1000, 6.4) if nyquist_hz > 1000 else nyquist_hz * 3 / 200
    mels = np.linspace(0, top, cfg.num_mels + 2)  # filter m: rises from mels[m], ends at [m + 2]
    corners_hz = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    low, peak, high = corners_hz[:-2], corners_hz[1:-1], corners_hz[2:]
    bins_hz = np.arange(cfg.fft_size // 2 + 1)[:, None] * cfg.sample_rate_hz / cfg.fft_size
    triangles = np.minimum((bins_hz - low) / (peak - low), (high - bins_hz) / (high - peak))
    return window, torch.from_numpy(triangles.clip(0) * 2 / (high - low)).float()


FRAMES_AT_ONCE = 128  # spectra of so many frames fit the processor's cache


def log_mel(samples: np.ndarray, cfg: FeatureConfig = DEFAULT) -> Tensor:
    """(n,) -> (n // 160 + 1, 80) natural logarithm of mel power, at least ln(1e-20).

    Pre-emphasis takes the first sample as its own predecessor. Frame t is centred on sample
    160 * t of the signal, which is mirrored at both ends, even if it is shorter than a window.
    """
    emphasised = np.empty(len(samples), np.float32)
    np.multiply(samples[:-1], -cfg.preemphasis, out=emphasised[1:], casting="same_kind")
    emphasised[0] = -cfg.preemphasis * samples[0]
    emphasised += samples
    padded = np.pad(emphasised, cfg.window // 2, mode="reflect")
    window, mel = mel_filters(cfg)
    frames = torch.from_numpy(padded).unfold(0, cfg.window, cfg.hop)  # (frames, 320)
    mels = torch.empty(len(frames), mel.shape[1])
    windowed = torch.zeros(FRAMES_AT_ONCE, cfg.fft_size)
    for block, out in zip(frames.split(FRAMES_AT_ONCE), mels.split(FRAMES_AT_ONCE), strict=True):
        torch.mul(block, window, out=windowed[: len(block), : cfg.window])
        parts = torch.view_as_real(torch.fft.rfft(windowed[: len(block)]))
        squares = parts * parts  # (frames, 257, 2)
        # Adding real and imaginary part is faster than sum(-1).
        torch.mm(squares[..., 0] + squares[..., 1], mel, out=out)
    return mels.clamp_min_(1e-20).log_()


def dither(samples: np.ndarray, start: int = 0, cfg: FeatureConfig = DEFAULT) -> np.ndarray:
    """(n,) samples plus white noise of deviation `cfg.dither`: `white_noise` from `start` on.

    Without it the logarithm of digital silence, at ln(1e-20), would dominate the normalisation.
    """
    noise = cfg.dither * excerpt(white_noise(), start, len(samples))
    noise += samples
    return noise


def normalize(mels: Tensor) -> Tensor:
    """(frames, 80): scales each bin to mean 0 and population deviation 1; constant bins to 0."""
    x = mels.to(torch.float64, copy=True)
    x -= x.mean(0)
    constant = mels.amax(0) == mels.amin(0)
    x /= x.square().mean(0).sqrt().masked_fill(constant, torch.inf)
    return x.float()


# Log-mel values of speech at -25 dBFS, pauses included, have about this mean and deviation, in
# nats; dither alone gives -23. So the 0 of SpecAugment and padding stands for average speech.
SPEECH_MEAN, SPEECH_DEVIATION = -12.0, 4.0


def scale_fixed(mels: Tensor) -> Tensor:
    """(frames, 80): the same scale for every recording, so that no frame depends on later ones.

    Level and colour of a recording stay in its features; BatchNorm on the features, with its
    running statistics, brings the bins to one scale.
    """
    return (mels - SPEECH_MEAN) / SPEECH_DEVIATION


def warp_mels(mels: Tensor, rng: np.random.Generator, cfg: FeatureConfig = DEFAULT,
              strength: float = 1.0) -> Tensor:
    """(frames, 80) with the mel axis stretched by a random factor, as another vocal tract would.

    Jaitly & Hinton (2013), vocal tract length perturbation, on the mel scale: the value of a bin
    is read, by linear interpolation, at its index times 1 - `mel_warp` to 1 + `mel_warp`.
    """
    if cfg.mel_warp * strength == 0:
        return mels
    factor = 1 + strength * rng.uniform(-cfg.mel_warp, cfg.mel_warp)
    bins = mels.shape[1]
    place = (torch.arange(bins) * factor).clamp_max(bins - 1)
    below = place.long()
    above = (below + 1).clamp_max(bins - 1)
    return torch.lerp(mels[:, below], mels[:, above], place - below)


def spec_augment(mels: Tensor, rng: np.random.Generator, cfg: FeatureConfig = DEFAULT,
                 strength: float = 1.0) -> Tensor:
    """Zeroes random bands of mel bins and of frames of (frames, 80), in place.

    Widths are uniform from 0 to `strength` times the maximum. The maximum of frames is a share of
    the utterance's length, so that short utterances are not wiped out ("adaptive",
    arXiv:1912.05533).
    """
    frames, bins = mels.shape
    for _ in range(cfg.freq_masks):
        width = rng.integers(0, round(cfg.freq_mask_max * strength), endpoint=True)
        start = rng.integers(0, bins - width, endpoint=True)
        mels[:, start : start + width] = 0
    longest = round(frames * cfg.time_mask_max * strength)
    for _ in range(cfg.time_masks):
        width = rng.integers(0, longest, endpoint=True)
        start = rng.integers(0, frames - width, endpoint=True)
        mels[start : start + width] = 0
    return mels


def splice(mels: Tensor, cfg: FeatureConfig = DEFAULT) -> Tensor:
    """(frames, 80) -> (ceil(frames / 3), 256): joins three consecutive frames and zero-pads."""
    frames, bins = mels.shape
    mels = F.pad(mels, (0, 0, 0, -frames % cfg.splice)).view(-1, bins * cfg.splice)
    return F.pad(mels, (0, cfg.feature_size - bins * cfg.splice))


def features(samples: np.ndarray, cfg: FeatureConfig = DEFAULT,
             rng: np.random.Generator | None = None, strength: float = 1.0) -> Tensor:
    """(n,) samples -> (T_in, D) input frames, by default of 256 values and 30 ms.

    With `rng`, augmented for training: see `perturb`, `warp_mels` and `spec_augment`, which have
    `strength` times their full strength. `draw_layout` on an equal `rng` tells the length and
    whether words are left. Without `rng`, the dither is the same for all recordings.
    """
    dither_start = 0
    if rng is not None:
        samples = perturb(samples, rng, cfg, strength)
        dither_start = int(rng.integers(2**19))
    samples = dither(trim_silence(samples, cfg), dither_start, cfg)
    mels = log_mel(samples, cfg)
    mels = normalize(mels) if cfg.normalize == "utterance" else scale_fixed(mels)
    if rng is not None:
        mels = spec_augment(warp_mels(mels, rng, cfg, strength), rng, cfg, strength)
    return splice(mels, cfg)
