# SPDX-License-Identifier: Apache-2.0
"""`prepare import` makes LibriSpeech's tree of other forms, and names every row that it leaves out.

python -m pytest tests/test_corpora.py
"""

import errno
import json
import os
import subprocess
import textwrap

import numpy as np
import pytest
import soundfile
from tones import REPO

from tools import corpora, prepare

RATE_HZ = 16000
# Two seconds of noise in int16: every sample differs from its neighbours.
NOISE = np.random.default_rng(1).integers(-3000, 3000, 2 * RATE_HZ, dtype=np.int16)


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with the recording a.wav."""
    folder = tmp_path / "source"
    folder.mkdir()
    soundfile.write(folder / "a.wav", NOISE, RATE_HZ)
    return folder


@pytest.fixture
def root(tmp_path):
    return tmp_path / "corpus"


@pytest.fixture
def bring(root, capsys):
    """Runs the command; returns the lines that it prints to standard output."""

    def bring(source, *argv, status=0):
        assert prepare.main(["import", str(source), str(root), "train", *argv]) == status
        return capsys.readouterr().out.splitlines()

    return bring


@pytest.fixture
def refuse(root, capsys):
    """Runs a command that must fail; returns its message."""

    def refuse(source, split="train"):
        assert prepare.main(["import", str(source), str(root), split]) == 1
        return capsys.readouterr().err.removeprefix("tools.prepare: ")

    return refuse


def write_json(folder, *rows):
    """Write a manifest of NeMo's form; a row is an object or the text of a line."""
    path = folder / "train.json"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_kaldi(folder, **files):
    for name, text in files.items():
        (folder / name.replace("_scp", ".scp")).write_text(text, encoding="utf-8")
    return folder


