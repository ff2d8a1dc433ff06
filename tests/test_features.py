# SPDX-License-Identifier: Apache-2.0
"""The front end of features.py, from audio files to input frames, is that of the original.

    python -m pytest tests/test_features.py

Every stage is held against a short float64 or brute-force restatement here, the filterbank and the
resampler against librosa. Where it exists, ../shared/oracles adds the arrays that NVIDIA DALI
1.26.0 gives for nine recordings, operator by operator, called as the original calls it. Bad files
are in test_data.py.
"""

import json
import math
import struct
import warnings
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch

import features
import model
from features import FeatureConfig

ORACLES = Path(__file__).resolve().parents[2] / "shared" / "oracles"
DALI = ORACLES / "dali"
needs_oracles = pytest.mark.skipif(not DALI.is_dir(), reason=f"{ORACLES} is not here")

# Tests add single augmentations to none.
PLAIN = {"speed_min": 1.0, "speed_max": 1.0, "dither": 0.0, "freq_masks": 0, "time_masks": 0}


def noise(n: int, seed: int = 1, deviation: float = 0.1) -> np.ndarray:
    """Quiet white noise, float32."""
    generator = np.random.default_rng(seed)
    return (deviation * generator.standard_normal(n)).astype(np.float32)


def tone(n: int, frequency_hz: float, rate: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(n) / rate)).astype(np.float32)


# ----------------------------------------------------------------------- audio file to samples


@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_int16_is_scaled_by_exactly_one_in_32768(tmp_path, suffix):
    pcm = np.arange(-32768, 32768).astype(np.int16)  # every value there is
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, pcm, 16000, subtype="PCM_16")
    samples = features.load_audio(path)
    assert samples.dtype == np.float32
    assert np.array_equal(samples * 32768, pcm)


def test_ogg_is_readable(tmp_path):
    soundfile.write(tmp_path / "a.ogg", tone(16000, 440), 16000)
    samples = features.load_audio(tmp_path / "a.ogg")
    assert samples.shape == (16000,)
    # Vorbis is lossy: this tone of 0.5 comes back within 0.017.
    assert np.abs(samples - tone(16000, 440))[100:-100].max() < 0.03


