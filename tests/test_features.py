# SPDX-License-Identifier: Apache-2.0
"""The front end of features.py, from audio files to input frames, is that of the original.

    python -m pytest tests/test_features.py

Every stage is held against a short float64 or brute-force restatement here, the filterbank and the
resampler against librosa. The arrays of NVIDIA DALI are in test_oracles.py, bad files in
test_data.py.
"""

import itertools
import math
import os
import struct
import threading
import warnings

import librosa
import numpy as np
import pytest
import soundfile
import torch

import features
from features import FeatureConfig

# Tests add single augmentations to none; the others are off by default.
PLAIN = {"speed_min": 1.0, "speed_max": 1.0, "dither": 0.0, "freq_masks": 0, "time_masks": 0}


def noise(n: int, seed: int = 1, deviation: float = 0.1) -> np.ndarray:
    """Quiet white noise, float32."""
    generator = np.random.default_rng(seed)
    return (deviation * generator.standard_normal(n)).astype(np.float32)


def tone(n: int, frequency_hz: float, rate: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(n) / rate)).astype(np.float32)


# ----------------------------------------------------------------------- audio file to samples


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


@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_int16_is_scaled_by_exactly_one_in_32768(tmp_path, suffix):
    pcm = np.arange(-32768, 32768).astype(np.int16)  # every value there is
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, pcm, 16000, subtype="PCM_16")
    [samples], messages = load_with_warnings([path])
    assert samples.dtype == np.float32
    assert np.array_equal(samples * 32768, pcm)
    assert messages == []


def test_ogg_is_readable(tmp_path):
    soundfile.write(tmp_path / "a.ogg", tone(16000, 440), 16000)
    samples = features.load_audio(tmp_path / "a.ogg")
    assert samples.shape == (16000,)
    # Vorbis is lossy: this tone of 0.5 comes back within 0.017.
    assert np.abs(samples - tone(16000, 440))[100:-100].max() < 0.03


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


@pytest.mark.slow  # importing librosa.core takes up to 40 s on two cores
@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_resample_is_librosas(rate):
    expected = librosa.resample(noise(4001), orig_sr=rate, target_sr=16000, res_type="soxr_hq")
    assert np.array_equal(features.resample(noise(4001), rate, 16000), expected)


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


def write_flac_of_unknown_length(path, samples) -> None:
    """As programs write it that encode into a pipe: without number of samples and checksum."""
    soundfile.write(path, samples, 16000)
    contents = bytearray(path.read_bytes())
    contents[21] &= 0xF0  # 36 bits of STREAMINFO, which begins at byte 8
    contents[22:26] = bytes(4)
    contents[26:42] = bytes(16)
    path.write_bytes(contents)


def test_flac_of_unknown_length_is_read_whole(tmp_path):
    samples = noise(100_000)
    soundfile.write(tmp_path / "a.flac", samples, 16000)
    write_flac_of_unknown_length(tmp_path / "b.flac", samples)
    known, unknown = (features.load_audio(tmp_path / name) for name in ("a.flac", "b.flac"))
    assert len(unknown) == 100_000
    assert np.array_equal(unknown, known)
    with features.open_audio(tmp_path / "b.flac") as audio:
        assert features.count_samples(audio) == 100_000


def test_half_of_a_flac_of_unknown_length_is_damaged(tmp_path):
    path = tmp_path / "a.flac"
    write_flac_of_unknown_length(path, noise(100_000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="a.flac: damaged audio: "):
        features.load_audio(path)


@pytest.mark.parametrize("frames", [1, 999, 1000, 1001, 2500])
def test_blocks_make_the_whole(tmp_path, frames):
    soundfile.write(tmp_path / "a.wav", noise(2 * frames).reshape(frames, 2), 16000)
    with features.open_audio(tmp_path / "a.wav") as audio:
        blocks = list(features.read_blocks(audio, 1000))
    assert [len(block) for block in blocks[:-1]] == [1000] * (len(blocks) - 1)
    assert np.array_equal(np.concatenate(blocks), features.read_audio(tmp_path / "a.wav")[0])


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_a_fifo_is_read_as_a_file(tmp_path, suffix):
    path, fifo = tmp_path / f"a.{suffix}", tmp_path / "fifo"
    soundfile.write(path, noise(50_000), 16000)
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(path.read_bytes()))
    writer.start()
    assert np.array_equal(features.load_audio(fifo), features.load_audio(path))
    writer.join()


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


