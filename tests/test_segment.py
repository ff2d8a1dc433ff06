# SPDX-License-Identifier: Apache-2.0
"""Long recordings are cut at their pauses and decoded to their end; subtitles follow the pieces.

    python -m pytest tests/test_segment.py

Bursts of noise whose level sways like that of syllables stand for speech, faint noise for pauses.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from test_decode import Scene
from tones import REPO

import decode
import features
import segment
import writers
from checkpoint import save_checkpoint
from writers import Segment, Transcription, Word

RATE = 16000


def burst(seconds: float, seed: int = 1, level: float = 0.1) -> np.ndarray:
    """Noise whose level sways by 14 dB, four times a second."""
    n = round(seconds * RATE)
    sway = 0.6 + 0.4 * np.sin(np.arange(n) / RATE * 2 * np.pi * 4)
    return (level * sway * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def quiet(seconds: float, seed: int = 2, level: float = 1e-4) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (level * noise).astype(np.float32)


def cut(samples: np.ndarray, block_s: float = 60, longest_s: float = 10) -> list[tuple]:
    """Start and end of each piece in seconds; checks that a piece holds the samples between."""
    size = round(block_s * RATE)
    blocks = (samples[i : i + size] for i in range(0, len(samples), size))
    pieces = list(segment.cut(blocks, RATE, round(longest_s * RATE)))
    for start, piece in pieces:
        assert np.array_equal(piece, samples[start : start + len(piece)])
        assert len(piece) <= longest_s * RATE
    return [(start / RATE, (start + len(piece)) / RATE) for start, piece in pieces]


# ---------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("level", [0, 1e-4, 1e-2], ids=["zeros", "80 dB down", "20 dB down"])
def test_pauses_are_where_pieces_end(level):
    sounds = [(1.0, 3.0), (3.6, 6.0), (8.0, 9.0)]
    samples = quiet(10, level=level)
    for start, end in sounds:
        samples[round(start * RATE) : round(end * RATE)] += burst(end - start)
    pieces = cut(samples)
    assert len(pieces) == 3
    for (start, end), (first, last) in zip(sounds, pieces, strict=True):
        assert start - 0.3 < first < start  # 0.2 s of the pause, and half of the smoothing
        assert end < last < end + 0.3


@pytest.mark.parametrize("block_s", [5, 11, 60])
def test_pieces_hardly_depend_on_the_blocks(block_s):
    sounds = [burst(1 + i % 4, seed=i) for i in range(30)]
    samples = np.concatenate([part for sound in sounds for part in (sound, quiet(0.5))])
    pieces = cut(samples, block_s)
    assert len(pieces) == len(sounds)
    assert np.abs(np.array(pieces) - np.array(cut(samples))).max() < 0.05


def test_a_short_pause_does_not_end_a_piece():
    assert len(cut(np.concatenate([burst(2), quiet(0.2), burst(2)]))) == 1


@pytest.mark.parametrize("block_s", [5, 60])
def test_sound_without_a_pause_is_cut_at_quiet_places_and_heard_to_its_end(block_s):
    sound = burst(70)
    gaps = [8.0, 17.0, 23.0, 32.0]  # of a tenth of a second: no pauses
    for gap in gaps:
        sound[round(gap * RATE) : round((gap + 0.1) * RATE)] = quiet(0.1)
    pieces = cut(sound, block_s)
    assert pieces[0][0] == 0
    assert pieces[-1][1] > 69.9
    for (_, end), (start, _) in zip(pieces, pieces[1:], strict=False):
        assert start - end == pytest.approx(0, abs=0.5)
    assert [end for _, end in pieces[:4]] == pytest.approx([gap + 0.05 for gap in gaps], abs=0.06)


@pytest.mark.parametrize("level", [0, 1e-4, 0.1], ids=["zeros", "faint noise", "loud noise"])
def test_silence_and_steady_noise_have_no_pieces(level):
    assert cut(quiet(70, level=level)) == []


def test_a_click_is_no_piece():
    samples = quiet(30)
    samples[10 * RATE] = 0.9
    assert cut(samples) == []


def test_noise_that_grows_does_not_hide_the_pauses():
    parts = []
    for i in range(40):
        level = 1e-4 if i < 20 else 1e-2
        parts += [burst(2, seed=i) + quiet(2, seed=i, level=level), quiet(1, seed=i, level=level)]
    assert len(cut(np.concatenate(parts))) == 40


# ------------------------------------------------------------------------- files of any length


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A model with random weights whose longest training utterance has 1.5 s."""
    scene = Scene(tmp_path_factory.mktemp("segment"))
    scene.cfg = features.FeatureConfig(max_utterance_s=1.5)
    scene.contents["feature_config"]["max_utterance_s"] = 1.5
    save_checkpoint(scene.checkpoint, scene.contents)
    return scene


