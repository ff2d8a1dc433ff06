# SPDX-License-Identifier: Apache-2.0
"""data.py finds every defect of a corpus, and turns a good one into tokens, buckets and batches.

    python -m pytest tests/test_data.py

Corpora are written into temporary folders.
"""

import itertools
import multiprocessing
import os
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from tones import TRAIN_TEXTS, tiny_corpus

import data
import features
from data import Problem, Utterance
from features import FeatureConfig
from tools import prepare

NOISE = 0.1 * np.random.default_rng(1).standard_normal(16000)

# ------------------------------------------------------------------------------- a corpus on disk


class Corpus:
    """Split "dev" of two good utterances of one second, 7-9-0000 and 7-9-0001."""

    def __init__(self, root: Path):
        self.root = root
        self.folder = root / "dev" / "7" / "9"
        self.transcript = self.folder / "7-9.trans.txt"
        self.first = self.flac()  # the file of the first utterance
        self.flac("7-9-0001")
        self.lines(b"7-9-0000 FIRST LINE")

    def flac(self, utterance_id="7-9-0000", samples=NOISE, rate=16000) -> Path:
        path = self.root.joinpath("dev", *utterance_id.split("-")[:2], f"{utterance_id}.flac")
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, rate)
        return path

    def wav(self, samples, subtype="FLOAT", name="WAV") -> Path:
        """Replaces the first utterance's file; `name` is that of a format."""
        self.first.unlink()
        path = self.first.with_suffix(".wav")
        soundfile.write(path, samples, 16000, subtype=subtype, format=name)
        return path

    def lines(self, *first: bytes) -> None:
        """Writes the transcript; its last line is that of the second utterance."""
        self.transcript.write_bytes(b"".join(x + b"\n" for x in (*first, b"7-9-0001 SECOND LINE")))

    def scan(self, decode=False) -> tuple[list[Utterance], list[Problem]]:
        return data.separate(data.scan_split(self.root, "dev", decode=decode))


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return Corpus(tmp_path)


def test_good_split_has_its_utterances_by_id_and_no_problem(corpus):
    corpus.flac("7-9-0002", NOISE[:2400])
    corpus.lines(b"7-9-0002 THIRD", b"7-9-0000 FIRST")
    assert list(data.scan_split(corpus.root, "dev", decode=True)) == [
        Utterance("7-9-0000", str(corpus.first), 1.0, "FIRST"),
        Utterance("7-9-0001", str(corpus.folder / "7-9-0001.flac"), 1.0, "SECOND LINE"),
        Utterance("7-9-0002", str(corpus.folder / "7-9-0002.flac"), 0.15, "THIRD"),
    ]


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".wav", "WAV"), (".ogg", "OGG"), (".FLAC", "FLAC"), (".mp3", "MP3"), (".opus", "OGG"),
     (".WAV", "NIST"), (".wav", "RF64"), (".sph", "NIST"), (".aiff", "AIFF"), (".au", "AU")],
)
def test_other_suffixes_are_audio_too(corpus, suffix, name):
    corpus.first.unlink()
    path = corpus.first.with_suffix(suffix)
    subtype = "OPUS" if suffix == ".opus" else None
    soundfile.write(path, NOISE, 16000, format=name, subtype=subtype)
    utterances, problems = corpus.scan(decode=True)
    assert utterances[0].path == str(path)
    assert problems == []


def test_accents_and_white_space_in_transcripts_have_one_form(corpus):
    corpus.lines("7-9-0000   E\u0301COLE   \u00c9COLE  ".encode())
    assert [u.text for u in corpus.scan()[0]] == ["\u00c9COLE \u00c9COLE", "SECOND LINE"]


def test_a_corpus_in_small_letters_is_no_problem(corpus):
    corpus.transcript.write_text("7-9-0000 first\n7-9-0001 second\n")
    assert corpus.scan()[1] == []


def test_files_that_are_no_audio_do_not_matter(corpus):
    (corpus.folder / "7-9-0008.txt").write_text("notes")
    for path in list(corpus.folder.iterdir()):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")  # as macOS leaves them
    utterances, problems = corpus.scan(decode=True)
    assert len(utterances) == 2
    assert problems == []


def test_linked_speakers_are_read_and_a_loop_of_folders_ends(corpus):
    speaker = corpus.folder.parent
    speaker.rename(corpus.root / "elsewhere")
    speaker.symlink_to(corpus.root / "elsewhere")
    for place in (corpus.folder, speaker):
        (place / "loop").symlink_to(speaker)
    utterances, problems = corpus.scan()
    assert len(utterances) == 2
    assert {p.kind for p in problems} == {"not a file of a chapter"}


# -------------------------------------------------------------------------------------- bad input