def test_16_khz_mono_gives_no_warning(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(100), 16000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features.load_audio(str(tmp_path / "a.flac"))


@pytest.fixture(autouse=True)
def fresh_warnings():
    features.warn_once.cache_clear()


def load_with_warnings(paths: list) -> tuple[list[np.ndarray], list[str]]:
    """Samples of the files, and the warnings that Python's default filter shows."""
    with warnings.catch_warnings(record=True) as caught:
        loaded = []
        for path in paths:
            # Makes the warnings module forget the warnings it has shown, as some imports do.
            warnings.simplefilter("default")
            loaded.append(features.load_audio(path))
    return loaded, [str(w.message) for w in caught]


STEREO, RESAMPLED = ("audio of 2 channels is averaged to one",
                     "audio of 8000 Hz is resampled to 16000 Hz")


@pytest.mark.parametrize(
    ("channels", "rate", "expected"),
    [(2, 16000, [STEREO]), (1, 8000, [RESAMPLED]), (2, 8000, [STEREO, RESAMPLED])],
)
def test_two_files_of_another_kind_are_converted_with_one_warning(
    tmp_path, channels, rate, expected
):
    # Values of 12 bits: their average is exact in float32.
    written = (np.round(noise(500 * channels) * 4096) / 4096).reshape(500, channels)
    mono = written.mean(1).astype(np.float32)
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for path in paths:
        soundfile.write(path, written, rate, subtype="PCM_16")
    loaded, messages = load_with_warnings(paths)
    for samples in loaded:
        assert samples.dtype == np.float32
        assert np.array_equal(samples, features.resample(mono, rate, 16000))
    assert messages == expected


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_resample_is_librosas(rate):
    expected = librosa.resample(noise(4001), orig_sr=rate, target_sr=16000, res_type="soxr_hq")
    assert np.array_equal(features.resample(noise(4001), rate, 16000), expected)


@pytest.mark.parametrize(
    ("samples", "rate", "options"),
    [
        (noise(1), 16000, {}),
        (noise(16000), 44100, {}),
        (noise(80000).reshape(16000, 5), 16000, {}),
        (np.full(999, 0.25), 16000, {}),
        (noise(16000), 16000, {"subtype": "PCM_24"}),
    ],
    ids=["one sample", "44.1 kHz", "5 channels", "constant", "24 bit"],
)
@pytest.mark.filterwarnings("ignore:audio of")
def test_odd_audio_has_finite_features(tmp_path, samples, rate, options):
    soundfile.write(tmp_path / "a.flac", samples, rate, **options)
    loaded = features.load_audio(tmp_path / "a.flac")
    assert len(loaded) == -(-len(samples) * 16000 // rate)
    for rng in (None, np.random.default_rng(1)):
        feats = features.features(loaded, rng=rng)
        assert feats.isfinite().all()
        assert len(feats) >= 1


@pytest.mark.parametrize("subtype", ["GSM610", "IMA_ADPCM", "ULAW", "PCM_24", "DOUBLE"])
def test_other_kinds_of_wav_are_read(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", noise(16000), 16000, subtype=subtype)
    samples = features.load_audio(tmp_path / "a.wav")
    assert 16000 <= len(samples) < 17000  # some are made of blocks


@pytest.mark.parametrize("promised", [0xFFFF_FFFF, 0x8000_0000, 0x7FFF_F000])
def test_wav_from_a_pipe_promises_too_much_and_is_read(tmp_path, promised):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(16000), 16000, subtype="PCM_16")
    contents = path.read_bytes()
    at = contents.index(b"data") + 4
    path.write_bytes(contents[:at] + struct.pack("<I", promised) + contents[at + 4 :])
    assert len(features.load_audio(path)) == 16000


@pytest.mark.parametrize("largest", [2**15, 2**31, features.LOUDEST])
def test_large_samples_have_finite_features(tmp_path, largest):
    samples = noise(16000)
    soundfile.write(tmp_path / "a.wav", largest * samples / np.abs(samples).max(), 16000, "FLOAT")
    for rng in (None, np.random.default_rng(1)):
        feats = features.features(features.load_audio(tmp_path / "a.wav"), rng=rng)
        assert feats.isfinite().all()


def test_samples_whose_squares_overflow_are_an_error(tmp_path):
    path, samples = tmp_path / "a.wav", noise(16000)
    samples[100] = 1.001 * features.LOUDEST
    soundfile.write(path, samples, 16000, "FLOAT")
    with pytest.raises(ValueError, match="a.wav: 1 samples not finite, or larger than 1e") as error:
        features.load_audio(path)
    assert str(error.value).startswith(f"{path}: ")


# --------------------------------------------------------------------------------------- silence


def brute_force_trim(samples: np.ndarray) -> np.ndarray:
    """DALI's NonsilentRegion(cutoff_db=-60): every window by itself."""
    x, window = samples.astype(np.float64), min(2048, len(samples))
    power = np.array([np.mean(x[i : i + window] ** 2) for i in range(len(x) - window + 1)])
    loud = np.flatnonzero(power >= power.max() * 1e-6)
    return samples[loud[0] : loud[-1] + window]


SILENCE = np.zeros(5000, np.float32)
QUIET = noise(5000, 2, 0.9e-4)  # 61 dB below noise(5000)
TRIM_SIGNALS = {
    "silence_around": np.concatenate([SILENCE, noise(3000), SILENCE]),
    "noise_below_the_threshold_around": np.concatenate([QUIET, noise(5000), QUIET]),
    "noise_above_the_threshold_around": np.concatenate([1.3 * QUIET, noise(5000), 1.3 * QUIET]),
    "silence_inside": np.concatenate([noise(3000), SILENCE, noise(3000)]),
    "one_click": np.concatenate([SILENCE, noise(1), SILENCE]),
    "fade": noise(8000) * np.logspace(-5, 0, 8000, dtype=np.float32),
    "no_silence": noise(5000),
    "shorter_than_a_window": np.concatenate([np.zeros(500, np.float32), noise(100)]),
    "one_window": np.concatenate([np.zeros(1048, np.float32), noise(1000)]),
    "one_window_and_a_sample": np.concatenate([np.zeros(1049, np.float32), noise(1000)]),
    "one_sample": noise(1),
    "all_zero": np.zeros(4000, np.float32),
}


@pytest.mark.parametrize("samples", TRIM_SIGNALS.values(), ids=TRIM_SIGNALS)
def test_trim_is_the_brute_force_rule(samples):
    assert np.array_equal(features.trim_silence(samples), brute_force_trim(samples))


def test_trim_threshold_is_a_setting():
    samples = TRIM_SIGNALS["noise_below_the_threshold_around"]
    assert len(features.trim_silence(samples, FeatureConfig(trim_db=-62))) == len(samples)
    assert len(features.trim_silence(samples, FeatureConfig(trim_window=1))) < 5001


# ------------------------------------------------------------------------- window and filterbank


@pytest.mark.parametrize(("num_mels", "rate"), [(80, 16000), (40, 8000), (24, 1600)])
def test_filterbank_is_librosas(num_mels, rate):
    cfg = FeatureConfig(num_mels=num_mels, sample_rate_hz=rate)
    _, mel = features.mel_filters(cfg)
    expected = librosa.filters.mel(sr=rate, n_fft=cfg.fft_size, n_mels=num_mels)
    assert mel.shape == (257, num_mels)
    # 2e-9 is a rounding error of the largest weight, 0.026, at 16 kHz.
    assert np.abs(mel.numpy().T - expected).max() < 2e-9 * max(1, expected.max() / 0.027)


# --------------------------------------------------------------------------------------- log-mel


def float64_log_mel(samples: np.ndarray) -> np.ndarray:
    """(frames, 80) by the definition of the discrete Fourier transform."""
    x, n = samples.astype(np.float64), len(samples)
    y = x - 0.97 * np.concatenate([x[:1], x[:-1]])
    at = np.arange(n // 160 + 1)[:, None] * 160 + np.arange(-160, 160)  # frame t around 160 t
    at = at % max(2 * n - 2, 1)  # mirrored at both ends, and again where n is shorter than that
    frames = y[np.where(at < n, at, 2 * n - 2 - at)]  # (frames, 320)
    frames *= 0.5 * (1 - np.cos(2 * np.pi * (np.arange(320) + 0.5) / 320))
    spectrum = frames @ np.exp(-2j * np.pi * np.outer(np.arange(320), np.arange(257)) / 512)
    mel = features.mel_filters(features.DEFAULT)[1].numpy().astype(np.float64)
    return np.log(np.maximum(np.abs(spectrum) ** 2 @ mel, 1e-20))


@pytest.mark.parametrize("n", [1, 2, 159, 160, 161, 200, 319, 320, 321, 1500, 16000])
def test_log_mel_is_the_float64_transform(n):
    # float32 gives power to 1e-6 of the frame's largest; very short ones are so smooth that
    # their upper filters hold less. Another Hann window would change the power by 10 %.
    mels = features.log_mel(noise(n))
    assert mels.dtype == torch.float32
    power, expected = mels.double().exp().numpy(), np.exp(float64_log_mel(noise(n)))
    assert power.shape == expected.shape
    limit = 1e-6 * expected.max(1, keepdims=True) + 1e-4 * expected
    assert (np.abs(power - expected) < limit).all()


def replace_filters(monkeypatch, mel: torch.Tensor) -> None:
    """Gives log_mel another filterbank, so that exp(log_mel) shows the spectrum."""
    window = 0.5 * (1 - torch.cos(2 * math.pi * (torch.arange(320) + 0.5).double() / 320))
    monkeypatch.setattr(features, "mel_filters", lambda cfg: (window.float(), mel))


def logarithms_of(monkeypatch, mel_power) -> list[float]:
    """Output of log_mel where the mel filters have these outputs."""
    replace_filters(monkeypatch, torch.eye(257))
    power = features.log_mel(np.ones(1, np.float32)).exp()[0, 0]
    mel = torch.zeros(257, len(mel_power))
    mel[0] = torch.as_tensor(mel_power) / power
    replace_filters(monkeypatch, mel)
    return features.log_mel(np.ones(1, np.float32))[0].tolist()


def test_logarithm_is_natural_with_a_floor_and_without_an_offset(monkeypatch):
    # Computed by DALI's ToDecibels with cutoff ln(1e-20).
    logarithms = logarithms_of(monkeypatch, [0, 1e-21, 1e-20, 1e-19, 1e-10, 1, 2.5, 1e4])
    assert logarithms == pytest.approx(
        [-46.051704, -46.051704, -46.051704, -43.749119, -23.025852, 0, 0.9162908, 9.210341],
        abs=2e-6,
        rel=1e-6,
    )


FRAME_CHAIN = [
    # samples, log-mel frames, input frames; n // 160 + 1 and a third of that, rounded up
    (1, 1, 1), (200, 2, 1), (1500, 10, 4), (16000, 101, 34), (16123, 101, 34),
    (48000, 301, 101), (267200, 1671, 557),
]


@pytest.mark.parametrize(("samples", "frames", "spliced"), FRAME_CHAIN)
def test_number_of_frames(samples, frames, spliced):
    mels = features.log_mel(noise(samples))
    assert mels.shape == (frames, 80)
    assert features.splice(mels).shape == (spliced, 256)


# ------------------------------------------------------------------------- normalise and splice


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3, 4], [-1.3416407, -0.4472136, 0.4472136, 1.3416407]),
        ([-1, 0, 1, 10], [-0.79772407, -0.5698029, -0.34188175, 1.7094086]),
        ([1e-3, 2e-3, 3e-3, 4e-3], [-1.3416407, -0.4472136, 0.4472136, 1.3416407]),
        ([5, 5, 5, 5], [0, 0, 0, 0]),
        ([0.1] * 7, [0] * 7),  # the mean of seven 0.1 is not 0.1
        ([3], [0]),
    ],
)
def test_normalize_known_vectors(values, expected):
    # Computed by DALI's Normalize with ddof 0 and epsilon 0.
    other = torch.arange(len(values)) ** 2.0  # another bin does not matter
    result = features.normalize(torch.stack([torch.tensor(values).float(), other], 1))
    assert result[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_normalize_gives_every_bin_mean_0_and_deviation_1():
    mels = torch.from_numpy(noise(101 * 80, deviation=3).reshape(101, 80)) - 1000
    expected = mels.double() - mels.double().mean(0)
    expected /= expected.square().mean(0).sqrt()
    result = features.normalize(mels)
    assert result.dtype == torch.float32
    # Rounded once, to float32. Sums in float32 would be off by 1e-4 at an offset of 1000.
    assert (result - expected).abs().max() < 1e-6


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 6, 7])
def test_splice_joins_three_frames_and_pads_with_zeros(frames):
    mels = torch.arange(frames * 80.0).view(frames, 80) + 1
    spliced = features.splice(mels)
    assert spliced.shape == (math.ceil(frames / 3), 256)
    flat = spliced[:, :240].flatten()
    assert torch.equal(flat[: frames * 80], mels.flatten())
    assert not flat[frames * 80 :].any()
    assert not spliced[:, 240:].any()


