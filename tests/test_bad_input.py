# SPDX-License-Identifier: Apache-2.0
"""Everything that can be wrong with a corpus: found by `prepare.py check`, refused by training.

    python -m pytest tests/test_bad_input.py

One row of BAD for each kind of bad file or line. What all rows have in common is tested once for
each: the problem is named with its file or line, the other utterances stay usable, `read_split`
refuses errors and lets warnings pass.
"""

import os
import struct
import warnings

import numpy as np
import pytest
import soundfile

import data
import features
from features import FeatureConfig
from tools import prepare

NOISE = 0.1 * np.random.default_rng(1).standard_normal(16000)


def flac(folder, utterance_id="7-9-0000", samples=NOISE, rate=16000, **options):
    path = folder / f"{utterance_id}.flac"
    soundfile.write(path, samples, rate, **options)
    return path


def wav(folder, samples, subtype="FLOAT"):
    (folder / "7-9-0000.flac").unlink(missing_ok=True)
    path = folder / "7-9-0000.wav"
    soundfile.write(path, samples, 16000, subtype=subtype)
    return path


def line(folder, text):
    (folder / "7-9.trans.txt").write_bytes(text + b"7-9-0001 SECOND LINE\n")


def lfs_pointer(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "7-9-0000.flac").write_text(pointer)


def zero_bytes(folder):
    (folder / "7-9-0000.flac").write_bytes(b"")


def truncated_flac(folder):
    path = folder / "7-9-0000.flac"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged_flac(folder):
    path = folder / "7-9-0000.flac"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 8
    path.write_bytes(contents)


def short_wav(folder):
    path = wav(folder, NOISE, "PCM_16")
    path.write_bytes(path.read_bytes()[:10000])


def not_a_number(folder):
    wav(folder, np.where(np.arange(16000) == 8000, np.nan, NOISE))


def infinity(folder):
    wav(folder, np.where(np.arange(16000) < 2, -np.inf, NOISE))


def mp3(folder):
    path = folder / "7-9-0000.flac"
    with path.open("wb") as file:
        soundfile.write(file, NOISE, 16000, format="MP3")


def text_file(folder):
    (folder / "7-9-0000.flac").write_text("this is no audio at all, however long it may be" * 99)


def link_loop(folder):
    path = folder / "7-9-0000.flac"
    path.unlink()
    path.symlink_to(path)


def folder_named_flac(folder):
    path = folder / "7-9-0000.flac"
    path.unlink()
    path.mkdir()


def missing_audio(folder):
    (folder / "7-9-0000.flac").unlink()


def second_recording(folder):
    soundfile.write(folder / "7-9-0000.wav", NOISE, 16000)


def repeated_id(folder):
    line(folder, b"7-9-0000 FIRST LINE\n7-9-0000 AGAIN\n")


def id_in_two_chapters(folder):
    other = folder.parent / "10"
    other.mkdir()
    flac(other, "7-10-0000")
    (other / "7-10.trans.txt").write_text("7-9-0001 FIRST LINE\n7-10-0000 OTHER\n")


def foreign_id(folder):
    line(folder, b"7-10-0000 FIRST LINE\n")