def truncated_flac(corpus):
    contents = corpus.first.read_bytes()
    corpus.first.write_bytes(contents[: len(contents) // 2])


def damaged_flac(corpus):
    contents = bytearray(corpus.first.read_bytes())
    contents[len(contents) // 2] ^= 8
    corpus.first.write_bytes(contents)


def short_wav(corpus, name):
    path = corpus.wav(NOISE, "PCM_16", name)
    path.write_bytes(path.read_bytes()[:10000])


def exchange_frames(corpus):
    """Puts other audio behind a header; libsndfile decodes it without an error."""
    good = corpus.first.read_bytes()
    other = corpus.flac(samples=NOISE[::-1]).read_bytes()
    corpus.first.write_bytes(good[:42] + other[42:])


def link_to_itself(corpus):
    corpus.first.unlink()
    corpus.first.symlink_to(corpus.first)


def second_recording(corpus, place):
    path = corpus.root / "dev" / place
    path.parent.mkdir(exist_ok=True)
    path.with_name(f"7-{path.parent.name}.trans.txt").touch()
    soundfile.write(path, NOISE, 16000)


class Bad(NamedTuple):
    """A way to spoil a good corpus, and the one problem that then is found."""

    spoil: Callable[[Corpus], object]
    kind: str
    message: str  # its beginning; {folder} is that of the chapter
    where: str = "7-9-0000"
    level: str = "error"
    decoded: bool = False  # only a scan that decodes all audio finds it


FLAC, WAV = "{folder}/7-9-0000.flac: ", "{folder}/7-9-0000.wav: "
LINE_1, LINE_2 = "{folder}/7-9.trans.txt:1", "{folder}/7-9.trans.txt:2"
NAN = np.where(np.arange(16000) == 8000, np.nan, NOISE)
AUDIO, CONTROL = "audio not readable", "control character"


def bad_line(line: str | bytes, kind: str, message: str, **more) -> Bad:
    """The first line of the transcript is `line`."""
    contents = line if isinstance(line, bytes) else line.encode()
    return Bad(lambda c: c.lines(contents), kind, message, **{"where": LINE_1, **more})


def bad_place(place: str) -> Bad:
    """A folder, or a file that no chapter holds."""
    def spoil(corpus):
        path = corpus.root / "dev" / place
        path.touch() if path.suffix else path.mkdir()

    return Bad(spoil, "not a file of a chapter", "it is ignored", "{root}/dev/" + place, "warning")


BAD = {
    "zero bytes": Bad(lambda c: c.first.write_bytes(b""), AUDIO, FLAC + "the file is empty"),
    "git-LFS pointer": Bad(lambda c: c.first.write_bytes(b"version https://git-lfs.github.com/"),
                           AUDIO, FLAC + "a git-LFS pointer"),
    "text": Bad(lambda c: c.first.write_bytes(b"no audio" * 999), AUDIO,
                FLAC + "not readable as audio: "),
    "no samples": Bad(lambda c: c.wav([]), AUDIO, WAV + "the file has no samples"),
    "truncated FLAC": Bad(truncated_flac, AUDIO, FLAC + "truncated: the end is missing"),
    "WAV header promises more": Bad(lambda c: short_wav(c, "WAV"), AUDIO,
                                    WAV + "truncated: the end is missing"),
    "damaged FLAC": Bad(damaged_flac, AUDIO, FLAC + "damaged audio: ", decoded=True),
    "RF64 header promises more": Bad(lambda c: short_wav(c, "RF64"), AUDIO,
                                     WAV + "truncated: the end is missing"),
    "FLAC of another MD5": Bad(exchange_frames, AUDIO, FLAC + "damaged audio: the MD5 of its "
                               "samples is ", decoded=True),
    "NaN": Bad(lambda c: c.wav(NAN), AUDIO, WAV + "1 samples not finite", decoded=True),
    "link to itself": Bad(link_to_itself, AUDIO, FLAC + "Too many levels of symbolic links"),
    "short": Bad(lambda c: c.flac(samples=NOISE[:800]), "short recording", FLAC + "0.050 s",
                 level="warning"),
    "constant": Bad(lambda c: c.flac(samples=np.full(1600, 0.25)), "constant audio",
                    FLAC + "every sample is 0.25", level="warning", decoded=True),
    "8 kHz": Bad(lambda c: c.flac(samples=NOISE[:8000], rate=8000), "sample rate",
                 FLAC + "8000 Hz, will be resampled to 16000", level="warning"),
    "5 channels": Bad(lambda c: c.flac(samples=np.stack([NOISE] * 5, 1)), "channels",
                      FLAC + "5 channels, will be averaged", level="warning"),
    "wav beside flac": Bad(lambda c: second_recording(c, "7/9/7-9-0000.wav"), "duplicate recording",
                           "{folder}/7-9-0000.flac and {folder}/7-9-0000.wav"),
    "recording in two chapters": Bad(
        lambda c: second_recording(c, "7/8/7-9-0000.flac"), "duplicate recording",
        "{root}/dev/7/8/7-9-0000.flac and {folder}/7-9-0000.flac"),
    "audio missing": Bad(lambda c: c.first.unlink(), "audio missing",
                         "{folder}/7-9-0000.flac does not exist", LINE_1),
    "line missing": Bad(lambda c: c.flac("7-9-0007"), "transcript missing",
                        "{folder}/7-9-0007.flac has no transcript", "7-9-0007", "warning"),
    "transcript missing": Bad(
        lambda c: c.flac("7-8-0000"), "transcript file missing",
        "found audio, expected 7-8.trans.txt; docs/corpora.md tells how to import other forms",
        "{root}/dev/7/8"),
    "Latin-1": bad_line(b"7-9-0000 CAF\xc9", "transcript not readable", "'utf-8' codec can't",
                        where="{folder}/7-9.trans.txt"),
    "id only": bad_line("7-9-0000", "no text", "'7-9-0000' has no text after an id"),
    "spaces only": bad_line("7-9-0000  ", "no text", "'7-9-0000  ' has no text after an id"),
    "empty line": bad_line("", "no text", "'' has no text after an id"),
    "tab after the id": bad_line(
        "7-9-0000\tA", CONTROL, r"'7-9-0000\tA' has a tab, expected a space; remedy: sed -i "),
    "tab": bad_line("7-9-0000 A\tB", CONTROL, r"'7-9-0000 A\tB' has a tab, expected a space; "),
    "CRLF": bad_line("7-9-0000 A\r", CONTROL, r"'7-9-0000 A\r' has a carriage return (CRLF), "),
    "byte order mark": bad_line("\ufeff7-9-0000 A", CONTROL,
                                r"'\ufeff7-9-0000 A' has a byte order mark, expected none; "),
    "form feed": bad_line("7-9-0000 A\fB", CONTROL, r"'7-9-0000 A\x0cB' has a control character"),
    "reserved word": bad_line("7-9-0000 A </s>", "reserved word", "'7-9-0000 A </s>'"),
    "sentencepiece's space": bad_line("7-9-0000 A\u2581B", "reserved word", "'7-9-0000 A\u2581B'"),
    "id of another chapter": bad_line("7-10-0000 A", "id not of its folder",
                                      "'7-10-0000' does not begin with 7-9-"),
    "id twice": Bad(lambda c: c.lines(b"7-9-0000 A", b"7-9-0000 B"), "duplicate id", "7-9-0000",
                    LINE_2),
    "digits": bad_line("7-9-0000 AT 9", "digits", "'7-9-0000 AT 9' is not written out",
                       level="warning"),
    "small letters": bad_line("7-9-0000 first", "small letters", "first", where="7-9-0000",
                              level="warning"),
    **{f"stray {place}": bad_place(place)
       for place in ("7-9-0005.flac", "7/7-9-0005.flac", "7/7-9.trans.txt", "7/9/10")},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_scan_finds_the_problem_and_keeps_the_other_utterance(corpus, bad):
    bad.spoil(corpus)
    names = {"folder": corpus.folder, "root": corpus.root}
    utterances, problems = corpus.scan(decode=True)
    [found] = [p for p in problems if p.kind == bad.kind]
    assert found[:3] == (bad.level, bad.kind, bad.where.format(**names))
    assert found.message.startswith(bad.message.format(**names))
    # Audio whose line is bad has no transcript.
    assert {p.kind for p in problems} <= {bad.kind, "transcript missing"}
    assert ("7-9-0001" in [u.id for u in utterances]) == (bad.kind != "transcript not readable")
    # Errors of a line or file leave its utterance out, warnings do not.
    if bad.kind in (AUDIO, CONTROL, "no text") or bad.level == "warning":
        assert ("7-9-0000" in [u.id for u in utterances]) == (bad.level == "warning")
    # Headers show all problems but those inside the audio.
    assert (bad.kind in [p.kind for p in corpus.scan()[1]]) == (not bad.decoded)


def test_the_first_of_two_recordings_is_used(corpus):
    second_recording(corpus, "7/9/7-9-0000.wav")
    assert corpus.scan()[0][0].path == str(corpus.first)


def test_duration_does_not_depend_on_rate_and_channels(corpus):
    corpus.flac(samples=np.stack([NOISE] * 2, 1), rate=8000)
    assert [u.duration_s for u in corpus.scan()[0]] == [2.0, 1.0]


def test_a_folder_that_cannot_be_read_is_an_error(corpus, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(corpus.folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    problem = Problem("error", "folder not readable", str(corpus.folder), "Permission denied")
    assert corpus.scan() == ([], [problem])


@pytest.mark.parametrize(("character", "place"), [("\r", "end"), ("\t", "id"), ("\ufeff", "start")])
def test_the_remedy_in_a_message_repairs_the_transcript(corpus, character, place):
    good = "7-9-0000 FIRST\n7-9-0001 SECOND\n"
    bad = {"end": good.replace("\n", "\r\n"), "id": good.replace(" ", "\t"),
           "start": character + good}[place]
    corpus.transcript.write_bytes(bad.encode())
    problem = next(p for p in corpus.scan()[1] if p.kind == "control character")
    subprocess.run(problem.message.partition("remedy: ")[2], shell=True, check=True)
    assert corpus.transcript.read_bytes() == good.encode()
    assert corpus.scan()[1] == []


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_the_md5_of_good_flac_is_that_of_its_header(tmp_path, subtype, channels):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.stack([NOISE, -NOISE], 1)[:, :channels], 16000, subtype)
    assert any(path.read_bytes()[26:42])
    data.verify_md5(str(path))
    contents = bytearray(path.read_bytes())
    contents[41] ^= 1
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"a.flac: damaged audio: .* its header states .*"
                                         f"{contents[41]:02x}$"):
        data.verify_md5(str(path))
    contents[26:42] = bytes(16)  # not set
    path.write_bytes(contents)
    data.verify_md5(str(path))


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_inside_flac_are_found(corpus, seed):
    path = corpus.flac(samples=np.tile(NOISE, 4))
    rng, contents = np.random.default_rng(seed), bytearray(path.read_bytes())
    start = len(contents) // 4 + int(rng.integers(len(contents) // 2))
    contents[start : start + 4000] = rng.bytes(4000)
    path.write_bytes(contents)
    [problem] = corpus.scan(decode=True)[1]
    assert problem.message.startswith(f"{path}: damaged audio: ")


# -------------------------------------------------------------------------- a corpus elsewhere

NAMED = "the corpus to name is {root}, with the splits dev"


@pytest.mark.parametrize(("root", "split", "hint"), [
    ("{root}", "test", NAMED),
    ("{root}/..", "dev", NAMED),
    ("{root}/dev", "dev", NAMED),
    ("{root}/dev/7", "dev", NAMED),
    ("{root}/nowhere", "dev", "there is no folder {root}/nowhere"),
])
def test_missing_split_is_an_error_that_tells_where_the_corpus_is(tmp_path, root, split, hint):
    corpus = Corpus(tmp_path / "corpora" / "mine")
    named = root.replace("{root}", str(corpus.root))
    [problem] = data.scan_split(named, split)
    assert problem[:3] == ("error", "split missing", f"{named}/{split}")
    found = problem.message.replace(f"{corpus.root}/../mine", str(corpus.root))
    assert found == "no such folder; " + hint.replace("{root}", str(corpus.root))


def test_a_corpus_at_a_relative_path_is_found_one_level_up(tmp_path, monkeypatch):
    corpus = Corpus(tmp_path)
    monkeypatch.chdir(corpus.root / "dev")
    assert data.describe_layout(Path()) == NAMED.format(root=corpus.root)


# Multilingual LibriSpeech has its transcripts in one file, LibriTTS has a file for each recording.
@pytest.mark.parametrize(("audio", "text"), [
    ("train/audio/201/1/201_1_000.flac", "train/transcripts.txt"),
    ("train/201-1-0000.wav", "train/201-1-0000.txt"),
])
def test_a_split_of_another_form_is_described(tmp_path, audio, text):
    for name in (audio, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    problem = list(data.scan_split(tmp_path, "train"))[-1]
    assert problem == Problem(
        "error", "split empty", str(tmp_path / "train"),
        f"it has no utterance in */*/*.trans.txt; found {tmp_path}/{audio} and {tmp_path}/{text}, "
        "expected <split>/<speaker>/<chapter>/*.trans.txt; docs/corpora.md tells how to import "
        "other forms")
    with pytest.raises(FileNotFoundError, match=f"found {tmp_path}/{audio} and {tmp_path}/{text}"):
        prepare.check(tmp_path, [])


def test_a_text_file_beside_each_recording_is_described(tmp_path):
    folder = tmp_path / "train/201/1"
    folder.mkdir(parents=True)
    for suffix in ("wav", "normalized.txt", "original.txt"):
        (folder / f"201_1_000.{suffix}").touch()
    problem = next(data.scan_split(tmp_path, "train"))
    assert problem == Problem(
        "error", "transcript file missing", str(folder),
        "found audio and 201_1_000.normalized.txt, expected 201-1.trans.txt; docs/corpora.md tells "
        "how to import other forms")


@pytest.mark.parametrize("name", ["", "1-2.trans.txt"], ids=["no transcript", "empty transcript"])
def test_split_without_utterances_is_an_error_with_the_folder(corpus, name):
    folder = corpus.root / "test" / "1" / "2"
    folder.mkdir(parents=True)
    if name:
        (folder / name).touch()
    message = "it has no utterance in */*/*.trans.txt"
    message += "" if name else f"; found no audio below {corpus.root / 'test'}"
    problem = Problem("error", "split empty", str(corpus.root / "test"), message)
    assert list(data.scan_split(corpus.root, "test")) == [problem]


def test_the_documentation_has_every_kind_of_problem():
    text = (Path(__file__).parents[1] / "docs" / "corpora.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    assert {(row[1].strip(" `"), row[2].strip()) for row in rows} == {
        *((bad.kind, bad.level) for bad in BAD.values()), ("folder not readable", "error"),
        ("split missing", "error"), ("split empty", "error"),
    }


# ----------------------------------------------------- who reads problems: training and the check


def test_problems_are_counted_by_kind_and_the_first_ten_shown():
    problems = [Problem("error", "no text", f"a:{i}", "nothing") for i in range(12)]
    problems.insert(1, Problem("warning", "channels", "7-9-0000", "2 channels"))
    assert data.describe_problems(problems) == [
        "error: no text: 12", *(f"    a:{i}: nothing" for i in range(10)), "    ... and 2 more",
        "warning: channels: 1", "    7-9-0000: 2 channels",
    ]


FOUND = [Utterance("7-9-0000", "a.flac", 1.0, "A"), Problem("error", "no text", "b:1", "''"),
         Problem("error", "no text", "b:2", "''"), Problem("warning", "channels", "7-9-0000", "2"),
         Problem("warning", "channels", "7-9-0001", "2")]


@pytest.fixture
def found(monkeypatch) -> list:
    """The result of every scan; tests may change it."""
    found = list(FOUND)

    def scan_split(root, split, cfg=features.DEFAULT, decode=False):
        # Only the check has the time to decode all audio.
        assert decode == (str(root) == "checked")
        yield from found

    for module in (data, prepare):
        monkeypatch.setattr(module, "scan_split", scan_split)
    return found


def read_split(**options) -> tuple[list[Utterance], list[str]]:
    """The utterances, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        utterances = data.read_split("root", "dev", **options)
    return utterances, [str(w.message) for w in caught]


def test_training_refuses_the_errors_of_a_scan(found):
    with pytest.raises(ValueError, match="cannot be used") as error:
        data.read_split("root", "dev")
    assert str(error.value).splitlines() == [
        "root/dev cannot be used:", "error: no text: 2", "    b:1: ''", "    b:2: ''",
    ]


def test_training_passes_warnings_of_a_scan_on(found):
    del found[1:3]
    assert read_split() == (FOUND[:1], [
        "dev: channels: 2", "dev: 7-9-0000: 2", "dev: ... and 1 more",
    ])


def test_training_with_skip_bad_warns_of_errors_and_leaves_them_out(found):
    utterances, messages = read_split(skip_bad=True)
    assert utterances == FOUND[:1]
    assert messages[:3] == [
        "dev: 2 errors; the utterances they concern are left out", "dev: error: no text: 2",
        "dev: b:1: ''",
    ]
    del found[0]  # the last good one
    with pytest.raises(ValueError, match="root/dev cannot be used:\nerror: no text: 2"):
        data.read_split("root", "dev", skip_bad=True)


def test_check_prints_the_problems_of_a_scan_and_fails_at_errors(found, capsys):
    assert prepare.check(Path("checked"), ["dev"]) is False
    expected = [f"  {line}" for line in data.describe_problems(FOUND[1:])]
    assert capsys.readouterr().out.splitlines()[1:] == expected
    del found[1:3]
    assert prepare.check(Path("checked"), ["dev"]) is True


# ------------------------------------------------------------------------------- long utterances


def test_long_utterances_are_dropped_and_counted():
    utterances = [Utterance("", "", float(s), "") for s in [1, 16.7, 16.8, 3600, 5] * 600]
    kept, note = data.drop_long(utterances)
    assert [u.duration_s for u in kept] == [1, 16.7, 5] * 600
    assert note == "1,200 of 3,000 dropped, 602.8 h"
    with pytest.raises(ValueError, match=r"at most 16\.7 s: 2 of 2 dropped"):
        data.drop_long(utterances[2:4])


# --------------------------------------------------------------------------- training and dev split


def load_tones(root, say) -> tuple[list[Utterance], list[Utterance]]:
    cfg = FeatureConfig(max_utterance_s=1.0)
    return data.load_corpus(root, ["train"], "dev", cfg, skip_bad=False, say=say)


def test_characters_of_the_dev_texts_that_the_tokenizer_does_not_know_are_named(tmp_path):
    transcript = tiny_corpus(tmp_path) / "dev" / "1" / "2" / "1-2.trans.txt"
    transcript.write_text(transcript.read_text().replace("ONE", "one"))
    with pytest.warns(UserWarning, match="small letters"):
        train, dev = load_tones(tmp_path, print)
    for texts, named in ((TRAIN_TEXTS, " the characters 'eno' of the dev texts"),
                         ([*TRAIN_TEXTS, "one"], None)):
        said = []
        tokenizer = data.Tokenizer(data.train_tokenizer(texts, 20))
        data.check_texts(train, dev, tokenizer, 0.01, said.append)
        assert [named in line for line in said] == ([True] if named else [])


def test_the_errors_of_all_splits_are_listed_at_once(tmp_path):
    tiny_corpus(tmp_path)
    for split in ("train", "dev"):
        (tmp_path / split / "1" / "2" / "1-2-0001.flac").unlink()
    with pytest.raises(ValueError, match="train cannot be used(.|\n)*dev cannot be used"):
        load_tones(tmp_path, print)


def test_utterances_with_more_labels_than_frames_are_counted():
    tokenizer = data.Tokenizer(data.train_tokenizer(TRAIN_TEXTS, 20))
    spoken = [Utterance("a", "a.flac", seconds, "ONE TWO THREE") for seconds in (0.1, 3.0)]
    said = []
    data.check_texts(spoken, [], tokenizer, 0.12, said.append)
    assert said == ["warning: 1 of 2 training utterances have more labels than encoder frames of "
                    "120 ms"]


# ------------------------------------------------------------------------------------- tokenizer

TEXTS = [
    "THE CAT SAT ON THE MAT", "A DOG RAN AFTER THE CAT", "IT'S RAINING ON THE HOUSE",
    "NOBODY SAW THE QUICK BROWN FOX", "HE JUMPED OVER A LAZY DOG", "WE GAVE UP AT TEN",
]


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer(data.train_tokenizer(TEXTS, 36))


@pytest.mark.parametrize(
    "text",
    [
        TEXTS[0],
        "\u00c9COLE \u0130ZM\u0130R \u00c5NGSTR\u00d6M",
        "\u0645\u06cc\u200c\u062e\u0648",
        "A\u2026 \u00bd \u2122 \ufb01\u200bX",
    ],
)
def test_decode_is_the_inverse_of_encode_in_any_script(text):
    tokenizer = data.Tokenizer(data.train_tokenizer([text, "ABC"], 64))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_characters(text)) == text


def test_pieces_are_longer_than_characters(tokenizer):
    assert 0 == len(tokenizer.encode("")) < len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])


def test_characters_spell_the_text_one_by_one(tokenizer):
    ids = tokenizer.encode_characters("IT'S A DOG")
    pieces = [tokenizer.pieces.id_to_piece(i) for i in ids]
    assert pieces == list("\u2581IT'S\u2581A\u2581DOG")
    assert tokenizer.decode(ids) == "IT'S A DOG"
    assert tokenizer.encode_characters("") == []


def test_blank_is_the_last_class_and_no_piece(tokenizer):
    assert tokenizer.vocab_size == 36
    assert tokenizer.blank == 35
    assert tokenizer.pieces.get_piece_size() == 35
    assert {label for text in TEXTS for label in tokenizer.encode(text)} <= set(range(35))


def test_unknown_character_is_an_error_that_names_it(tokenizer):
    with pytest.raises(ValueError, match="^'THE CAT Ñ SAT': .* no piece for 'Ñ'$"):
        tokenizer.encode("THE CAT Ñ SAT")


@pytest.mark.parametrize(("texts", "known"), [
    # A character coverage below 1 would drop the one that occurs once in 20,000.
    (["ABABABABAB" * 100] * 20 + ["Q"], "Q"),
    # Sentencepiece ignores sentences of more than 4192 bytes unless told otherwise.
    (["AB " * 2000, "C"], "BA"),
], ids=["rare character", "long transcript"])
def test_every_character_of_the_training_texts_is_known(texts, known):
    assert data.Tokenizer(data.train_tokenizer(texts, 8)).encode(known)


def test_model_bytes_are_a_function_of_the_texts(tokenizer):
    assert data.train_tokenizer(iter(TEXTS), 36) == tokenizer.model
    assert data.train_tokenizer(TEXTS[:-1], 36) != tokenizer.model


def test_vocabulary_is_smaller_when_the_texts_hold_no_more():
    tokenizer = data.Tokenizer(data.train_tokenizer(TEXTS, 1024))
    assert 36 < tokenizer.vocab_size < 100
    assert tokenizer.blank == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


# --------------------------------------------------------------------------------------- buckets


def durations(n: int) -> list[float]:
    """The durations of the oracle for n = 103: 1 to 16.4 s, all different, in no order."""
    return [round(1 + 15.5 * ((37 * i) % n) / n, 3) for i in range(n)]


def draw_order(n: int = 103, global_batch: int = 8, seed: int = 1) -> np.ndarray:
    return data.bucket_batches(durations(n), global_batch, 6, np.random.default_rng(seed))


def check_order(batches: np.ndarray, seconds: list[float], whole_batch: int, buckets: int = 6):
    """Asserts the rules of one epoch of the bucketing sampler.

    Args:
        batches: (batches, whole_batch) indices, or the columns of one rank.
    """
    N, columns = len(seconds), batches.shape[1]
    assert len(batches) == N // whole_batch
    assert len(set(batches.flatten().tolist())) == batches.size  # none twice
    assert set(batches.flatten().tolist()) <= set(range(N))
    # Buckets of equal size by duration; the first ones take the remainder.
    sizes = [N // buckets + (i < N % buckets) for i in range(buckets)]
    bucket = np.empty(N, int)
    bucket[np.argsort(seconds)] = np.repeat(np.arange(buckets), sizes)
    # Batches are cut from the concatenated buckets: once the batches are sorted, the buckets of
    # all utterances ascend.
    rows = sorted(sorted(row) for row in bucket[batches].tolist())
    flat = [b for row in rows for b in row]
    assert flat == sorted(flat)
    assert all(row[-1] - row[0] <= 1 for row in rows)
    # The order within a bucket, and of the batches, is random and not by duration.
    assert columns < 2 or any(np.diff([seconds[i] for i in row]).min() < 0 for row in batches)
    means = np.array(seconds)[batches].mean(1)
    assert len(batches) < 4 or not (np.all(np.diff(means) > 0) or np.all(np.diff(means) < 0))


@pytest.mark.parametrize(("N", "global_batch"), [(103, 8), (96, 8), (97, 16), (1000, 64)])
def test_order_obeys_the_rules_of_the_bucketing_sampler(N, global_batch):
    for seed in range(5):
        batches = draw_order(N, global_batch, seed)
        assert batches.shape == (N // global_batch, global_batch)
        check_order(batches, durations(N), global_batch)


def test_remainder_is_random():
    # Seven of 103 are left out of every epoch; over 200 epochs each about 14 times.
    dropped = np.zeros(103, int)
    for seed in range(200):
        dropped[np.setdiff1d(np.arange(103), draw_order(seed=seed))] += 1
    assert dropped.sum() == 200 * 7
    assert dropped.min() > 1
    assert dropped.max() < 32


def test_a_corpus_must_fill_one_batch():
    batches = draw_order(9, 8)
    assert batches.shape == (1, 8)
    assert len(set(batches[0])) == 8
    with pytest.raises(ValueError, match="7 training utterances, fewer than a batch of 8"):
        draw_order(7, 8)


def test_equal_durations_are_allowed():
    batches = data.bucket_batches([3.0] * 20, 4, 6, np.random.default_rng(1))
    assert sorted(batches.flatten()) == list(range(20))


# --------------------------------------------------------------------------------------- collate


def items(*sizes: tuple[int, int]) -> list[tuple]:
    """Items as of SpeechDataset, from (frames, labels); no value is 0, labels have two letters."""
    return [
        (torch.full((frames, 256), i + 1.0), [i + 1] * labels, [i + 5] * 2 * labels,
         Utterance(f"id{i}", f"{i}.flac", frames * 0.03, "TEXT"))
        for i, (frames, labels) in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("sizes", "T_in", "U"),
    [
        ([(65, 17), (20, 3), (1, 0)], 96, 24),  # multiples of 32 frames and of 8 labels
        ([(64, 16), (2, 2)], 64, 16),
        ([(10, 0), (20, 0)], 32, 0),
    ],
)
def test_collate_keeps_values_and_pads_with_zeros(sizes, T_in, U):
    batch = data.collate(items(*sizes))
    assert batch.feats.shape == (len(sizes), T_in, 256)
    assert batch.targets.shape == (len(sizes), U)
    assert batch.feat_lens.tolist() == [frames for frames, _ in sizes]
    assert batch.target_lens.tolist() == [labels for _, labels in sizes]
    assert batch.char_lens.tolist() == [2 * labels for _, labels in sizes]
    for b, (frames, labels) in enumerate(sizes):
        assert (batch.feats[b, :frames] == b + 1).all()
        assert not batch.feats[b, frames:].any()
        assert (batch.targets[b, :labels] == b + 1).all()
        assert not batch.targets[b, labels:].any()
        assert (batch.chars[b, : 2 * labels] == b + 5).all()
        assert not batch.chars[b, 2 * labels :].any()


def test_collate_types_and_names():
    batch = data.collate([*items((10, 2), (20, 3)), None])
    assert batch.feats.dtype == torch.float32
    for x in (batch.feat_lens, batch.targets, batch.target_lens, batch.chars, batch.char_lens):
        assert x.dtype == torch.int64
    assert batch.ids == ["id0", "id1"]
    assert batch.num_requested == 3


# --------------------------------------------------------------------------- dataset and loader


@pytest.fixture(scope="module")
def utterances(tmp_path_factory) -> list[Utterance]:
    """Six recordings of half a second and more, with TEXTS."""
    corpus = Corpus(tmp_path_factory.mktemp("corpus"))
    for i in range(len(TEXTS)):
        corpus.flac(f"7-9-000{i}", NOISE[: 8000 + 1000 * i])
    corpus.transcript.write_text("".join(f"7-9-000{i} {text}\n" for i, text in enumerate(TEXTS)))
    return data.read_split(corpus.root, "dev")


@pytest.fixture
def dataset(utterances, tokenizer) -> data.SpeechDataset:
    return data.SpeechDataset(utterances, tokenizer, features.DEFAULT, seed=1, epoch=3)


def test_dataset_has_features_labels_and_utterance(utterances, tokenizer):
    dataset = data.SpeechDataset(utterances, tokenizer, features.DEFAULT)
    assert len(dataset) == 6
    feats, labels, chars, utterance = dataset[2]
    assert torch.equal(feats, features.features(features.load_audio(utterances[2].path)))
    assert tokenizer.decode(labels) == tokenizer.decode(chars) == TEXTS[2]
    assert utterance == utterances[2]
    assert data.SpeechDataset(utterances, None, features.DEFAULT)[2][1:3] == ([], [])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_features_in_a_batch_are_those_of_a_file_alone(utterances, num_workers):
    dataset = data.SpeechDataset(utterances, None, features.DEFAULT)
    [batch] = data.batch_loader(dataset, [[3, 0, 5]], num_workers)
    for i, feats, n in zip([3, 0, 5], batch.feats, batch.feat_lens, strict=True):
        alone = features.features(features.load_audio(utterances[i].path))
        assert torch.equal(feats[:n], alone)


ROBUST = FeatureConfig(band_prob=0.5, pad_max_s=1.0, empty_prob=0.3, noise_prob=0.5, gain_db=20.0)


def feats_of(utterances, seed, epoch, index, cfg=features.DEFAULT) -> bytes:
    dataset = data.SpeechDataset(utterances, None, cfg, seed, epoch)
    return dataset[index][0].numpy().tobytes()


@pytest.mark.parametrize("cfg", [features.DEFAULT, ROBUST], ids=["default", "robust"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(utterances, cfg):
    # The same recording six times, so that the index is all that differs.
    same = [utterances[0]] * 6
    first = feats_of(same, 1, 2, 3, cfg)
    assert feats_of(same, 1, 2, 3, cfg) == first
    # Seed 0 augments too; without a seed there is no augmentation.
    changed = [(0, 2, 3), (1, 5, 3), (1, 2, 0), (None, 2, 3)]
    assert len({first, *(feats_of(same, *key, cfg) for key in changed)}) == 5


def test_the_order_of_items_does_not_change_them(utterances, tokenizer):
    one, other = (data.SpeechDataset(utterances, tokenizer, ROBUST, seed=1) for _ in range(2))
    forwards = [one[i] for i in range(6)]
    backwards = [other[i] for i in reversed(range(6))]
    for (feats, *rest), (same_feats, *same_rest) in zip(forwards, backwards[::-1], strict=True):
        assert torch.equal(feats, same_feats)
        assert rest == same_rest


def test_recordings_that_become_empty_have_no_labels(utterances, tokenizer):
    dataset = data.SpeechDataset(utterances * 30, tokenizer, ROBUST, seed=1)
    is_empty = [dataset.layout(i).is_empty for i in range(180)]
    assert np.mean(is_empty) == pytest.approx(0.3, abs=0.1)  # three deviations
    for i in range(20):
        expected = [] if is_empty[i] else tokenizer.encode(utterances[i % 6].text)
        assert dataset[i][1] == expected
        assert len(dataset[i][2]) == (0 if is_empty[i] else len(utterances[i % 6].text) + 1)
    evaluated = data.SpeechDataset(utterances, tokenizer, replace(ROBUST, empty_prob=1.0))
    assert all(evaluated[i][1] for i in range(6))


def test_durations_are_those_after_speed_perturbation(utterances):
    plain = data.SpeechDataset(utterances, None, features.DEFAULT)
    assert plain.durations_s() == [u.duration_s for u in utterances]
    # Without trimming, a recording has as many frames of 30 ms as its duration says, and perhaps
    # a last one that is not full.
    cfg = FeatureConfig(trim=False)
    for epoch in (1, 2):
        dataset = data.SpeechDataset(utterances, None, cfg, seed=1, epoch=epoch)
        ratios = np.divide(dataset.durations_s(), plain.durations_s())
        assert len(set(ratios)) == len(utterances)
        assert ratios.min() >= 0.85
        assert ratios.max() <= 1.15
        for i, seconds in enumerate(dataset.durations_s()):
            # Factors are rounded to hundredths.
            assert abs(len(dataset[i][0]) - seconds / 0.03) <= 1 + 0.005 * seconds / 0.03


def test_durations_count_the_added_background(utterances):
    cfg = FeatureConfig(trim=False, pad_max_s=1.0, speed_min=1.0, speed_max=1.0)
    dataset = data.SpeechDataset(utterances, None, cfg, seed=1)
    durations_s = dataset.durations_s()
    assert max(np.subtract(durations_s, [u.duration_s for u in utterances])) > 0.3
    for i, seconds in enumerate(durations_s):
        assert abs(len(dataset[i][0]) - seconds / 0.03) <= 1


def test_number_of_workers_does_not_change_the_batches(dataset, utterances):
    order = [[4, 0], [1, 5], [3, 2]]
    here, elsewhere = (list(data.batch_loader(dataset, order, n)) for n in (0, 1))
    assert [batch.ids for batch in here] == [[utterances[i].id for i in row] for row in order]
    for one, other in zip(here, elsewhere, strict=True):
        assert one[6:] == other[6:]
        assert all(map(torch.equal, one[:6], other[:6]))


def test_loader_pads_with_the_settings_of_the_dataset(utterances, tokenizer):
    cfg = FeatureConfig(round_frames=1, round_labels=1)
    [batch] = data.batch_loader(data.SpeechDataset(utterances, tokenizer, cfg), [[5]], 0)
    assert batch.feats.shape[1] == batch.feat_lens.item()
    assert batch.targets.shape[1] == batch.target_lens.item()


def test_a_killed_worker_is_an_error_in_words_at_the_next_batch(dataset):
    batches = data.batch_loader(dataset, [[0]] * 500, 1)
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()  # in a training step, which the worker's end must not interrupt
    with pytest.raises(OSError, match="no batch: a worker process was killed"):
        list(batches)


def test_a_lost_batch_is_an_error_in_words(dataset, utterances, monkeypatch):
    collate, seconds, clock = data.collate, [0.6, 600.0], itertools.repeat(0.0)

    def collate_late(items, cfg):
        time.sleep(seconds.pop(0))
        return collate(items, cfg)

    monkeypatch.setattr(data, "collate", collate_late)
    monkeypatch.setattr(data, "POLL_S", 0.2)
    monkeypatch.setattr(data, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    batches = data.batch_loader(dataset, [[0], [1]], 1, timeout_s=4.0)
    assert next(batches).ids == [utterances[0].id]  # after several polls, but in time
    clock = iter([0.0, 3.0, 5.0])
    with pytest.raises(OSError, match="no batch: none came for 4 s. .*/dev/shm may be full"):
        next(batches)
    data.end_workers()  # the worker still sleeps


def test_other_errors_of_the_loader_are_passed_on(dataset, monkeypatch):
    def fail(*_):
        raise RuntimeError("a mistake in the front end")

    monkeypatch.setattr(data, "features", fail)
    with pytest.raises(RuntimeError, match="a mistake in the front end"):
        next(data.batch_loader(dataset, [[0]], 1))


def test_more_workers_than_cores_are_no_warning(dataset, recwarn, monkeypatch):
    cpu = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {cpu})
    assert [len(batch.ids) for batch in data.batch_loader(dataset, [[0, 3], [5]], 2)] == [2, 1]
    assert not [w for w in recwarn if "DataLoader" in str(w.message)]
