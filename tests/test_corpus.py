# SPDX-License-Identifier: Apache-2.0
"""data.py turns a corpus into batches: texts, tokens, problems, buckets, padding.

python -m pytest tests/test_corpus.py

Corpora are written into temporary folders. Where it exists, ../shared adds the orders that the
original's bucketing sampler draws and the durations of train-clean-100.
"""

import gzip
import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import features
from data import Problem, Utterance

SHARED = Path(__file__).resolve().parents[2] / "shared"
SAMPLERS = SHARED / "oracles" / "seedrun" / "seed_model_golden.json"
TRAIN_CLEAN_100 = SHARED / "librispeech" / "train-clean-100.tsv.gz"

TEXTS = [
    "THE CAT SAT ON THE MAT", "A DOG RAN AFTER THE CAT", "IT'S RAINING ON THE HOUSE",
    "NOBODY SAW THE QUICK BROWN FOX", "HE JUMPED OVER A LAZY DOG", "WE GAVE UP AT TEN",
]


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer(data.train_tokenizer(TEXTS, 36))


# ------------------------------------------------------------------------------------- tokenizer


def test_decode_is_the_inverse_of_encode(tokenizer):
    for text in [*TEXTS, "A MAT ON A HOUSE", "IT"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "\u00c9COLE \u0130ZM\u0130R \u00c5NGSTR\u00d6M",
        "\u0645\u06cc\u200c\u062e\u0648",
        "A\u2026 \u00bd \u2122 \ufb01\u200bX",
    ],
)
def test_decode_is_the_inverse_of_encode_in_any_script(text):
    tokenizer = data.Tokenizer(data.train_tokenizer([text, "ABC"], 64))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_without_words_has_no_labels(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_pieces_are_longer_than_characters(tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])


def test_blank_is_the_last_class_and_no_piece(tokenizer):
    assert tokenizer.vocab_size == 36
    assert tokenizer.blank == 35
    assert tokenizer.pieces.get_piece_size() == 35
    labels = {label for text in TEXTS for label in tokenizer.encode(text)}
    assert labels <= set(range(35))


def test_unknown_character_is_an_error_that_names_it(tokenizer):
    with pytest.raises(ValueError, match="no piece for 'Ñ'") as error:
        tokenizer.encode("THE CAT Ñ SAT")
    assert "'THE CAT Ñ SAT'" in str(error.value)


def test_every_character_of_the_training_texts_is_known():
    # A character coverage below 1 would drop the one that occurs once in 20,000.
    texts = ["ABABABABAB" * 100] * 20 + ["Q"]
    assert data.Tokenizer(data.train_tokenizer(texts, 8)).encode("Q")


def test_same_texts_give_the_same_bytes():
    assert data.train_tokenizer(TEXTS, 40) == data.train_tokenizer(iter(TEXTS), 40)


def test_other_texts_give_other_bytes():
    assert data.train_tokenizer(TEXTS, 40) != data.train_tokenizer(TEXTS[:-1], 40)


def test_model_bytes_are_the_whole_tokenizer(tokenizer):
    again = data.Tokenizer(tokenizer.model)
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert again.blank == tokenizer.blank


def test_vocabulary_is_smaller_when_the_texts_hold_no_more():
    tokenizer = data.Tokenizer(data.train_tokenizer(TEXTS, 1024))
    assert 36 < tokenizer.vocab_size < 100
    assert tokenizer.blank == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_long_transcripts_are_not_left_out():
    # Sentencepiece ignores sentences of more than 4192 bytes unless told otherwise.
    tokenizer = data.Tokenizer(data.train_tokenizer(["AB " * 2000, "C"], 8))
    assert tokenizer.encode("BA")


# --------------------------------------------------------------------------------- a corpus on disk