@pytest.mark.parametrize(
    ("rate", "window", "hop", "trim_window"),
    [(8000, 160, 80, 1024), (16000, 320, 160, 2048), (24000, 480, 240, 3072)],
)
def test_windows_keep_their_milliseconds_at_other_rates(rate, window, hop, trim_window):
    cfg = FeatureConfig(sample_rate_hz=rate)
    assert (cfg.window, cfg.hop, cfg.trim_window) == (window, hop, trim_window)
    assert cfg.frame_s == pytest.approx(0.03)
    assert FeatureConfig(sample_rate_hz=rate, window=300, hop=90).window == 300


def test_every_filter_of_8_khz_audio_hears_something():
    _, mel = features.mel_filters(FeatureConfig(sample_rate_hz=8000))
    assert mel.sum(0).min() > 0.01


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


def test_logarithm_has_a_floor_and_no_offset():
    quiet = noise(1500, deviation=1e-10)  # its power lies on both sides of the floor of 1e-20
    expected = float64_log_mel(quiet)
    assert expected.min() == pytest.approx(math.log(1e-20))
    assert expected.max() > math.log(5e-20)
    # An offset of 1e-20 would add up to ln(2).
    assert np.abs(features.log_mel(quiet).numpy() - expected).max() < 1e-3


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


@pytest.mark.parametrize(
    ("mels", "splice", "align", "size"), [(80, 3, 32, 256), (80, 4, 32, 320), (40, 3, 1, 120)]
)
def test_feature_size_is_rounded_up(mels, splice, align, size):
    cfg = FeatureConfig(num_mels=mels, freq_mask_max=0, splice=splice, align=align)
    assert cfg.feature_size == size
    assert cfg.frame_s == pytest.approx(0.01 * splice)
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
        (1600, 0.85, 1360), (1600, 0.95, 1520), (1600, 1.0, 1600), (1600, 1.15, 1840),
        (161, 0.85, 137), (161, 1.15, 186), (1601, 0.85, 1361), (1601, 1.15, 1842),
        (1, 0.85, 1), (1, 1.15, 2),
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
    # Sound above the new band of 6800 Hz must not come back below it.
    changed = features.change_speed(tone(16000, 7600), 0.85)
    assert np.abs(changed)[500:-500].max() < 1e-4


def test_speed_is_in_steps_of_a_hundredth_and_1_changes_nothing():
    samples = noise(5000)
    assert np.array_equal(features.change_speed(samples, 1.0), samples)
    assert np.array_equal(features.change_speed(samples, 1.004), samples)
    assert np.array_equal(
        features.change_speed(samples, 0.906), features.change_speed(samples, 0.91)
    )


@pytest.mark.parametrize("band", [3400, 4000, 5500])
@pytest.mark.parametrize("factor", [0.85, 1.0, 1.15])
def test_band_limit_removes_what_lies_above_it_at_any_speed(factor, band):
    spectrum = spectrum_of(features.change_speed(noise(32000), factor, band / 8000))
    frequency_hz = np.linspace(0, 8000, len(spectrum))
    passed = spectrum[frequency_hz < 0.9 * band].mean()
    assert passed == pytest.approx(0.01 * factor, rel=0.1)  # slower noise has a narrower band
    assert spectrum[frequency_hz > 1.1 * band].max() < 1e-6 * passed


# ----------------------------------------------------------------------- noise, silence and level


def spectrum_of(samples: np.ndarray) -> np.ndarray:
    """Power at len(samples) // 2 + 1 frequencies; its mean is about that of the samples."""
    window = np.hanning(len(samples))
    return np.abs(np.fft.rfft(samples * window)) ** 2 / (window**2).sum()


def speech(seconds: float = 2.0) -> np.ndarray:
    """Three bursts of noise a second, with pauses of 1/6 s that are 50 dB quieter."""
    n = round(16000 * seconds)
    is_pause = np.sin(6 * np.pi * np.arange(n) / 16000) < 0
    return noise(n) * np.where(is_pause, 10**-2.5, 1).astype(np.float32)