# name: (how to spoil a good corpus, level, kind, words of the message, seen without decoding)
BAD = {
    "git-LFS pointer": (lfs_pointer, "error", "audio not readable", "git-LFS", True),
    "zero bytes": (zero_bytes, "error", "audio not readable", "empty file", True),
    "truncated FLAC": (truncated_flac, "error", "audio not readable", "truncated", True),
    "damaged FLAC": (damaged_flac, "error", "audio not readable", "damaged", False),
    "WAV header promises more": (short_wav, "error", "audio not readable", "truncated", True),
    "NaN": (not_a_number, "error", "audio not readable", "1 samples not finite", False),
    "infinity": (infinity, "error", "audio not readable", "2 samples not finite", False),
    "MP3 named flac": (mp3, "error", "audio not readable", "MP3, not FLAC", True),
    "no audio": (text_file, "error", "audio not readable", "not readable as audio", True),
    "link to itself": (link_loop, "error", "audio not readable", "symbolic links", True),
    "folder": (folder_named_flac, "error", "audio not readable", "Is a directory", True),
    "no samples": (lambda f: wav(f, NOISE[:0]), "error", "audio not readable", "no samples", True),
    "audio missing": (missing_audio, "error", "audio missing", "does not exist", True),
    "two recordings": (second_recording, "error", "duplicate recording", "0000.wav", True),
    "id twice": (repeated_id, "error", "duplicate id", "7-9-0000", True),
    "id in two chapters": (id_in_two_chapters, "error", "id not of its folder", "7-10-", True),
    "id of another chapter": (foreign_id, "error", "id not of its folder", "7-10-0000", True),
    "CRLF": (lambda f: line(f, b"7-9-0000 FIRST\r\n"), "error", "control character", r"\r", True),
    "tab": (lambda f: line(f, b"7-9-0000 A\tB\n"), "error", "control character", r"\t", True),
    "tab after the id": (lambda f: line(f, b"7-9-0000\tB\n"), "error", "no text", r"\t", True),
    "byte order mark": (
        lambda f: line(f, b"\xef\xbb\xbf7-9-0000 A\n"),
        "error", "control character", "ufeff", True),
    "no text": (lambda f: line(f, b"7-9-0000 \n"), "error", "no text", "7-9-0000", True),
    "empty line": (lambda f: line(f, b"\n"), "error", "no text", "''", True),
    "reserved word": (
        lambda f: line(f, b"7-9-0000 A </s>\n"), "error", "reserved word", "</s>", True),
    "sentencepiece's space": (
        lambda f: line(f, "7-9-0000 A\u2581B\n".encode()), "error", "reserved word", "A", True),
    "Latin-1": (
        lambda f: line(f, b"7-9-0000 CAF\xc9\n"), "error", "transcript not readable", "0xc9", True),
    "small letters": (
        lambda f: line(f, b"7-9-0000 first\n"), "warning", "small letters", "first", True),
    "digits": (lambda f: line(f, b"7-9-0000 AT 9\n"), "warning", "digits", "AT 9", True),
    "8 kHz": (lambda f: flac(f, rate=8000), "warning", "sample rate", "8000 Hz", True),
    "44.1 kHz": (lambda f: flac(f, rate=44100), "warning", "sample rate", "44100 Hz", True),
    "5 channels": (
        lambda f: flac(f, samples=np.stack([NOISE] * 5, 1)),
        "warning", "channels", "5 channels", True),
    "DC only": (
        lambda f: flac(f, samples=np.full(999, 0.25)), "warning", "constant audio", "0.25", False),
    "silence": (
        lambda f: flac(f, samples=np.zeros(999)), "warning", "constant audio", "is 0", False),
    "no transcript": (
        lambda f: flac(f, "7-9-0002"), "warning", "transcript missing", "7-9-0002.flac", True),
}


@pytest.fixture
def chapter(tmp_path):
    """Folder of a chapter with two good utterances, 7-9-0000 and 7-9-0001."""
    folder = tmp_path / "dev" / "7" / "9"
    folder.mkdir(parents=True)
    flac(folder)
    flac(folder, "7-9-0001")
    line(folder, b"7-9-0000 FIRST LINE\n")
    return folder


def scan(chapter, decode):
    return data.scan_split(chapter.parents[2], "dev", decode=decode)


def test_the_good_corpus_is_good(chapter):
    utterances, problems = scan(chapter, decode=True)
    assert [u.text for u in utterances] == ["FIRST LINE", "SECOND LINE"]
    assert problems == []


@pytest.mark.parametrize("name", BAD)
def test_check_names_the_problem_and_the_other_utterance_stays(chapter, name):
    spoil, level, kind, words, _ = BAD[name]
    spoil(chapter)
    utterances, problems = scan(chapter, decode=True)
    found = [p for p in problems if p.kind == kind]
    assert len(found) == 1, problems
    assert found[0].level == level
    assert words in found[0].message
    assert "7-" in found[0].where  # utterance id, or transcript and line
    if kind != "transcript not readable":
        assert "7-9-0001" in [u.id for u in utterances]


