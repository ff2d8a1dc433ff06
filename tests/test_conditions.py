# SPDX-License-Identifier: Apache-2.0
"""Each condition of `bench conditions` does to a tone what its name says.

    python -m pytest tests/test_conditions.py
"""

import numpy as np
import pytest
import soundfile
from test_bench import run_here, write_model

from data import Utterance
from features import load_audio
from tools import conditions
from tools.conditions import CONDITIONS


@pytest.fixture
def tone() -> np.ndarray:
    """One second of 300 Hz at half of full scale, quiet from 0.5 to 0.6 s."""
    samples = 0.5 * np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)
    samples[8000:9600] *= 0.01
    return samples.astype(np.float32)


@pytest.fixture
def recorded(tone, tmp_path):
    """The tone after a condition, read back from its file."""
    def make(name: str) -> np.ndarray:
        path = tmp_path / f"a{CONDITIONS[name].suffix}"
        conditions.record(path, tone, CONDITIONS[name], np.random.default_rng(1))
        with soundfile.SoundFile(path) as file:
            assert file.samplerate == CONDITIONS[name].rate_hz
        return load_audio(path)
    return make


def level_db(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(samples.astype(np.float64) ** 2))


def test_a_recording_is_unchanged_or_has_zeros_behind(recorded, tone):
    assert np.array_equal(recorded("as recorded"), tone)
    longer = recorded("0.25 s of zeros behind")
    assert np.array_equal(longer[:16000], tone)
    assert len(longer) == 20000
    assert not longer[16000:].any()


def test_the_quietest_60_ms_are_muted(recorded, tone):
    muted = recorded("60 ms of zeros in a pause")
    changed = np.flatnonzero(muted != tone)
    assert 940 < len(changed) <= 960  # some samples of the tone are zero
    assert changed[0] >= 8000
    assert changed[-1] < 9600


def test_noise_surrounds_the_recording_at_minus_80_db(recorded, tone):
    around = recorded("0.5 s of -80 dB noise around")
    assert np.array_equal(around[8000:24000], tone)
    for part in around[:8000], around[24000:]:
        assert level_db(part) == pytest.approx(-80, abs=0.2)


@pytest.mark.parametrize("snr_db", [20, 10])
def test_noise_has_its_distance_from_the_recording(recorded, tone, snr_db):
    noise = recorded(f"white noise, SNR {snr_db} dB") - tone
    assert level_db(tone) - level_db(noise) == pytest.approx(snr_db, abs=0.2)


@pytest.mark.parametrize(("name", "gain_db"), [
    ("20 dB quieter", -20), ("20 dB louder, not clipped", 20)])
def test_the_level_changes_by_20_db(recorded, tone, name, gain_db):
    assert level_db(recorded(name)) - level_db(tone) == pytest.approx(gain_db, abs=1e-3)


def test_utterances_are_joined_with_pauses_between(tone, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone, 16000, subtype="FLOAT")
    utterances = [Utterance(f"{i}", str(tmp_path / "a.wav"), 1.0, f"TEXT {i}") for i in range(5)]
    joined = conditions.join(utterances, tmp_path, 4)
    assert " ".join(u.text for u in joined) == "TEXT 0 TEXT 1 TEXT 2 TEXT 3 TEXT 4"
    assert len(joined) >= 2
    for utterance in joined:
        samples = load_audio(utterance.path)
        assert len(samples) == 16000 * utterance.duration_s
        count = len(utterance.text.split()) / 2
        assert 0.5 * count <= utterance.duration_s - count <= 1.5 * count
        assert level_db(samples[:8000]) == pytest.approx(-70, abs=0.5)
        # Energy is that of whole tones: the pauses are quiet.
        tones = np.sum(samples**2) / np.sum(tone**2)
        assert tones == pytest.approx(count, abs=0.01)
    assert all(u.duration_s >= 4 for u in joined[:-1])


@pytest.mark.parametrize("name", ["8 kHz", "A-law, 8 kHz", "8 bits", "MP3"])
def test_formats_keep_the_tone(recorded, tone, name):
    heard = recorded(name)
    size = min(len(heard), len(tone))
    inner = slice(1000, size - 1000)  # resampling and MP3 blur the ends
    lag = range(-1200, 1201)  # an MP3 decoder may begin earlier or later
    best = max(np.corrcoef(np.roll(heard[:size], n)[inner], tone[:size][inner])[0, 1] for n in lag)
    assert best > 0.95


def test_recordings_without_speech_are_silence_and_noise():
    empty = conditions.empty_recordings()
    assert len(empty) == conditions.NUM_EMPTY
    levels = [level_db(x) for x in empty if x.any()]
    assert len(levels) == 30
    assert -90 < min(levels) < max(levels) < -10
    assert all(16000 <= len(x) <= 64000 for x in empty)


def test_every_condition_has_a_line_and_a_figure(monkeypatch, capsys, tmp_path):
    lines, result = run_here(monkeypatch, capsys, "conditions", *write_model(tmp_path))
    assert list(result["wer"]) == [*CONDITIONS, "joined to 8 s", "joined to 600 s"]
    for name, line in zip(result["wer"], lines, strict=False):
        wer, cer = 100 * result["wer"][name], 100 * result["cer"][name]
        assert line == f"{name:30} WER {wer:6.2f} %  CER {cer:6.2f} %"
    assert lines[-1].startswith(f"{result['empty_with_words']} of 40 recordings without speech")