def test_input_frames_are_30_ms_apart():
    assert FeatureConfig().frame_s == pytest.approx(0.03)
    assert FeatureConfig(splice=4, hop=80, sample_rate_hz=8000).frame_s == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("mels", "splice", "align", "size"), [(80, 3, 32, 256), (80, 4, 32, 320), (40, 3, 1, 120)]
)
def test_feature_size_is_rounded_up(mels, splice, align, size):
    cfg = FeatureConfig(num_mels=mels, freq_mask_max=0, splice=splice, align=align)
    assert cfg.feature_size == size
    assert features.splice(torch.ones(5, mels), cfg).shape == (math.ceil(5 / splice), size)


# ------------------------------------------------------------------------------------ SpecAugment


def masks(frames: int, seeds: int, **settings) -> torch.Tensor:
    """(seeds, frames, 80), True where SpecAugment wrote a zero."""
    drawn = []
    for seed in range(seeds):
        mels = torch.ones(frames, 80)
        result = features.spec_augment(mels, np.random.default_rng(seed), FeatureConfig(**settings))
        drawn.append(result == 0)
    return torch.stack(drawn)


def test_frequency_mask_is_a_band_of_0_to_20_bins_anywhere():
    hit = masks(10, 2000, freq_masks=1, time_masks=0)
    assert torch.equal(hit, hit[:, :1].expand(-1, 10, -1))  # all frames alike
    bins = hit[:, 0]  # (seeds, 80)
    edges = bins.int().diff(dim=1).ne(0).sum(1) + bins[:, 0] + bins[:, -1].int()
    assert edges.unique().tolist() == [0, 2]  # nothing, or one band
    # 2000 draws of 21 widths: 95 each, 6 deviations are 60.
    counts = bins.sum(1).bincount(minlength=21)
    assert len(counts) == 21
    assert (counts - 95).abs().max() < 60
    assert bins[:, 0].any()
    assert bins[:, 79].any()