def read_corpus(root):
    """Read the split as [(speaker, text, int16 samples)], ordered by id."""
    found = []
    for path in sorted((root / "train").glob("*/*/*.trans.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            utterance, text = line.split(" ", 1)
            samples, rate = soundfile.read(path.parent / f"{utterance}.flac", dtype="int16")
            assert (rate, samples.ndim) == (RATE_HZ, 1)
            assert utterance.startswith(f"{path.parts[-3]}-1-")
            found.append((path.parts[-3], text, samples))
    return found


def read_tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


GOOD = {"audio_filepath": "a.wav", "text": "good"}

# ------------------------------------------------------------------------------- the three sources


def test_json_lines_are_cut_at_their_offsets(folder, root, bring):
    source = write_json(
        folder,
        {"audio_filepath": "a.wav", "text": "first half", "offset": 0, "duration": 1.0},
        {"audio_filepath": str(folder / "a.wav"), "text": "second half", "offset": 1.25,
         "duration": 0.5, "speaker": 7},
    )
    assert bring(source)[-1] == f"{root}/train: 2 utterances, 0 left out"
    (speaker_7, second), (speaker, first) = [(x[0], x) for x in read_corpus(root)]
    assert (speaker_7, second[1], speaker, first[1]) == ("7", "SECOND HALF", "train", "FIRST HALF")
    assert np.array_equal(first[2], NOISE[:16000])
    assert np.array_equal(second[2], NOISE[20000:28000])


def test_tab_separated_values_have_their_audio_in_clips(folder, root, bring):
    if "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile reads no MP3")
    (folder / "clips").mkdir()
    stereo = np.stack([NOISE / 2**15] * 2, 1)
    soundfile.write(folder / "clips/b.mp3", stereo, 48000, format="MP3")
    source = folder / "train.tsv"
    row = "xy/1\tb.mp3\tSo \u201cit\u2019s\u201d!\t\r\n"
    source.write_text(f"client_id\tpath\tsentence\tage\r\n{row}", encoding="utf-8")
    bring(source)
    [(speaker, text, samples)] = read_corpus(root)
    assert (speaker, text) == ("xy_1", "SO IT'S")
    assert len(samples) == pytest.approx(len(NOISE) / 3, abs=600)  # MP3 has blocks of 1152 samples


def test_a_kaldi_folder_has_segments_and_speakers(folder, root, bring):
    bring(write_kaldi(
        folder, wav_scp=f"rec {folder}/a.wav\n", text="s-2 second one\ns-1 first\n",
        segments="s-1 rec 0.5 1.0\ns-2 rec 1.5 -1\n", utt2spk="s-1 eve\ns-2 eve\n",
    ))
    (_, first, early), (_, second, late) = found = read_corpus(root)
    assert ({x[0] for x in found}, first, second) == ({"eve"}, "FIRST", "SECOND ONE")
    assert np.array_equal(early, NOISE[8000:16000])
    assert np.array_equal(late, NOISE[24000:])


def test_a_kaldi_folder_without_segments_has_whole_recordings(folder, root, bring):
    bring(write_kaldi(folder, wav_scp="utt a.wav\n", text="utt all of it\n"))
    [(speaker, text, samples)] = read_corpus(root)
    assert (speaker, text) == ("train", "ALL OF IT")
    assert np.array_equal(samples, NOISE)


def test_other_rates_and_channels_become_16_khz_mono(folder, root, bring):
    seconds = np.arange(44100) / 44100
    tone = 0.4 * np.sin(2 * np.pi * 500 * seconds)
    soundfile.write(folder / "b.ogg", np.stack([tone, 0 * tone, -0.5 * tone], 1), 44100)
    bring(write_json(folder, {"audio_filepath": "b.ogg", "text": "tone"}))
    [(_, _, samples)] = read_corpus(root)
    assert len(samples) == 16000
    expected = 0.4 / 6 * 2**15 * np.sin(2 * np.pi * 500 * np.arange(16000) / RATE_HZ)
    assert np.abs(samples - expected)[800:-800].mean() < 60  # Vorbis is not exact


def test_the_imported_split_has_no_problem(folder, root, bring, capsys):
    bring(write_json(folder, GOOD, {**GOOD, "offset": 1, "speaker": "a-b"}))
    assert prepare.main(["check", str(root)]) == 0
    assert capsys.readouterr().out == (
        "train: 2 utterances, 0.00 h, 2 words, 1 distinct words, 2 speakers\n")


def test_a_log_has_lines_of_progress(folder, root, capsys):
    assert prepare.main(["import", str(write_json(folder, GOOD)), str(root), "train"]) == 0
    log = capsys.readouterr().err
    assert "\r" not in log
    assert [line[:12] for line in log.splitlines()] == ["train:   0%|", "train: 100%|"]


def test_a_source_of_no_known_form_is_an_error_that_lists_them(folder, root, refuse):
    (folder / "list.csv").write_text("wav_filename,transcript\na.wav,hello\n")
    for source, found in (
        (folder, "a folder with a.wav, list.csv"),
        (folder / "list.csv", "a file that begins with 'wav_filename,transcript'"),
    ):
        assert refuse(source) == (
            f"{source}: found {found}; looked for JSON lines with audio_filepath (NeMo), "
            "tab-separated values with columns path and sentence (Common Voice), a folder with "
            "wav.scp and text (Kaldi)\n")
    assert not root.exists()


def test_a_source_without_rows_is_an_error(folder, root, refuse):
    source = folder / "empty.tsv"
    source.write_text("path\tsentence\n")
    assert refuse(source) == f"{source}: no utterance in it\n"
    assert list(root.iterdir()) == []


# ------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(("argv", "text"), [
    ((), "E\u0301COLE L'AN VINGT DEUX DON'T"),
    (("--keep-case",), "E\u0301cole l'an vingt deux don't"),
    (("--keep-punctuation",), "\u00ab E\u0301COLE: \u00bb 'L\u2019AN VINGT-DEUX, DON'T'!"),
    (("--keep-case", "--keep-punctuation"),
     "\u00ab E\u0301cole: \u00bb 'l\u2019an vingt-deux, don't'!"),
])
def test_texts_follow_the_printed_rule(folder, root, bring, argv, text):
    raw = "\u00ab E\u0301cole:\u00a0\u00bb\t'l\u2019an\nvingt-deux, don't'!\ufeff"
    first, *_ = bring(write_json(folder, {**GOOD, "text": raw}), *argv)
    assert [x[1] for x in read_corpus(root)] == [text.replace("E\u0301", "\u00c9")]
    case = "case kept" if "--keep-case" in argv else "in capitals"
    punctuation = "punctuation kept" if "--keep-punctuation" in argv else (
        "punctuation and symbols become spaces, but for apostrophes within words")
    assert first == f"text: Unicode NFC, one space between words, {case}, {punctuation}"