def perturbed(samples: np.ndarray, seed: int, strength: float = 1.0, **settings) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return features.perturb(samples, rng, FeatureConfig(**PLAIN | settings), strength)


def power_db(samples: np.ndarray) -> float:
    return 10 * math.log10(np.square(samples, dtype=np.float64).mean())


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_added_noise_has_the_ratio_of_the_settings(snr_db):
    samples = speech()
    for seed in range(10):
        result = perturbed(samples, seed, noise_prob=1.0, snr_min_db=snr_db, snr_max_db=snr_db)
        assert result.dtype == np.float32
        # Excerpts of pink and red noise differ in power.
        assert power_db(samples) - power_db(result - samples) == pytest.approx(snr_db, abs=2)


def test_ratios_of_added_noise_fill_their_range():
    samples = speech(1.0)
    ratios = [power_db(samples) - power_db(perturbed(samples, seed, noise_prob=1.0) - samples)
              for seed in range(200)]
    assert 3 < min(ratios) < 7
    assert 38 < max(ratios) < 42
    assert np.mean(ratios) == pytest.approx(22.5, abs=2.2)  # three deviations of the mean


def test_added_noise_is_from_white_to_coloured():
    # A sixteenth of the frequency has the same power per hertz in white noise, 12 dB more in pink.
    # Red noise has most of its power below these frequencies, so it adds little to the white part.
    samples, slopes = noise(16000), []
    for seed in range(100):
        spectrum = spectrum_of(perturbed(samples, seed, noise_prob=1.0, snr_max_db=5.0) - samples)
        slopes.append(10 * math.log10(spectrum[200:400].mean() / spectrum[3200:6400].mean()))
    assert -2 < min(slopes) < 1
    assert 10 < max(slopes) < 14


@pytest.mark.parametrize("fall", [1, 2])
def test_pink_noise_falls_by_3_db_an_octave_and_red_noise_by_6(fall):
    density = np.abs(np.fft.rfft(features.coloured_noise(fall))) ** 2
    bins_per_hz = 2**20 / 16000
    octaves = [density[round(f * bins_per_hz) : round(2 * f * bins_per_hz)].mean()
               for f in (20, 40, 80, 160, 320, 640, 1280, 2560)]
    assert 10 * np.diff(np.log10(octaves)) == pytest.approx([-3.01 * fall] * 7, abs=0.5)
    assert features.coloured_noise(fall).std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_strength_scales_how_often_there_is_noise(strength):
    samples = speech(0.1)
    changed = [not np.array_equal(perturbed(samples, seed, strength, noise_prob=0.4), samples)
               for seed in range(400)]
    assert np.mean(changed) == pytest.approx(0.4 * strength, abs=0.08)  # three deviations


def test_background_at_both_ends_is_silence_or_faint_noise_of_random_length():
    samples, ends = speech(0.5), []
    cfg = FeatureConfig(**PLAIN | {"pad_max_s": 0.5})
    for seed in range(200):
        result = features.perturb(samples, np.random.default_rng(seed), cfg)
        layout = features.draw_layout(np.random.default_rng(seed), cfg)
        before, after = round(16000 * layout.before_s), round(16000 * layout.after_s)
        assert len(result) == before + len(samples) + after
        assert np.array_equal(result[before : before + len(samples)], samples)
        ends += [result[:before], result[before + len(samples) :]]
    lengths = np.array([len(end) for end in ends])
    assert np.mean(lengths == 0) == pytest.approx(0.25, abs=0.065)  # three deviations
    assert 7500 < lengths.max() <= 8000
    assert lengths[lengths > 0].mean() == pytest.approx(4000, rel=0.15)
    long = [end for end in ends if len(end) > 1000]
    noisy = [end for end in long if end.any()]
    assert len(noisy) / len(long) == pytest.approx(0.75, abs=0.09)
    levels_db = [power_db(end) - power_db(samples) for end in noisy]
    assert -82 < min(levels_db) < -70
    assert -20 < max(levels_db) < -8