@pytest.mark.parametrize(("frames", "longest"), [(500, 15), (120, 4), (50, 2), (10, 0), (1, 0)])
def test_time_mask_is_at_most_3_percent_of_the_own_length(frames, longest):
    hit = masks(frames, 400, freq_masks=0, time_masks=1)
    assert torch.equal(hit, hit[:, :, :1].expand(-1, -1, 80))  # all bins alike
    assert hit[:, :, 0].sum(1).unique().tolist() == list(range(longest + 1))


def test_time_masks_reach_the_first_and_the_last_frame():
    hit = masks(40, 1000, freq_masks=0, time_masks=1)[:, :, 0]
    # Width 1 in half of the cases, then each of 40 frames: 12.5 each, all far above 0.
    assert (hit.sum(0) > 1).all()


def test_masks_leave_other_values_alone():
    mels = torch.from_numpy(noise(200 * 80)).view(200, 80)
    result = features.spec_augment(mels.clone(), np.random.default_rng(3))
    assert ((result == mels) | (result == 0)).all()
    assert (result == 0).any()
    assert (result != 0).any()


@pytest.mark.parametrize(("frames", "expected"), [(500, 71.6), (400, 56.8), (120, 19.6)])
def test_masked_share_is_near_that_of_the_original(frames, expected):
    # 18 bins and these frames are means of 200 draws of the original, whose masks may begin
    # anywhere in a batch of 500 frames. Its deviation for one draw is 8 bins and 14 frames.
    hit = masks(frames, 300)
    assert hit.all(1).sum(1).double().mean().item() == pytest.approx(18, abs=2)
    assert hit.all(2).sum(1).double().mean().item() == pytest.approx(expected, rel=0.1)