# --------------------------------------------------------------------------- rows that are left out

MISSING, NOT_READABLE, TIMES = "audio missing", "line not readable", "times not valid"
EXPECTED = "expected a JSON object with audio_filepath and text: "


@pytest.mark.parametrize(("row", "kind", "message"), [
    ({**GOOD, "audio_filepath": "../source/a.wav"}, MISSING, "'../source/a.wav' leads outside of "),
    ({**GOOD, "audio_filepath": "b/../../x.wav"}, MISSING, "'b/../../x.wav' leads outside of "),
    ({**GOOD, "audio_filepath": "b.wav"}, MISSING, "'{folder}/b.wav' is not there, or no file"),
    ({**GOOD, "audio_filepath": "x" * 300}, MISSING, "'{folder}/xxx"),
    ({**GOOD, "audio_filepath": "/dev/zero"}, MISSING, "'/dev/zero' is not there, or no file"),
    ({**GOOD, "audio_filepath": ""}, MISSING, "'{folder}' is not there, or no file"),
    ({**GOOD, "audio_filepath": "a.wav\0"}, MISSING, r"'{folder}/a.wav\x00' is not there"),
    ({**GOOD, "audio_filepath": "train.json"}, "audio not readable",
     "{folder}/train.json: not readable as audio: "),
    ({**GOOD, "offset": 2.5}, TIMES,
     "{folder}/a.wav: from 2.5 s, but the recording ends at 2.00 s"),
    ({**GOOD, "offset": 1.5, "duration": 1.1}, TIMES,
     "{folder}/a.wav: from 1.5 s to 2.6 s, but the recording ends at 2.00 s"),
    ({**GOOD, "offset": 1e308}, TIMES,
     "{folder}/a.wav: from 1e+308 s, but the recording ends at 2.00 s"),
    ({**GOOD, "offset": 1, "duration": 1e-6}, TIMES, "{folder}/a.wav: no sample from 1 s"),
    ({**GOOD, "offset": -1}, TIMES, "from -1 s"),
    ({**GOOD, "offset": float("nan")}, TIMES, "from nan s"),
    ({**GOOD, "duration": 0}, TIMES, "from 0 s to 0 s"),
    ({"audio_filepath": "a.wav"}, "no text", "no word in ''"),
    ({**GOOD, "text": " \u2026!"}, "no text", "no word in ' \u2026!'"),
    ({**GOOD, "text": "a\ud800"}, "text not UTF-8", r"'A\ud800'"),
    (GOOD, "duplicate id", "{folder}/train.json:1 is the same"),
    ({**GOOD, "text": "another text"}, "duplicate id", "{folder}/train.json:1 is the same"),
    ("{broken", NOT_READABLE, EXPECTED + "'{broken'"),
    ('["a.wav", "text"]', NOT_READABLE, EXPECTED),
    ({"audio_filepath": 5, "text": "x"}, NOT_READABLE, EXPECTED),
    ({**GOOD, "offset": "soon"}, NOT_READABLE, EXPECTED),
    ({**GOOD, "offset": 10**400}, NOT_READABLE, EXPECTED),
    ("[" * 10**5, NOT_READABLE, EXPECTED),
])
def test_a_bad_row_is_named_and_the_others_are_imported(folder, root, bring, row, kind, message):
    source = write_json(folder, GOOD, "", row, {**GOOD, "offset": 1})
    lines = bring(source, status=1)
    assert lines[1] == f"error: {kind}: 1"
    assert lines[2].startswith(f"    {source}:3: {message.replace('{folder}', str(folder))}")
    assert lines[3:] == [f"{root}/train: 2 utterances, 1 left out"]
    assert sorted(len(samples) for _, _, samples in read_corpus(root)) == [16000, 32000]