@pytest.fixture
def main(scene, monkeypatch, capsys):
    """The command line in this process: arguments -> status, standard output, standard error."""

    def run(*argv):
        argv = ["decode.py", "--checkpoint", scene.checkpoint, *argv]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        return decode.main(), *capsys.readouterr()

    return run


def write_long(scene, path, rate=RATE):
    """The tones of the scene with pauses between; returns when each begins."""
    parts, starts = [quiet(1)], []
    for audio in scene.audio:
        starts.append(sum(map(len, parts)) / RATE)
        parts += [features.load_audio(audio), quiet(0.7)]
    samples = features.resample(np.concatenate(parts), RATE, rate)
    soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return starts


def test_a_recording_as_long_as_training_utterances_is_one_piece(scene, tmp_path):
    for seconds, pieces in ((1.5, 1), (1.625, 2)):
        soundfile.write(tmp_path / "a.flac", burst(seconds), RATE)
        found = list(segment.read_pieces(tmp_path / "a.flac", scene.cfg))
        assert len(found) == pieces
    [whole] = segment.read_pieces(scene.audio[0], scene.cfg)
    assert np.array_equal(whole.samples, features.load_audio(scene.audio[0]))
    assert whole.share == 1


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.filterwarnings("ignore:audio of")
def test_each_piece_of_a_long_file_gives_the_words_that_it_gives_alone(
    scene, main, tmp_path, rate
):
    write_long(scene, tmp_path / "long.wav", rate)
    pieces = list(segment.read_pieces(tmp_path / "long.wav", scene.cfg))
    assert len(pieces) == len(scene.audio)
    end_s = pieces[-1].start_s + len(pieces[-1].samples) / RATE
    duration_s = soundfile.info(tmp_path / "long.wav").duration
    assert sum(piece.share for piece in pieces) == pytest.approx(end_s / duration_s, abs=1e-4)
    texts = []
    for i, piece in enumerate(pieces):
        soundfile.write(tmp_path / f"{i}.wav", piece.samples, RATE, subtype="FLOAT")
        texts.append(main(tmp_path / f"{i}.wav")[1].rstrip("\n").partition("\t")[2])
    for batch_size in (1, 3, 32):
        status, printed, _ = main(tmp_path / "long.wav", "--batch-size", batch_size)
        assert (status, printed) == (0, f"{tmp_path}/long.wav\t{' '.join(texts)}\n")