def test_low_pass_is_that_of_telephone_and_of_audio_at_8_or_11_khz():
    cutoffs_hz = []
    for seed in range(30):
        spectrum = spectrum_of(perturbed(noise(16000), seed, band_prob=1.0))
        share = spectrum.cumsum() / spectrum.sum()
        cutoffs_hz.append(int(share.searchsorted(0.99)) / 0.99)  # bins are 1 Hz apart
    nearest = [min(features.BANDS_HZ, key=lambda band: abs(band - hz)) for hz in cutoffs_hz]
    assert set(nearest) == {3400, 4000, 5500}
    assert cutoffs_hz == pytest.approx(nearest, rel=0.03)


def test_gain_is_uniform_in_decibels_up_and_down():
    samples = speech(0.5)
    gains_db = []
    for seed in range(200):
        result = perturbed(samples, seed, gain_db=20.0)
        factor = float(result[100] / samples[100])
        np.testing.assert_allclose(result, factor * samples, rtol=1e-5)
        gains_db.append(20 * math.log10(factor))
    assert -20 <= min(gains_db) < -18
    assert 18 < max(gains_db) <= 20
    assert np.mean(gains_db) == pytest.approx(0, abs=2.5)  # three deviations


def test_empty_recordings_are_silence_or_noise_without_the_words():
    samples, silent = speech(1.0), 0
    cfg = FeatureConfig(**PLAIN | {"empty_prob": 1.0})
    for seed in range(100):
        assert features.draw_layout(np.random.default_rng(seed), cfg).is_empty
        result = features.perturb(samples, np.random.default_rng(seed), cfg)
        assert result.shape == samples.shape
        assert power_db(result + 1e-30) < power_db(samples) - 8
        if result.any():
            assert abs(np.corrcoef(result, samples)[0, 1]) < 0.1
        else:
            silent += 1
    assert silent == pytest.approx(25, abs=13)


ALL = {"band_prob": 0.5, "pad_max_s": 0.3, "empty_prob": 0.3, "noise_prob": 0.5, "gain_db": 20.0,
       "mel_warp": 0.1}


def test_strength_0_leaves_speed_perturbation_alone():
    samples = speech(0.5)
    for seed in range(20):
        result = features.perturb(samples, np.random.default_rng(seed), FeatureConfig(**ALL), 0.0)
        factor = np.random.default_rng(seed).uniform(0.85, 1.15)
        assert np.array_equal(result, features.change_speed(samples, factor))


@pytest.mark.parametrize(
    "samples", [np.zeros(3000, np.float32), noise(1), noise(4000), 1e9 * noise(4000)],
    ids=["silence", "one_sample", "noise", "loud"],
)
@pytest.mark.parametrize("front_end", [{}, {"trim": False, "normalize": "none"}], ids=str)
def test_all_augmentations_together_give_finite_features(samples, front_end):
    cfg = FeatureConfig(**ALL, **front_end)
    for seed in range(30):
        feats = features.features(samples, cfg, np.random.default_rng(seed))
        assert feats.isfinite().all()
        assert torch.equal(feats, features.features(samples, cfg, np.random.default_rng(seed)))


def test_flags_that_are_off_draw_no_numbers():
    samples, rng = np.concatenate([SILENCE, noise(9000)]), np.random.default_rng(5)
    expected = features.trim_silence(features.change_speed(samples, rng.uniform(0.85, 1.15)))
    expected = features.dither(expected, int(rng.integers(2**19)))
    mels = features.spec_augment(features.normalize(features.log_mel(expected)), rng)
    result = features.features(samples, rng=np.random.default_rng(5))
    assert torch.equal(result, features.splice(mels))


# ---------------------------------------------------------------------------------------- dither


def test_dither_is_white_noise_of_1e_5():
    added = features.dither(np.zeros(20000, np.float32)).astype(np.float64)
    # 20,000 values: the deviation is good to 0.5 %, the mean to 7e-8.
    assert added.std() == pytest.approx(1e-5, rel=0.03)
    assert abs(added.mean()) < 4e-7
    assert abs(np.corrcoef(added[1:], added[:-1])[0, 1]) < 0.03