def test_a_word_that_sentencepiece_reserves_is_left_out(folder, bring):
    source = write_json(folder, {**GOOD, "text": "a </s>"})
    assert bring(source, "--keep-case", "--keep-punctuation", status=1)[1] == (
        "error: reserved word: 1")


def test_an_end_up_to_half_a_second_late_is_that_of_the_recording(folder, root, bring):
    bring(write_json(folder, {**GOOD, "offset": 1.5, "duration": 1.0}))
    assert np.array_equal(read_corpus(root)[0][2], NOISE[24000:])


def test_bad_lines_of_a_kaldi_folder_are_named(folder, root, bring):
    lines = bring(write_kaldi(
        folder, wav_scp="a a.wav\nb sph2pipe b.sph |\na other.wav\nd ../d.wav\n",
        text="1 one\n9 nine\n1 more\n6 six\n7 seven\n",
        segments="1 a 0 1\n2 a 1 2\n3 b 0 1\n4 c 0 1\n5 a 0\n6 d 0 1\n7 a 1 9\n",
    ), status=1)
    assert sorted(line.strip().replace(f"{folder}/", "") for line in lines[1:-1]) == sorted([
        "error: duplicate id: 2", "wav.scp:3: a has a line already", "text:3: 1 has a line already",
        "error: audio missing: 4", f"segments:6: '../d.wav' leads outside of {folder}",
        "error: times not valid: 1",
        "segments:7: a.wav: from 1 s to 9 s, but the recording ends at 2.00 s",
        "segments:4: c has no file in wav.scp",
        "segments:3: b: 'sph2pipe b.sph |' is a command, expected a file",
        "text:2: 9 has no line in segments or wav.scp",
        "error: line not readable: 1",
        "segments:5: expected a recording, start and end in seconds: 'a 0'",
        "error: no text: 1", "segments:2: no word in ''",
    ])
    assert [x[1] for x in read_corpus(root)] == ["ONE"]


def test_bad_rows_of_tab_separated_values_are_named(folder, root, bring):
    source = folder / "train.tsv"
    rows = ["path\tsentence", "a.wav\tfine", "../a.wav\tx", "a.wav\tfine", "a.wav\ttwo\tcells"]
    source.write_text("\n".join(rows))
    assert bring(source, status=1)[1:-1] == [
        "error: audio missing: 1", f"    {source}:3: '../a.wav' leads outside of {folder}",
        "error: duplicate id: 1", f"    {source}:4: {source}:2 is the same",
        "error: line not readable: 1",
        f"    {source}:5: 3 columns, expected 2 as in the first line",
    ]
    assert [x[1] for x in read_corpus(root)] == ["FINE"]