@pytest.mark.parametrize("name", BAD)
def test_training_refuses_errors_before_it_starts_and_lets_warnings_pass(chapter, name):
    spoil, level, kind, _, without_decoding = BAD[name]
    spoil(chapter)
    root = chapter.parents[2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if level == "error" and without_decoding:
            with pytest.raises(ValueError, match=f"error: {kind}: 1"):
                data.read_split(root, "dev")
        else:
            utterances = data.read_split(root, "dev")
            assert "7-9-0001" in [u.id for u in utterances]
            assert without_decoding == any(kind in str(w.message) for w in caught)


@pytest.mark.parametrize("name", [n for n, row in BAD.items() if row[2] == "audio not readable"])
def test_loading_a_bad_file_names_it(chapter, name):
    BAD[name][0](chapter)
    path = next(p for p in sorted(chapter.glob("7-9-0000.*")))
    with pytest.raises((OSError, ValueError), match=path.name):
        features.load_audio(path)


@pytest.mark.parametrize("name", [n for n, row in BAD.items() if row[1] == "error" and row[4]])
def test_skip_bad_leaves_out_what_is_wrong_and_says_how_much(chapter, name):
    BAD[name][0](chapter)
    if name == "Latin-1":
        with pytest.raises(ValueError, match="cannot be used"):  # nothing is left
            data.read_split(chapter.parents[2], "dev", skip_bad=True)
        return
    with pytest.warns(UserWarning, match="dev: 1 problems, what they concern is left out"):
        utterances = data.read_split(chapter.parents[2], "dev", skip_bad=True)
    assert "7-9-0001" in [u.id for u in utterances]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(chapter):
    path = chapter / "7-9-0000.flac"
    path.chmod(0)
    _, [problem] = scan(chapter, decode=False)
    assert str(path) in problem.message
    assert "ermission" in problem.message


def test_a_file_without_permission_is_an_error_of_its_own(chapter, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(chapter / "7-9-0000.flac"))

    monkeypatch.setattr(data, "open_audio", refuse)
    _, problems = scan(chapter, decode=False)
    assert [p.level for p in problems] == ["error", "error"]
    assert "Permission denied" in problems[0].message


@pytest.mark.parametrize(
    ("samples", "rate", "options"),
    [
        (NOISE[:1], 16000, {}),
        (NOISE, 8000, {}),
        (NOISE, 44100, {}),
        (NOISE, 16000, {"subtype": "PCM_24"}),
        (np.stack([NOISE] * 5, 1), 16000, {}),
        (np.full(999, 0.25), 16000, {}),
    ],
    ids=["one sample", "8 kHz", "44.1 kHz", "24 bit", "5 channels", "DC"],
)
def test_odd_audio_has_finite_features(tmp_path, samples, rate, options):
    path = flac(tmp_path, samples=samples, rate=rate, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = features.load_audio(path)
    assert len(loaded) == -(-len(samples) * 16000 // rate)
    for rng in (None, np.random.default_rng(1)):
        feats = features.features(loaded, FeatureConfig(), rng)
        assert feats.isfinite().all()
        assert len(feats) >= 1


def test_24_bit_keeps_what_16_bit_would_round(tmp_path):
    fine = np.arange(-50, 50) / 2**23
    path = flac(tmp_path, samples=fine, subtype="PCM_24")
    assert np.array_equal(features.load_audio(path), fine.astype(np.float32))


def test_a_loop_of_folders_ends(chapter):
    (chapter / "loop").symlink_to(chapter.parents[1])
    (chapter.parent / "loop").symlink_to(chapter.parents[1])
    utterances, problems = scan(chapter, decode=False)
    assert len(utterances) == 2
    assert {(p.level, p.kind) for p in problems} == {("warning", "not a file of a chapter")}


def test_linked_speakers_and_chapters_are_read(chapter):
    speaker = chapter.parent
    speaker.rename(speaker.parent.parent / "elsewhere")
    speaker.symlink_to(speaker.parent.parent / "elsewhere")
    utterances, problems = scan(chapter, decode=False)
    assert len(utterances) == 2
    assert problems == []


@pytest.mark.parametrize("place", ["7-9-0005.flac", "7/7-9-0005.flac", "7/7-9.trans.txt", "7/9/10"])
def test_what_is_in_no_chapter_is_a_warning(chapter, place):
    path = chapter.parents[1] / place
    path.write_bytes(b"") if path.suffix else path.mkdir()
    utterances, [problem] = scan(chapter, decode=False)
    assert len(utterances) == 2
    assert problem[:3] == ("warning", "not a file of a chapter", str(path))


def test_what_macos_leaves_beside_files_does_not_matter(chapter):
    for path in list(chapter.iterdir()):
        (chapter / f"._{path.name}").write_bytes(b"\0\5\x16\7")
    utterances, problems = scan(chapter, decode=True)
    assert len(utterances) == 2
    assert problems == []


@pytest.mark.parametrize("promised", [0xFFFF_FFFF, 0x8000_0000, 0x7FFF_F000])
def test_wav_from_a_pipe_promises_too_much_and_is_read(tmp_path, promised):
    path = wav(tmp_path, NOISE, "PCM_16")
    contents = path.read_bytes()
    at = contents.index(b"data") + 4
    path.write_bytes(contents[:at] + struct.pack("<I", promised) + contents[at + 4 :])
    assert len(features.load_audio(path)) == len(NOISE)


@pytest.mark.parametrize("subtype", ["GSM610", "IMA_ADPCM", "ULAW", "PCM_24", "DOUBLE"])
def test_other_kinds_of_wav_are_read(tmp_path, subtype):
    path = wav(tmp_path, NOISE, subtype)
    samples = features.load_audio(path)
    assert len(NOISE) <= len(samples) < len(NOISE) + 1000  # some are made of blocks


def test_rf64_is_a_wav(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, NOISE, 16000, "FLOAT", format="RF64")
    assert np.array_equal(features.load_audio(path), NOISE.astype(np.float32))
    path.write_bytes(path.read_bytes()[:10000])
    with pytest.raises(ValueError, match="truncated"):
        features.load_audio(path)


def test_integers_as_floats_are_samples_and_what_overflows_is_not(tmp_path):
    for largest in (2**15, 2**31):
        path = wav(tmp_path, largest * NOISE / np.abs(NOISE).max())
        assert features.features(features.load_audio(path)).isfinite().all()
    path = wav(tmp_path, np.where(np.arange(len(NOISE)) < 2, 1e20, NOISE))
    with pytest.raises(ValueError, match="2 samples not finite, or larger than 1e\\+10"):
        features.load_audio(path)
    path = wav(tmp_path, NOISE / np.abs(NOISE).max() * features.LOUDEST)
    for rng in (None, np.random.default_rng(1)):
        assert features.features(features.load_audio(path), rng=rng).isfinite().all()


def test_a_changed_corpus_is_seen_at_the_next_look(chapter):
    assert scan(chapter, decode=False)[1] == []
    truncated_flac(chapter)
    assert [p.kind for p in scan(chapter, decode=False)[1]] == ["audio not readable"]


def test_check_lists_ten_of_each_kind_and_counts_all(tmp_path, capsys):
    folder = tmp_path / "dev" / "7" / "9"
    folder.mkdir(parents=True)
    texts = [f"7-9-{i:04d} WORD" for i in range(14)]
    for i in range(12):
        (folder / f"7-9-{i:04d}.flac").write_bytes(b"")
    flac(folder, "7-9-0012")
    (folder / "7-9.trans.txt").write_text("\n".join(texts) + "\n")
    assert prepare.check(tmp_path, ["dev"]) is False
    lines = capsys.readouterr().out.splitlines()
    assert "  error: audio not readable: 12" in lines
    assert "      ... and 2 more" in lines
    assert "  error: audio missing: 1" in lines
    assert sum("empty file" in text for text in lines) == 10