def test_times_are_those_of_the_file(scene, main, tmp_path):
    starts = write_long(scene, tmp_path / "long.flac")
    main(tmp_path / "long.flac", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    (file,) = json.loads((tmp_path / "a.json").read_text())["files"]
    begins = np.array([word["start_s"] for word in file["words"]])
    assert (np.diff(begins) >= 0).all()
    ends = [*starts[1:], np.inf]
    for start, end in zip(starts, ends, strict=True):
        assert ((begins > start - 0.3) & (begins < end - 0.3)).any()
    assert begins.min() > starts[0] - 0.3
    assert (tmp_path / "a.png").stat().st_size > 10_000  # the picture of all pieces


def test_short_and_long_files_are_printed_in_their_order(scene, main, tmp_path):
    write_long(scene, tmp_path / "long.flac")
    paths = [scene.audio[0], tmp_path / "long.flac", tmp_path / "no.flac", scene.audio[1]]
    status, printed, errors = main(*paths, "--batch-size", 2)
    assert status == 1
    assert [line.partition("\t")[0] for line in printed.splitlines()] == [
        str(path) for path in paths if path.name != "no.flac"
    ]
    assert errors == f"{tmp_path}/no.flac: No such file or directory\n"


def test_a_long_file_that_is_damaged_has_no_line(scene, main, tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "BLOCK_S", 1)  # a block is as long as the longest piece
    samples = np.concatenate([burst(18), quiet(1), burst(1)])
    samples[-1] = np.nan
    soundfile.write(tmp_path / "long.wav", samples, RATE, subtype="FLOAT")
    status, printed, errors = main(tmp_path / "long.wav", scene.audio[0], "--batch-size", 1)
    assert (status, printed) == (1, f"{scene.audio[0]}\t{scene.texts[0]}\n")
    assert errors.startswith(f"{tmp_path}/long.wav: 1 samples not finite")


@pytest.mark.slow
def test_an_hour_needs_less_than_a_gigabyte(scene, tmp_path):
    with soundfile.SoundFile(tmp_path / "hour.flac", "w", RATE, 1) as file:
        for i in range(720):
            file.write(np.concatenate([quiet(3.5, seed=i), burst(1.5, seed=i)]))
    command = [sys.executable, REPO / "decode.py", "--checkpoint", scene.checkpoint,
               tmp_path / "hour.flac", "--json", tmp_path / "a.json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone
    assert status == 0
    assert usage.ru_maxrss < 1e6  # kilobytes on Linux
    (file,) = json.loads((tmp_path / "a.json").read_text())["files"]
    assert file["words"][-1]["start_s"] > 3590


# ------------------------------------------------------------------------------------- subtitles


def words_at(*times: float) -> list[Word]:
    return [Word(f"W{i}", t, t + 0.2, 0.9) for i, t in enumerate(times)]


def transcription(*segments: list[Word]) -> Transcription:
    return Transcription("a.flac", [
        Segment(words[0].start_s - 0.5, words[-1].end_s + 0.4, " ".join(w.text for w in words),
                words, []) for words in segments
    ])


def test_a_long_segment_is_split_at_its_widest_gaps():
    times = [0, 1, 2, 3.5, 4.5, 5.5, 6.5, 9, 10, 11, 12, 13]
    cues = writers.make_cues(transcription(words_at(*times)))
    assert [cue.text for cue in cues] == ["W0 W1 W2 W3 W4 W5 W6", "W7 W8 W9 W10 W11"]
    assert cues[0].end_s == pytest.approx(7.7)  # a second after its last word, which ends at 6.7
    even = writers.split_words(words_at(*range(12)))
    assert [len(part) for part in even] == [6, 6]


def test_cues_do_not_overlap():
    first = Segment(0.0, 3.0, "A", [Word("A", 1.0, 1.2, 0.9)], [])
    second = Segment(2.0, 4.0, "B", [Word("B", 2.5, 2.7, 0.9)], [])
    cues = writers.make_cues(Transcription("a.flac", [first, second]))
    assert [cue.end_s for cue in cues] == pytest.approx([2.0, 3.7])


def test_srt_and_vtt_have_their_forms(tmp_path):
    heard = transcription([Word("R&B", 3661.0, 3661.2, 0.9)])
    writers.write_srt(tmp_path / "a.srt", heard)
    writers.write_vtt(tmp_path / "a.vtt", heard)
    assert (tmp_path / "a.srt").read_text() == "1\n01:01:00,500 --> 01:01:01,600\nR&B\n\n"
    assert (tmp_path / "a.vtt").read_text() == (
        "WEBVTT\n\n01:01:00.500 --> 01:01:01.600\nR&amp;B\n\n"
    )


def test_subtitles_of_a_long_file_have_a_cue_for_each_piece(scene, main, tmp_path):
    starts = write_long(scene, tmp_path / "long.flac")
    status, *_ = main(tmp_path / "long.flac", "--srt", tmp_path / "a.srt", "--vtt",
                      tmp_path / "a.vtt")
    assert status == 0
    lines = (tmp_path / "a.srt").read_text().splitlines()
    begins = [line.split(" --> ")[0] for line in lines if "-->" in line]
    assert len(begins) == len(starts)
    for begin, start in zip(begins, starts, strict=True):
        seconds = float(begin[6:].replace(",", "."))
        assert start - 0.3 < seconds < start + 0.1
    assert (tmp_path / "a.vtt").read_text().count("-->") == len(starts)


@pytest.mark.parametrize("flag", ["--srt", "--vtt"])
def test_subtitles_are_of_one_file(scene, main, tmp_path, flag):
    status, _, errors = main(*scene.audio[:2], flag, tmp_path / "a")
    assert (status, errors) == (1, f"{flag}: 2 audio files, expected 1\n")