def test_names_of_the_source_lead_nowhere(folder, root, bring, tmp_path):
    names = ["../../evil", ".", "a b\tc", "x" * 300, "\u00fc\u4e2d" * 200, None]
    bring(write_json(folder, *({**GOOD, "speaker": name} for name in names)))
    assert {path.name for path in (root / "train").iterdir()} == {
        "_evil", "_", "a_b_c", "x" * 28, "\u00fc\u4e2d" * 14, "train", "source.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "corpus"}


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp"])
def test_a_split_that_is_no_folder_name_is_an_error(folder, root, refuse, name):
    message = refuse(write_json(folder, GOOD), name)
    assert message == f"split {name!r}, expected the name of one folder\n"
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(("form", "files"), [
    ("Multilingual LibriSpeech", {"transcripts.txt": "7_8_0001\tgood morning\n"}),
    ("LibriTTS", {"7/8/7_8_0001.normalized.txt": "good\nmorning\n"}),
])
def test_the_tables_of_the_corpora_page_can_be_imported(folder, root, bring, form, files):
    page = (REPO / "docs" / "corpora.md").read_text(encoding="utf-8")
    _, _, rest = page.partition(f"{form}, in the folder of a split")
    script = rest[rest.index("\n\n    ") : rest.index("\n\n", rest.index("> split.tsv"))]
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for audio in ("audio/7/8/7_8_0001.flac", "7/8/7_8_0001.wav"):
        (folder / audio).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / audio, NOISE, RATE_HZ)
    subprocess.run(["bash", "-ec", textwrap.dedent(script)], cwd=folder, check=True)
    bring(folder / "split.tsv")
    ((speaker, text, samples),) = read_corpus(root)
    assert (speaker, text) == ("7", "GOOD MORNING")
    assert np.array_equal(samples, NOISE)


# -------------------------------------------------------------------------------- making it again


@pytest.fixture
def half(folder):
    """Returns a source of twenty utterances in five recordings."""
    for number in range(5):
        soundfile.write(folder / f"{number}.wav", np.roll(NOISE, number), RATE_HZ)
    return write_json(folder, *(
        {"audio_filepath": f"{i % 5}.wav", "text": f"number {i}", "offset": i / 20, "duration": 0.5}
        for i in range(20)))


def test_an_interrupted_import_continues_with_what_is_missing(half, root, bring, monkeypatch,
                                                              tmp_path):
    write, written = corpora.write_whole, []

    def interrupt(path, contents):
        if len(written) >= 7:
            raise KeyboardInterrupt
        written.append(path)
        write(path, contents)

    monkeypatch.setattr(corpora, "write_whole", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(["import", str(half), str(root), "train"])
    assert len(written) >= 7  # threads have written the others
    monkeypatch.setattr(corpora, "write_whole",
                        lambda path, contents: written.append(path) or write(path, contents))
    assert bring(half)[-1] == f"{root}/train: 20 utterances, 0 left out"
    flacs = [path for path in written if path.suffix == ".flac"]
    assert (len(flacs), len(set(flacs))) == (20, 20)
    assert prepare.main(["import", str(half), str(tmp_path / "other"), "train"]) == 0
    assert read_tree(root) == read_tree(tmp_path / "other")


def test_a_repaired_source_is_imported_without_decoding_again(half, root, bring):
    bring(half)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.flac")}
    rows = half.read_text().splitlines()
    half.write_text("\n".join([rows[0].replace("number 0", "zero"), *rows[1:], json.dumps(GOOD)]))
    assert bring(half)[-1] == f"{root}/train: 21 utterances, 0 left out"
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {"ZERO", "NUMBER 1", "GOOD"} < {x[1] for x in read_corpus(root)}


def test_a_chapter_whose_speaker_is_corrected_is_left(folder, root, bring):
    source = folder / "train.tsv"
    for speaker in ("ann", "bob"):
        source.write_text(f"client_id\tpath\tsentence\n{speaker}\ta.wav\tgood\n")
        assert bring(source)[-1] == f"{root}/train: 1 utterances, 0 left out"
    ((speaker, text, _),) = read_corpus(root)
    assert (speaker, text) == ("bob", "GOOD")


def test_a_split_of_another_source_is_not_touched(half, folder, root, bring, refuse):
    bring(half)
    before = read_tree(root)
    other = half.rename(folder / "other.json")
    assert refuse(other) == (
        f"{root}/train: holds something other than an import of {other}; choose another split\n")
    assert read_tree(root) == before


def test_a_full_disk_ends_the_import_with_the_reason_of_the_system(half, refuse, monkeypatch):
    def fail(path, contents):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(corpora, "write_whole", fail)
    assert "No space left on device" in refuse(half)