def test_dither_of_pieces_is_that_of_the_whole():
    samples = np.zeros(2**20 + 5000, np.float32)
    cuts = [0, 1, 700, 2**20 - 10, 2**20 + 10, len(samples)]
    pieces = [features.dither(samples[i:j], i) for i, j in itertools.pairwise(cuts)]
    whole = features.dither(samples)
    assert np.array_equal(np.concatenate(pieces), whole)
    assert whole[-5000:].std() == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed_min": 0.004}, "speed_min: 0.004, expected at least 0.01"),
        ({"speed_min": 1.2, "speed_max": 1.1}, "speed_max: 1.1, expected at least 1.2"),
        ({"dither": math.nan}, "dither: nan, expected a finite number"),
        ({"normalize": "both"}, "normalize: both, expected utterance or none"),
        ({"noise_prob": 1.5}, "noise_prob: 1.5, expected 0 <= x <= 1"),
        ({"snr_min_db": 50.0}, "snr_max_db: 40.0, expected at least 50.0"),
        ({"pad_max_s": -1.0}, "pad_max_s: -1.0, expected at least 0"),
        ({"sample_rate_hz": 48000}, "fft_size: 512, expected at least window, 960"),
    ],
)
def test_impossible_settings_are_an_error(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        FeatureConfig(**settings)


# --------------------------------------------------------------------------- samples to features


def test_evaluation_is_trim_dither_log_mel_normalize_splice():
    samples = np.concatenate([SILENCE, noise(9000), SILENCE])
    dithered = features.dither(brute_force_trim(samples))
    expected = features.splice(features.normalize(features.log_mel(dithered)))
    assert torch.equal(features.features(samples), expected)


def with_zeros_behind(samples: np.ndarray) -> np.ndarray:
    return np.concatenate([samples, np.zeros(4000, np.float32)])


def with_a_mute_in_a_pause(samples: np.ndarray) -> np.ndarray:
    start = 16000 // 6 + 800
    return np.concatenate([samples[:start], np.zeros(960, np.float32), samples[start + 960 :]])


@pytest.mark.parametrize("spoil", [with_zeros_behind, with_a_mute_in_a_pause])
def test_digital_silence_changes_the_features_of_speech_little(spoil):
    # Without dither, frames at ln(1e-20) would spoil mean and deviation of every bin.
    changes = {}
    for dither in (0.0, 1e-5):
        cfg = FeatureConfig(dither=dither)
        clean, spoilt = (features.features(x, cfg)[:66, :240] for x in (speech(), spoil(speech())))
        changes[dither] = (clean - spoilt).abs().mean().item()
    assert changes[1e-5] < 0.15 < 0.25 < changes[0.0]


# ----------------------------------------------------------------------- a front end without future

CAUSAL = FeatureConfig(trim=False, normalize="none")


@pytest.mark.parametrize("n", [4000, 16000, 22222])
def test_no_trim_and_fixed_scale_need_no_future(n):
    # Padding mirrors the end, so frames whose window reaches the end are left out.
    samples = np.concatenate([SILENCE, speech()])
    count = (n // 160 - 1) // 3
    whole, part = (features.features(x, CAUSAL)[:count] for x in (samples, samples[:n]))
    assert (whole - part).abs().max() < 1e-5


def test_without_trim_silent_ends_stay():
    samples = np.concatenate([SILENCE, noise(3000), SILENCE])
    assert features.nonsilent_region(samples, CAUSAL) == (0, 13000)
    assert len(features.features(samples, CAUSAL)) == math.ceil((13000 // 160 + 1) / 3)


def test_fixed_scale_keeps_the_level_and_is_of_order_1():
    silence = features.features(np.zeros(16000, np.float32), CAUSAL)[:, :240]
    quiet, loud = (features.features(noise(16000, deviation=x), CAUSAL)[:33, :240]
                   for x in (0.005, 0.05))
    assert silence.mean() == pytest.approx(-2.8, abs=0.2)
    assert quiet.mean() == pytest.approx(0.3, abs=0.1)
    # 20 dB are ln(100) nats, and the scale divides by 4.
    assert (loud - quiet).mean() == pytest.approx(math.log(100) / 4, abs=0.01)