class Corpus:
    """LibriSpeech's tree with recordings of a tenth of a second."""

    def __init__(self, root: Path):
        self.root = root

    def chapter(self, chapter: str = "7-9", split: str = "dev") -> Path:
        folder = self.root / split / chapter.replace("-", "/")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def audio(self, utterance_id: str, samples=1600, rate=16000, channels=1, suffix="flac") -> Path:
        path = self.chapter(utterance_id.rpartition("-")[0]) / f"{utterance_id}.{suffix}"
        generator = np.random.default_rng(len(utterance_id) + samples)
        soundfile.write(path, 0.1 * generator.standard_normal((samples, channels)), rate)
        return path

    def transcript(self, text: str | bytes, chapter: str = "7-9") -> Path:
        path = self.chapter(chapter) / f"{chapter}.trans.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def scan(self) -> tuple[list[Utterance], list[Problem]]:
        return data.scan_split(self.root, "dev")


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Two good utterances."""
    corpus = Corpus(tmp_path)
    corpus.audio("7-9-0001", samples=2400)
    corpus.audio("7-9-0000")
    corpus.transcript("7-9-0001 SECOND LINE\n7-9-0000 FIRST LINE\n")
    return corpus


def kinds(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(p.level, p.kind) for p in problems]


def test_good_split_has_its_utterances_by_id_and_no_problem(corpus):
    folder = corpus.chapter()
    assert corpus.scan() == (
        [
            Utterance("7-9-0000", str(folder / "7-9-0000.flac"), 0.1, "FIRST LINE"),
            Utterance("7-9-0001", str(folder / "7-9-0001.flac"), 0.15, "SECOND LINE"),
        ],
        [],
    )


@pytest.mark.parametrize("suffix", ["wav", "ogg"])
def test_other_audio_files_are_found_too(corpus, suffix):
    corpus.audio("7-9-0001").unlink()
    path = corpus.audio("7-9-0001", suffix=suffix)
    utterances, problems = corpus.scan()
    assert utterances[1].path == str(path)
    assert problems == []


def test_accents_have_one_form(corpus):
    corpus.transcript("7-9-0000 E\u0301COLE\n7-9-0001 \u00c9COLE\n")
    assert [u.text for u in corpus.scan()[0]] == ["\u00c9COLE"] * 2


def test_white_space_in_transcripts_is_one_space(corpus):
    corpus.transcript("7-9-0000   FIRST   LINE  \n7-9-0001 SECOND LINE\n")
    assert [u.text for u in corpus.scan()[0]] == ["FIRST LINE", "SECOND LINE"]


@pytest.mark.parametrize("line", ["7-9-0002", "7-9-0002 ", "7-9-0002  \t", ""])
def test_line_without_text_is_an_error_with_file_and_line(corpus, line):
    path = corpus.transcript(f"7-9-0000 FIRST\n{line}\n7-9-0001 SECOND\n")
    utterances, problems = corpus.scan()
    assert [u.id for u in utterances] == ["7-9-0000", "7-9-0001"]
    assert problems == [Problem("error", "no text", f"{path}:2", f"{line!r} has an id but no text")]


def test_transcript_that_is_not_utf_8_is_an_error_with_the_file(corpus):
    path = corpus.transcript(b"7-9-0000 CAF\xc9\n")
    utterances, [error, *warned] = corpus.scan()
    assert utterances == []
    assert error[:3] == ("error", "transcript not readable", str(path))
    assert "0xc9" in error.message
    assert kinds(warned) == [("warning", "transcript missing")] * 2


def test_missing_audio_is_an_error_with_file_and_line(corpus):
    path = corpus.transcript("7-9-0000 FIRST\n7-9-0005 FIFTH\n7-9-0001 SECOND\n")
    utterances, problems = corpus.scan()
    assert len(utterances) == 2
    missing = corpus.chapter() / "7-9-0005.flac"
    assert problems == [Problem("error", "audio missing", f"{path}:2", f"{missing} does not exist")]


def test_audio_of_another_chapter_does_not_count(corpus):
    corpus.audio("7-8-0000")
    corpus.transcript("7-8-0000 THIRD\n", "7-8")
    path = corpus.transcript("7-9-0000 FIRST\n7-8-0000 STRAY\n7-9-0001 SECOND\n")
    utterances, problems = corpus.scan()
    assert len(utterances) == 3
    assert [p[:3] for p in problems] == [("error", "id not of its folder", f"{path}:2")]


@pytest.mark.parametrize("copy", ["7/8/7-9-0000.flac", "7/9/7-9-0000.wav"])
def test_two_recordings_of_one_id_are_an_error_that_names_both(corpus, copy):
    path = corpus.root / "dev" / copy
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, np.ones(1600), 16000)
    (path.parent / f"7-{path.parent.name}.trans.txt").touch()
    errors = [p for p in corpus.scan()[1] if p.level == "error"]
    assert len(errors) == 1
    assert "duplicate" in errors[0].kind
    assert str(path) in errors[0].message
    assert str(corpus.chapter() / "7-9-0000.flac") in errors[0].message


def test_repeated_id_is_an_error_with_file_and_line(corpus):
    path = corpus.transcript("7-9-0000 FIRST\n7-9-0001 SECOND\n7-9-0000 AGAIN\n")
    utterances, problems = corpus.scan()
    assert [u.text for u in utterances] == ["FIRST", "SECOND"]
    assert problems == [Problem("error", "duplicate id", f"{path}:3", "7-9-0000")]


def test_unreadable_audio_is_an_error_with_id_and_file(corpus):
    path = corpus.chapter() / "7-9-0000.flac"
    path.write_bytes(b"not audio")
    utterances, [problem] = corpus.scan()
    assert [u.id for u in utterances] == ["7-9-0001"]
    assert problem[:3] == ("error", "audio not readable", "7-9-0000")
    assert problem.message.startswith(f"{path}: ")


def test_empty_audio_is_an_error_with_id_and_file(corpus):
    corpus.audio("7-9-0000").unlink()
    path = corpus.audio("7-9-0000", samples=0, suffix="wav")
    utterances, problems = corpus.scan()
    assert [u.id for u in utterances] == ["7-9-0001"]
    assert problems == [Problem("error", "audio not readable", "7-9-0000", f"{path}: no samples")]


def test_other_sample_rate_is_a_warning_and_does_not_change_the_duration(corpus):
    path = corpus.audio("7-9-0000", samples=800, rate=8000)
    utterances, problems = corpus.scan()
    assert utterances[0].duration_s == 0.1
    message = f"{path}: 8000 Hz, will be resampled to 16000"
    assert problems == [Problem("warning", "sample rate", "7-9-0000", message)]


def test_stereo_is_a_warning(corpus):
    path = corpus.audio("7-9-0000", channels=2)
    utterances, problems = corpus.scan()
    assert utterances[0].duration_s == 0.1
    message = f"{path}: 2 channels, will be averaged"
    assert problems == [Problem("warning", "channels", "7-9-0000", message)]


def test_audio_without_transcript_is_a_warning(corpus):
    path = corpus.audio("7-9-0007")
    utterances, problems = corpus.scan()
    assert len(utterances) == 2
    message = f"{path} has no transcript"
    assert problems == [Problem("warning", "transcript missing", "7-9-0007", message)]


def test_files_that_are_no_audio_do_not_matter(corpus):
    (corpus.chapter() / "7-9-0008.txt").write_text("notes")
    assert corpus.scan()[1] == []


def test_missing_split_is_an_error_with_the_folder(corpus):
    folder = corpus.root / "test"
    expected = [Problem("error", "split missing", str(folder), "no such folder")]
    assert data.scan_split(corpus.root, "test") == ([], expected)


def test_split_without_transcripts_is_an_error_with_the_folder(corpus):
    (corpus.root / "test" / "1" / "2").mkdir(parents=True)
    _, [problem] = data.scan_split(corpus.root, "test")
    assert problem[:3] == ("error", "split empty", str(corpus.root / "test"))


def test_chapter_without_transcript_file_is_an_error_with_the_folder(corpus):
    corpus.audio("7-8-0000")
    utterances, problems = corpus.scan()
    assert len(utterances) == 2
    assert problems[0][:3] == ("error", "transcript file missing", str(corpus.chapter("7-8")))


def test_split_whose_transcripts_name_nothing_is_an_error(corpus):
    corpus.transcript("")
    utterances, problems = corpus.scan()
    assert utterances == []
    assert ("error", "split empty", str(corpus.root / "dev")) in [p[:3] for p in problems]


def test_a_folder_that_cannot_be_read_is_an_error(corpus, monkeypatch):
    """As os.scandir says it; root, as which tests may run, may read everything."""
    real = os.scandir

    def scandir(path):
        if str(path).endswith("7/9"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    utterances, problems = corpus.scan()
    assert utterances == []
    where = str(corpus.chapter())
    assert Problem("error", "folder not readable", where, "Permission denied") in problems


def test_suffixes_may_be_capital(corpus):
    path = corpus.chapter() / "7-9-0000.flac"
    path.rename(path.with_suffix(".FLAC"))
    utterances, problems = corpus.scan()
    assert [u.id for u in utterances] == ["7-9-0000", "7-9-0001"]
    assert problems == []


def test_problems_are_counted_by_kind_and_the_first_ten_shown():
    problems = [Problem("error", "no text", f"a:{i}", "nothing") for i in range(12)]
    problems.insert(1, Problem("warning", "channels", "7-9-0000", "2 channels"))
    lines = data.describe(problems)
    assert lines[0] == "error: no text: 12"
    assert lines[1:11] == [f"    a:{i}: nothing" for i in range(10)]
    assert lines[11:] == [
        "    ... and 2 more", "warning: channels: 1", "    7-9-0000: 2 channels",
    ]


def test_read_split_returns_the_utterances_of_a_good_split(corpus):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.read_split(corpus.root, "dev") == corpus.scan()[0]


def test_read_split_raises_with_all_errors_and_no_warning(corpus):
    corpus.audio("7-9-0000", channels=2)
    path = corpus.transcript("7-9-0000 FIRST\n7-9-0001\n7-9-0002 THIRD\n7-9-0003 FOURTH\n")
    with pytest.raises(ValueError, match="cannot be used") as error:
        data.read_split(corpus.root, "dev")
    lines = str(error.value).splitlines()
    assert lines[0] == f"{corpus.root}/dev cannot be used:"
    assert "error: no text: 1" in lines
    assert "error: audio missing: 2" in lines
    assert sum(f"{path}:" in line for line in lines) == 3
    assert "channels" not in str(error.value)


def test_read_split_passes_warnings_on(corpus):
    corpus.audio("7-9-0000", channels=2)
    corpus.audio("7-9-0001", channels=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        utterances = data.read_split(corpus.root, "dev")
    assert len(utterances) == 2
    messages = [str(w.message) for w in caught]
    assert messages[0] == "dev: warning: channels: 2"
    assert messages[-1] == "dev: ... and 1 more"


def test_read_split_of_a_missing_split_names_it(corpus):
    with pytest.raises(ValueError, match="split missing") as error:
        data.read_split(corpus.root, "test")
    assert str(corpus.root / "test") in str(error.value)


# ---------------------------------------------------------------------------------- long utterances


def utterances_of(durations_s) -> list[Utterance]:
    return [Utterance(str(i), "", float(s), "") for i, s in enumerate(durations_s)]


def test_long_utterances_are_dropped_and_counted():
    utterances = utterances_of([1, 16.7, 16.8, 3600, 5] * 600)
    kept, note = data.drop_long(utterances)
    assert [u.duration_s for u in kept] == [1, 16.7, 5] * 600
    assert note == "1,200 of 3,000 dropped, 602.8 h"


def test_longest_duration_is_a_setting():
    kept, note = data.drop_long(utterances_of([1, 2]), features.FeatureConfig(max_utterance_s=1.5))
    assert len(kept) == 1
    assert note == "1 of 2 dropped, 0.0 h"


def test_dropping_all_utterances_is_an_error_with_the_limit():
    with pytest.raises(ValueError, match=r"at most 16\.7 s: 2 of 2 dropped"):
        data.drop_long(utterances_of([17, 18]))


@pytest.mark.skipif(not TRAIN_CLEAN_100.is_file(), reason=f"{TRAIN_CLEAN_100} is not here")
def test_train_clean_100_loses_286_utterances():
    with gzip.open(TRAIN_CLEAN_100, "rt", encoding="utf-8") as lines:
        next(lines)
        utterances = utterances_of(line.split("\t")[1] for line in lines)
    kept, note = data.drop_long(utterances)
    assert note == "286 of 28,539 dropped, 1.3 h"
    assert len(kept) == 28253


# ------------------------------------------------------------------------------------------ buckets


def durations(n: int) -> list[float]:
    """The durations of the oracle for n = 103: 1 to 16.4 s, all different, in no order."""
    return [round(1 + 15.5 * ((37 * i) % n) / n, 3) for i in range(n)]


def check_order(batches: np.ndarray, seconds: list[float], whole_batch: int, buckets: int = 6):
    """What every epoch of the bucketing sampler obeys.

    Args:
        batches: (batches, whole_batch) indices, or the columns of one rank.
    """
    N, columns = len(seconds), batches.shape[1]
    assert len(batches) == N // whole_batch
    assert len(set(batches.flatten().tolist())) == batches.size  # none twice
    assert set(batches.flatten().tolist()) <= set(range(N))
    # Buckets of equal size by duration, the first ones take what is over.
    sizes = [N // buckets + (i < N % buckets) for i in range(buckets)]
    of_rank = np.repeat(np.arange(buckets), sizes)
    bucket = np.empty(N, int)
    bucket[np.argsort(seconds)] = of_rank
    # Batches are cut from the buckets one after the other: put in order again, the buckets of
    # all utterances ascend.
    rows = sorted(sorted(row) for row in bucket[batches].tolist())
    flat = [b for row in rows for b in row]
    assert flat == sorted(flat)
    assert all(row[-1] - row[0] <= 1 for row in rows)
    # The order within a bucket, and of the batches, is by chance and not by duration.
    assert columns < 2 or any(np.diff([seconds[i] for i in row]).min() < 0 for row in batches)
    means = np.array(seconds)[batches].mean(1)
    assert len(batches) < 4 or not (np.all(np.diff(means) > 0) or np.all(np.diff(means) < 0))


@pytest.mark.parametrize(("N", "global_batch"), [(103, 8), (96, 8), (97, 16), (1000, 64)])
def test_order_obeys_the_rules_of_the_bucketing_sampler(N, global_batch):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        batches = data.bucket_batches(durations(N), global_batch, features.DEFAULT.num_buckets, rng)
        assert batches.shape == (N // global_batch, global_batch)
        check_order(batches, durations(N), global_batch)


def test_left_over_utterances_are_drawn_by_chance():
    # Seven of 103 are left out of every epoch; over 200 epochs each about 14 times.
    dropped = np.zeros(103, int)
    for seed in range(200):
        batches = data.bucket_batches(durations(103), 8, 6, np.random.default_rng(seed))
        dropped[np.setdiff1d(np.arange(103), batches)] += 1
    assert dropped.sum() == 200 * 7
    assert dropped.min() > 1
    assert dropped.max() < 32


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_share_every_batch_equally(ranks):
    batches = data.bucket_batches(durations(103), 8, 6, np.random.default_rng(1))
    shares = [batches[:, rank::ranks] for rank in range(ranks)]
    assert {share.shape for share in shares} == {(12, 8 // ranks)}
    assert sorted(np.concatenate(shares, 1).flatten()) == sorted(batches.flatten())


def test_order_is_a_function_of_the_generator():
    one, again, other = (
        data.bucket_batches(durations(103), 8, 6, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_epochs_of_one_generator_differ():
    rng = np.random.default_rng(1)
    first, second = (data.bucket_batches(durations(103), 8, 6, rng) for _ in range(2))
    assert not np.array_equal(first, second)


def test_a_corpus_may_be_one_batch():
    batches = data.bucket_batches(durations(9), 8, 6, np.random.default_rng(1))
    assert batches.shape == (1, 8)
    assert len(set(batches[0])) == 8


def test_equal_durations_are_allowed():
    batches = data.bucket_batches([3.0] * 20, 4, 6, np.random.default_rng(1))
    assert sorted(batches.flatten()) == list(range(20))


def test_fewer_utterances_than_a_batch_are_an_error_with_both_numbers():
    with pytest.raises(ValueError, match="7 training utterances, fewer than a batch of 8"):
        data.bucket_batches([1.0] * 7, 8, 6, np.random.default_rng(1))


@pytest.fixture(scope="module")
def samplers() -> dict:
    if not SAMPLERS.is_file():
        pytest.skip(f"{SAMPLERS} is not here")
    return json.loads(SAMPLERS.read_text())


def test_original_sampler_has_our_durations_and_size(samplers):
    assert durations(103) == samplers["sampler_in"]["durations"]
    ours = data.bucket_batches(durations(103), 8, 6, np.random.default_rng(1))
    assert ours.size == 96
    assert {s["dataset_size"] for s in samplers["samplers"].values()} == {ours.size}


@pytest.mark.parametrize(("name", "columns"), [("bucketing_ws1", 8), ("bucketing_ws2_rank0", 4)])
def test_original_orders_obey_the_same_rules(samplers, name, columns):
    # Two epochs. Rank 0 of 2 took samples 0, 2, 4 and 6 of each batch of eight.
    epochs = np.array(samplers["samplers"][name]["labels"]).reshape(2, 12, columns)
    for epoch in epochs:
        check_order(epoch, durations(103), 8)
    assert not np.array_equal(*epochs)


def test_our_share_of_a_rank_obeys_the_same_rules():
    batches = data.bucket_batches(durations(103), 8, 6, np.random.default_rng(1))
    check_order(batches[:, 0::2], durations(103), 8)


# ------------------------------------------------------------------------------------------ batches


def items(*sizes: tuple[int, int]) -> list[tuple]:
    """What SpeechDataset returns, of (frames, labels): no value is 0."""
    return [
        (
            torch.full((frames, 256), i + 1.0),
            [i + 1] * labels,
            Utterance(f"id{i}", f"{i}.flac", frames * 0.03, "TEXT"),
        )
        for i, (frames, labels) in enumerate(sizes)
    ]


def test_collate_rounds_the_longest_up():
    # To a multiple of 32 frames and of 8 labels.
    batch = data.collate(items((65, 17), (20, 3), (1, 0)))
    assert batch.feats.shape == (3, 96, 256)
    assert batch.targets.shape == (3, 24)
    assert batch.feat_lens.tolist() == [65, 20, 1]
    assert batch.target_lens.tolist() == [17, 3, 0]


def test_collate_adds_nothing_to_exact_multiples():
    batch = data.collate(items((64, 16), (2, 2)))
    assert batch.feats.shape == (2, 64, 256)
    assert batch.targets.shape == (2, 16)


def test_collate_rounding_is_a_setting():
    batch = data.collate(items((33, 9)), features.FeatureConfig(round_frames=10, round_labels=1))
    assert batch.feats.shape == (1, 40, 256)
    assert batch.targets.shape == (1, 9)


def test_collate_keeps_values_and_pads_with_zeros():
    batch = data.collate(items((33, 9), (20, 3)))
    for b, (frames, labels) in enumerate([(33, 9), (20, 3)]):
        assert (batch.feats[b, :frames] == b + 1).all()
        assert not batch.feats[b, frames:].any()
        assert (batch.targets[b, :labels] == b + 1).all()
        assert not batch.targets[b, labels:].any()


def test_collate_types_and_names():
    batch = data.collate(items((10, 2), (20, 3)))
    assert batch.feats.dtype == torch.float32
    for x in (batch.feat_lens, batch.targets, batch.target_lens):
        assert x.dtype == torch.int64
    assert batch.ids == ["id0", "id1"]
    assert batch.audio_s == pytest.approx(0.9)


def test_collate_of_utterances_without_labels():
    batch = data.collate(items((10, 0), (20, 0)))
    assert batch.targets.shape == (2, 0)
    assert batch.target_lens.tolist() == [0, 0]


# ------------------------------------------------------------------------------------------ dataset


@pytest.fixture(scope="module")
def utterances(tmp_path_factory) -> list[Utterance]:
    """Six recordings of half a second and more, with TEXTS."""
    corpus = Corpus(tmp_path_factory.mktemp("corpus"))
    for i in range(len(TEXTS)):
        corpus.audio(f"7-9-000{i}", samples=8000 + 1000 * i)
    corpus.transcript("".join(f"7-9-000{i} {text}\n" for i, text in enumerate(TEXTS)))
    return data.read_split(corpus.root, "dev")


def test_dataset_has_features_labels_and_utterance(utterances, tokenizer):
    dataset = data.SpeechDataset(utterances, tokenizer, features.DEFAULT)
    assert len(dataset) == 6
    feats, labels, utterance = dataset[2]
    assert torch.equal(feats, features.features(features.load_audio(utterances[2].path)))
    assert tokenizer.decode(labels) == TEXTS[2]
    assert utterance == utterances[2]


def test_dataset_without_tokenizer_has_no_labels(utterances):
    assert data.SpeechDataset(utterances, None, features.DEFAULT)[2][1] == []


def feats_of(utterances, seed, epoch, index) -> bytes:
    dataset = data.SpeechDataset(utterances, None, features.DEFAULT, seed, epoch)
    return dataset[index][0].numpy().tobytes()


def test_augmentation_depends_on_seed_epoch_and_index_alone(utterances):
    # The same recording six times, so that the index is all that differs.
    same = [utterances[0]] * 6
    first = feats_of(same, seed=1, epoch=2, index=3)
    assert feats_of(same, seed=1, epoch=2, index=3) == first
    changed = [(4, 2, 3), (1, 5, 3), (1, 2, 0)]
    assert len({first, *(feats_of(same, *key) for key in changed)}) == 4


def test_seed_0_augments_too(utterances):
    assert feats_of(utterances, 0, 0, 0) != feats_of(utterances, None, 0, 0)


def test_order_of_reading_does_not_change_the_augmentation(utterances):
    dataset = data.SpeechDataset(utterances, None, features.DEFAULT, seed=1)
    forwards = [dataset[i][0] for i in range(6)]
    backwards = [dataset[i][0] for i in reversed(range(6))]
    assert all(map(torch.equal, forwards, reversed(backwards)))


def test_durations_are_those_after_speed_perturbation(utterances):
    plain = data.SpeechDataset(utterances, None, features.DEFAULT)
    assert plain.durations_s() == [u.duration_s for u in utterances]
    # Nothing trimmed: as many frames of 30 ms as the duration says, and one that is not full.
    cfg = features.FeatureConfig(trim_db=-200.0)
    for epoch in (1, 2):
        dataset = data.SpeechDataset(utterances, None, cfg, seed=1, epoch=epoch)
        ratios = np.divide(dataset.durations_s(), plain.durations_s())
        assert len(set(ratios)) == len(utterances)
        assert ratios.min() >= 0.85
        assert ratios.max() <= 1.15
        for i, seconds in enumerate(dataset.durations_s()):
            # Factors are rounded to hundredths.
            assert abs(len(dataset[i][0]) - seconds / 0.03) <= 1 + 0.005 * seconds / 0.03


def test_number_of_workers_does_not_change_the_batches(utterances, tokenizer):
    dataset = data.SpeechDataset(utterances, tokenizer, features.DEFAULT, seed=1, epoch=3)
    order = [[4, 0], [1, 5], [3, 2]]
    here, elsewhere = (list(data.batch_loader(dataset, order, n)) for n in (0, 1))
    assert [batch.ids for batch in here] == [[utterances[i].id for i in row] for row in order]
    for one, other in zip(here, elsewhere, strict=True):
        assert one.ids == other.ids
        assert one.audio_s == other.audio_s
        for field in ("feats", "feat_lens", "targets", "target_lens"):
            assert torch.equal(getattr(one, field), getattr(other, field))


def test_loader_pads_with_the_settings_of_the_dataset(utterances, tokenizer):
    cfg = features.FeatureConfig(round_frames=1, round_labels=1)
    [batch] = data.batch_loader(data.SpeechDataset(utterances, tokenizer, cfg), [[5]], 0)
    assert batch.feats.shape[1] == batch.feat_lens.item()
    assert batch.targets.shape[1] == batch.target_lens.item()


def test_a_killed_worker_is_an_error_in_words_at_the_next_batch(utterances, tokenizer):
    batches = data.batch_loader(
        data.SpeechDataset(utterances, tokenizer, features.DEFAULT), [[0]] * 500, 1
    )
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    time.sleep(0.5)  # a step; nothing may interrupt it
    with pytest.raises(OSError, match="no batch: a worker process was killed"):
        list(batches)


def test_a_lost_batch_is_an_error_in_words(utterances, tokenizer, monkeypatch):
    collate, seconds = data.collate, [0.6, 2.0]

    def collate_late(items, cfg):
        time.sleep(seconds.pop(0))
        return collate(items, cfg)

    monkeypatch.setattr(data, "collate", collate_late)
    monkeypatch.setattr(data, "LOOK_EVERY_S", 0.2)
    dataset = data.SpeechDataset(utterances, tokenizer, features.DEFAULT)
    batches = data.batch_loader(dataset, [[0], [1]], 1, timeout_s=1.0)
    assert next(batches).ids == [utterances[0].id]  # late, but in time
    with pytest.raises(OSError, match="no batch: none for 1 s: .*/dev/shm is full"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_the_loader_are_passed_on(utterances, tokenizer, monkeypatch, workers):
    def fail(*_):
        raise RuntimeError("a mistake in the front end")

    monkeypatch.setattr(data, "features", fail)
    dataset = data.SpeechDataset(utterances, tokenizer, features.DEFAULT)
    with pytest.raises(RuntimeError, match="a mistake in the front end"):
        next(data.batch_loader(dataset, [[0]], workers))


def test_loader_accepts_the_sampler_order(utterances, tokenizer):
    seconds = [u.duration_s for u in utterances]
    order = data.bucket_batches(seconds, 4, 2, np.random.default_rng(1))
    dataset = data.SpeechDataset(utterances, tokenizer, features.DEFAULT, seed=1)
    batches = list(data.batch_loader(dataset, order[:, 1::2], 0))
    assert [b.ids for b in batches] == [[utterances[i].id for i in row[1::2]] for row in order]