# ---------------------------------------------------------------------------- speed perturbation


@pytest.mark.parametrize(
    ("n", "factor", "length"),
    [
        (1600, 0.85, 1360), (1600, 0.9, 1440), (1600, 0.95, 1520), (1600, 1.0, 1600),
        (1600, 1.05, 1680), (1600, 1.1, 1760), (1600, 1.15, 1840), (160, 0.85, 136),
        (160, 1.15, 184), (161, 0.85, 137), (161, 1.15, 186), (1601, 0.85, 1361),
        (1601, 1.15, 1842), (1, 0.85, 1), (1, 1.15, 2),
    ],
)
def test_speed_changes_the_number_of_samples(n, factor, length):
    changed = features.change_speed(noise(n), factor)
    assert changed.shape == (length,)
    assert changed.dtype == np.float32


@pytest.mark.parametrize(
    ("factor", "frequency_hz"),
    [(1.1, 1000), (1.1, 6500), (1.1, 7200), (0.85, 1000), (0.85, 6100), (0.93, 6600), (1.15, 7200)],
)
def test_speed_changes_nothing_but_the_pitch_of_a_tone(factor, frequency_hz):
    # Within 1e-4 up to 0.9 of the narrower band; soxr's high quality is 4e-4 off there.
    changed = features.change_speed(tone(16000, frequency_hz), factor)
    expected = tone(len(changed), frequency_hz / factor)
    assert np.abs(changed - expected)[500:-500].max() < 1e-4


def test_faster_speech_has_no_mirror_images():
    """Sound above the new band of 6800 Hz must not come back below it."""
    changed = features.change_speed(tone(16000, 7600), 0.85)
    assert np.abs(changed)[500:-500].max() < 1e-4


def test_speed_is_in_steps_of_a_hundredth_and_1_changes_nothing():
    samples = noise(5000)
    assert np.array_equal(features.change_speed(samples, 1.0), samples)
    assert np.array_equal(features.change_speed(samples, 1.004), samples)
    assert np.array_equal(
        features.change_speed(samples, 0.906), features.change_speed(samples, 0.91)
    )


def test_long_recordings_are_dithered_to_their_end():
    samples = np.zeros(2**20 + 5000, np.float32)
    added = features.dither(samples, np.random.default_rng(1))
    assert len(added) == len(samples)
    assert added[-5000:].std() == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed_min": 0.004}, "speed_min: 0.004, expected at least 0.01"),
        ({"speed_min": 1.2, "speed_max": 1.1}, "speed_max: 1.1, expected at least 1.2"),
        ({"dither": math.nan}, "dither: nan, expected a finite number"),
    ],
)
def test_impossible_settings_are_an_error(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        FeatureConfig(**settings)


# --------------------------------------------------------------------------- samples to features


def test_evaluation_is_trim_log_mel_normalize_splice():
    samples = np.concatenate([SILENCE, noise(9000), SILENCE])
    expected = features.splice(features.normalize(features.log_mel(brute_force_trim(samples))))
    assert torch.equal(features.features(samples), expected)


def test_training_without_augmentation_is_evaluation():
    samples = np.concatenate([SILENCE, noise(9000), SILENCE])
    cfg = FeatureConfig(**PLAIN)
    augmented = features.features(samples, cfg, np.random.default_rng(1))
    assert torch.equal(augmented, features.features(samples))


def test_speeds_fill_the_range_of_the_configuration():
    # 34 input frames at factor 1: 29 at 0.85, 39 at 1.15.
    lengths = [
        len(features.features(noise(16000), rng=np.random.default_rng(s))) for s in range(60)
    ]
    assert set(lengths) <= set(range(29, 40))
    assert len(set(lengths)) > 8


def log_mel_input(monkeypatch, samples: np.ndarray, seed: int | None, **settings) -> np.ndarray:
    """The samples that `features` hands to log_mel."""
    seen = []
    log_mel = features.log_mel
    monkeypatch.setattr(features, "log_mel", lambda x, cfg: (seen.append(x), log_mel(x, cfg))[1])
    rng = None if seed is None else np.random.default_rng(seed)
    features.features(samples, FeatureConfig(**PLAIN | settings), rng)
    return seen[0]


def test_dither_is_noise_of_1e_5_in_training(monkeypatch):
    dither = FeatureConfig().dither
    samples = noise(20000)
    added = log_mel_input(monkeypatch, samples, 1, dither=dither).astype(np.float64) - samples
    # 20,000 values: the deviation is good to 0.5 %, the mean to 7e-8. Adding to samples of 0.1
    # rounds to 7e-9.
    assert added.std() == pytest.approx(1e-5, rel=0.03)
    assert abs(added.mean()) < 4e-7
    assert abs(np.corrcoef(added[1:], added[:-1])[0, 1]) < 0.03


def test_dither_is_for_training_only(monkeypatch):
    samples = noise(2000)
    assert np.array_equal(log_mel_input(monkeypatch, samples, None, dither=0.1), samples)


def test_dither_comes_after_the_trim(monkeypatch):
    # Otherwise it would be the loudest part of a very quiet recording's silence.
    samples = np.concatenate([SILENCE, 1e-4 * noise(5000), SILENCE])
    seen = log_mel_input(monkeypatch, samples, 1, dither=1e-5)
    assert len(seen) == len(brute_force_trim(samples)) < len(samples)


def test_masks_are_zero_after_normalisation():
    # Zero is the mean of every bin then.
    cfg = FeatureConfig(**PLAIN | {"freq_masks": 2})
    hidden = 0
    for seed in range(5):
        feats = features.features(noise(16000), cfg, np.random.default_rng(seed))
        untouched = features.features(noise(16000))
        changed = feats != untouched
        assert not feats[changed].any()
        hidden += changed.sum()
    assert hidden > 0


# -------------------------------------------------------------------- DALI, operator by operator

CASES = ("A_16000", "B_16123", "C_lead_trail", "D_lead_trail_noisy", "E_short_1500", "F_short_200",
         "G_8kHz", "H_stereo", "I_zeros")
WITH_STEPS = ("A_16000", "B_16123", "E_short_1500", "F_short_200")
each_case = pytest.mark.parametrize("case", CASES)
each_case_with_steps = pytest.mark.parametrize("case", WITH_STEPS)


@pytest.fixture(scope="module")
def golden() -> dict:
    if not DALI.is_dir():
        pytest.skip(f"{DALI} is not here")
    return dict(np.load(DALI / "dali_golden.npz"))


@pytest.fixture(scope="module")
def meta() -> dict:
    if not DALI.is_dir():
        pytest.skip(f"{DALI} is not here")
    return json.loads((DALI / "dali_golden_meta.json").read_text())


@pytest.fixture
def audio(golden, meta, tmp_path):
    """The file of a case as DALI read it."""

    def write(case: str) -> Path:
        path = tmp_path / f"{case}.wav"
        soundfile.write(path, golden[f"{case}/pcm"], meta["cases"][case]["sr"], subtype="PCM_16")
        return path

    return write


def test_dali_covers_these_cases(golden, meta):
    assert meta["dali"] == "1.26.0"
    assert tuple(meta["cases"]) == CASES
    assert tuple(c for c in CASES if f"{c}/mel" in golden) == WITH_STEPS


@each_case
@pytest.mark.filterwarnings("ignore:audio of")
def test_dali_decode(golden, audio, case):
    samples = features.load_audio(audio(case))
    expected = golden[f"{case}/decoded"]
    assert samples.shape == expected.shape
    if case == "G_8kHz":
        # Two resamplers: soxr against a sinc of 16 lobes, at a deviation of 0.106.
        # Measured 4.7e-4, and 0.008 at the ends where the signal starts at once.
        assert np.sqrt(np.mean((samples - expected) ** 2)) < 1e-3
        assert np.abs(samples - expected)[50:-50].max() < 3e-3
    else:
        assert np.array_equal(samples, expected)


@each_case
def test_dali_trim(golden, meta, case):
    decoded = golden[f"{case}/decoded"]
    begin, length = (meta["cases"][case][f"nonsilent_{x}"] for x in ("begin", "length"))
    trimmed = features.trim_silence(decoded)
    assert np.array_equal(trimmed, decoded[begin : begin + length])


@each_case
def test_dali_log_mel(golden, meta, case):
    mels = features.log_mel(features.trim_silence(golden[f"{case}/decoded"])).T.numpy()
    assert mels.shape == tuple(meta["cases"][case]["shape"])
    assert mels.shape[1] == meta["cases"][case]["n_frames"]
    # DALI adds up power in float32: A_16000 is 1.47e-4 away from float64, ours 5e-5. 8 kHz audio
    # leaves hardly any power in the upper filters, whose logarithm is that sensitive.
    tolerance = 3e-2 if case == "G_8kHz" else 2e-4
    assert np.abs(mels - golden[f"{case}/logmel"]).max() < tolerance


@each_case
def test_dali_features(golden, case):
    decoded, expected = golden[f"{case}/decoded"], golden[f"{case}/norm"]
    frames = expected.shape[1]
    feats = features.features(decoded)[:, :240].reshape(-1, 80)[:frames].T.numpy()
    if case == "I_zeros":
        # All bins are constant: 0, as DALI's definition says. DALI itself divides one rounding
        # error by another and gives 1.
        assert not feats.any()
        assert np.abs(expected - 1).max() < 1e-6
        return
    # The upper filters of 8 kHz audio as above, divided by their deviation of 3.
    tolerance = np.where(np.arange(80) < 57, 1e-4, 1e-2 if case == "G_8kHz" else 1e-4)
    assert (np.abs(feats - expected).max(1) < tolerance).all()


@each_case
def test_dali_normalize(golden, case):
    # From DALI's own log-mel. F_short_200 has two frames that differ little: DALI rounds more.
    result = features.normalize(torch.from_numpy(golden[f"{case}/logmel"].T.copy())).T.numpy()
    if case == "I_zeros":  # as above
        assert not result.any()
    else:
        assert np.abs(result - golden[f"{case}/norm"]).max() < 5e-5


def test_dali_normalize_vectors(golden):
    result = features.normalize(torch.from_numpy(golden["norm_of"].T.copy())).T.numpy()
    assert np.abs(result - golden["norm_is"]).max() < 1e-6
    column = features.normalize(torch.tensor([[1.0, 7.0]])).T.numpy()
    assert np.array_equal(column, golden["norm_onecol_is"])


def test_dali_window_and_filterbank(golden):
    window, mel = features.mel_filters(features.DEFAULT)
    assert np.abs(window.numpy() - golden["stft_window_320"]).max() < 1e-7
    assert np.abs(mel.T.numpy() - golden["mel_matrix_80x257"]).max() < 1e-7


def emphasised_squares(monkeypatch, samples: np.ndarray) -> np.ndarray:
    """Squares of the pre-emphasised samples: log_mel with frames of one sample and one filter."""
    cfg = FeatureConfig(window=1, hop=1, fft_size=1, num_mels=1, freq_mask_max=0)
    monkeypatch.setattr(features, "mel_filters", lambda cfg: (torch.ones(1), torch.ones(1, 1)))
    return features.log_mel(samples, cfg).exp()[:, 0].numpy()


@each_case_with_steps
def test_dali_preemphasis(monkeypatch, golden, case):
    squares = emphasised_squares(monkeypatch, golden[f"{case}/decoded"])
    expected = np.square(golden[f"{case}/preemph"])
    # exp(log(x)) in float32 loses 1e-6 relative; 1e-20 is the floor.
    assert np.abs(squares - expected).max() < 1e-5 * expected.max()
    assert np.abs(np.sqrt(squares) - np.sqrt(expected)).max() < 2e-6


def test_dali_preemphasis_vector(monkeypatch, golden):
    squares = emphasised_squares(monkeypatch, golden["preemph_of"])
    assert np.sqrt(squares) == pytest.approx(np.abs(golden["preemph_is"]), rel=1e-5)


@each_case_with_steps
def test_dali_power_spectrum(monkeypatch, golden, case):
    replace_filters(monkeypatch, torch.eye(257))
    power = features.log_mel(golden[f"{case}/decoded"]).exp().T.numpy()
    expected = golden[f"{case}/power_spec"]
    # 4e-7 of the frame's largest bin is the transform in float32, 3e-6 exp(log(x)).
    assert (np.abs(power - expected) < 1e-6 * expected.max(0) + 1e-5 * expected).all()


@each_case_with_steps
def test_dali_mel(golden, case):
    mels = features.log_mel(golden[f"{case}/decoded"]).exp().T.numpy()
    assert mels == pytest.approx(golden[f"{case}/mel"], rel=2e-4)  # as for the logarithm


def test_dali_logarithm(monkeypatch, golden):
    logarithms = logarithms_of(monkeypatch, golden["log_of"])
    assert logarithms == pytest.approx(golden["log_is"].tolist(), abs=2e-6, rel=1e-6)


@pytest.mark.parametrize("factor", ["0.85", "0.90", "0.95", "1.00", "1.05", "1.10", "1.15"])
def test_dali_speed(golden, meta, factor):
    samples = golden["speed/pcm"] / np.float32(32768)
    changed, expected = features.change_speed(samples, float(factor)), golden[f"speed/{factor}"]
    assert len(changed) == len(expected) == meta["speed_len"][factor]
    # DALI's sinc has 16 lobes and passes what lies above the new band, which ours removes: measured
    # rms 1.0e-3 (2 % of the deviation of 0.059) at 0.85, 1.0e-4 above 1. A shift by half a sample
    # would give 0.02.
    assert np.sqrt(np.mean((changed - expected) ** 2)) < (1.2e-3 if float(factor) < 1 else 1.2e-4)
    assert np.abs(changed - expected).max() < (4e-3 if float(factor) < 1 else 5e-4)
    if factor == "1.00":
        assert np.array_equal(changed, expected)


def test_dali_speed_lengths(meta):
    for n, lengths in meta["speed_len_n"].items():
        for factor, length in lengths.items():
            assert len(features.change_speed(noise(int(n)), float(factor))) == length, (n, factor)


# ------------------------------------------------------------------------------ the original itself


@needs_oracles
def test_frame_chain_of_the_oracles():
    vectors = json.loads((ORACLES / "misc_oracles.json").read_text())["frame_chain"]["vectors"]
    assert [(v["samples"], v["frames"], v["spliced"]) for v in vectors] == FRAME_CHAIN
    for v in vectors:
        lens = torch.tensor([len(features.features(noise(v["samples"])))])
        for factor in (2, 8):
            stacked = model.StackTime(factor)(torch.zeros(1, int(lens), 4))
            assert stacked.shape[1] == v[f"stack{factor}"]


@pytest.fixture(scope="module")
def seed_run() -> tuple[dict, dict]:
    folder = ORACLES / "seedrun"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    values = json.loads((folder / "seed_model_golden.json").read_text())
    return dict(np.load(folder / "seed_model_golden.npz")), values


def test_splice_and_padding_of_the_original(seed_run):
    # (B, bins, frames) there, four bins; filled up to a multiple of 32.
    arrays, values = seed_run
    cfg = FeatureConfig(num_mels=4, freq_mask_max=1)
    for b, mels in enumerate(torch.from_numpy(arrays["splice_in"])):
        spliced = features.splice(mels.T, cfg)  # (3, 32)
        assert torch.equal(spliced[:, :12], torch.from_numpy(arrays["splice_out"][b].T))
        assert torch.equal(spliced, torch.from_numpy(arrays["padalign_out"][b].T))
    assert len(spliced) == values["splice_lens"][0]


def test_masks_of_the_original(seed_run):
    # Its masks for three utterances, and its statistics over 200 draws for 500, 400 and 120
    # frames: ours lie in the same ranges, its own do too.
    arrays, values = seed_run
    statistics = values["specaug_plain"]
    bins = statistics["masked_freq_bins mean/min/max per utt"]
    frames = statistics["masked_frames mean/min/max per utt (lens 500,400,120 padded 500)"]
    for utterance, n in enumerate((500, 400, 120)):
        ours = masks(n, 200)
        theirs = torch.from_numpy(arrays["specaug/plain"][utterance]).T  # (frames, bins)
        pairs = (
            (ours.all(1).sum(1), theirs.all(0), bins),
            (ours.all(2).sum(1), theirs.all(1), frames),
        )
        for counts, original, (mean, low, high) in pairs:
            assert low[utterance] <= original.sum() <= high[utterance]
            assert counts.double().mean().item() == pytest.approx(mean[utterance], rel=0.15)
            # The extremes of 200 draws vary by some 20 %.
            assert counts.min() >= 0.7 * low[utterance] - 2
            assert counts.max() <= 1.3 * high[utterance] + 2
