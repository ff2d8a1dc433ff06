# SPDX-License-Identifier: Apache-2.0
"""checkpoint.py: a file is whole or not there, damage is found, a run directory has one run.

    python -m pytest tests/test_checkpoint.py
"""

import os
import random
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from tones import REPO

import checkpoint
from checkpoint import (
    CHECKPOINT_FORMAT,
    DamagedCheckpoint,
    clear_run,
    digest,
    keep_newest,
    list_checkpoints,
    load_checkpoint,
    lock_run,
    newest_checkpoint,
    save_checkpoint,
)

CONTENTS = {
    "model": {"weight": torch.arange(24.0).reshape(4, 6), "bias": torch.zeros(4)},
    "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
    "state": {"step": 12, "best_wer": float("inf"), "note": None},
}


@pytest.fixture
def saved(tmp_path):
    """Path of a checkpoint with CONTENTS."""
    path = tmp_path / "checkpoint-00000012.pt"
    save_checkpoint(path, CONTENTS)
    return path


@pytest.fixture
def out(tmp_path):
    """A run directory with the checkpoints of steps 1 to 4."""
    for step in range(1, 5):
        save_checkpoint(tmp_path / f"checkpoint-{step:08d}.pt", {"step": step})
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------- one checkpoint


def test_loading_returns_the_contents_and_the_format(saved):
    assert digest(load_checkpoint(saved)) == digest({"format": CHECKPOINT_FORMAT, **CONTENTS})


def test_a_full_disk_is_named_and_leaves_the_older_checkpoint_alone(saved):
    contents, before = {"model": torch.zeros(3 * 2**20)}, saved.read_bytes()
    saved.with_suffix(".partial").symlink_to("/dev/full")
    message = "00000012.pt could not be written: No space left on device$"
    with pytest.raises(OSError, match=message):
        save_checkpoint(saved, contents)
    assert names(saved.parent) == [saved.name]
    assert saved.read_bytes() == before


def test_a_flipped_bit_is_found_or_changes_no_value(saved):
    """The archive's own bookkeeping has bits on which no value depends."""
    contents, generator, found = saved.read_bytes(), random.Random(1), 0
    version = contents.index(b"format")
    places = [*range(version, version + 12), *generator.sample(range(len(contents)), 60)]
    for place in places:
        data = bytearray(contents)
        data[place] ^= 1 << place % 8
        saved.write_bytes(data)
        try:
            loaded = load_checkpoint(saved)
        except DamagedCheckpoint:
            found += 1
        else:
            assert digest(loaded) == digest({"format": CHECKPOINT_FORMAT, **CONTENTS}), place
    assert found > 30


@pytest.mark.parametrize("length", [0, 1000, -100])
def test_a_truncated_checkpoint_is_damaged(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(DamagedCheckpoint, match=f"{saved}: not readable as a checkpoint"):
        load_checkpoint(saved)


@pytest.mark.parametrize("contents", [{"weights": torch.zeros(2)}, [1, 2]])
def test_a_file_of_another_program_is_refused(saved, contents):
    torch.save(contents, saved)
    with pytest.raises(ValueError, match=f"{saved}: not a checkpoint of train.py") as error:
        load_checkpoint(saved)
    assert not isinstance(error.value, DamagedCheckpoint)


def test_another_format_is_refused_and_not_taken_for_damage(saved):
    save_checkpoint(saved, {**CONTENTS, "format": CHECKPOINT_FORMAT - 1})
    message = f"{saved}: format {CHECKPOINT_FORMAT - 1}, this version reads {CHECKPOINT_FORMAT}"
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(saved)
    assert not isinstance(error.value, DamagedCheckpoint)


class MakeFolder:
    """Pickled code that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_not_run(saved, tmp_path):
    torch.save({**CONTENTS, "extra": MakeFolder(tmp_path / "made")}, saved)
    with pytest.raises(DamagedCheckpoint, match="not readable as a checkpoint"):
        load_checkpoint(saved)
    assert not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------- the run directory


def test_the_newest_two_stay(out):
    keep_newest(out)
    assert names(out) == ["checkpoint-00000003.pt", "checkpoint-00000004.pt"]


def test_damaged_checkpoints_are_passed_over_with_a_warning(out):
    oldest, older, *newest = list_checkpoints(out)
    for path in newest:
        path.write_bytes(b"half")
    warnings = []
    assert newest_checkpoint(out, warnings.append) == (older, load_checkpoint(older))
    assert [text.partition(": ")[0] for text in warnings] == list(map(str, reversed(newest)))
    assert warnings[0].endswith("; trying the one before")
    for path in (oldest, older):
        path.write_bytes(b"half")
    assert newest_checkpoint(out, warnings.append) is None


def test_a_checkpoint_of_another_format_is_not_passed_over(out):
    save_checkpoint(out / "checkpoint-00000004.pt", {"format": 1})
    with pytest.raises(ValueError, match="00000004.pt: format 1"):
        newest_checkpoint(out, pytest.fail)


USERS_FILES = ["checkpoint-00000004-good.pt", "checkpoint-keep.pt", "corpus.tar.gz.partial",
               "notes.txt"]
LEFT_OVERS = ["checkpoint-00000003.partial", "best.partial", "log.partial"]
RUN_FILES = ["best.pt", "log.jsonl", "mllog.log", "curves.png", "trace.json",
             "events.out.tfevents.1"]


@pytest.mark.parametrize(("resumed", "kept"), [
    ("checkpoint-00000003.pt", [*RUN_FILES, *(f"checkpoint-0000000{n}.pt" for n in (1, 2, 3))]),
    (None, []),
], ids=["resumed", "new"])
def test_a_run_deletes_the_files_of_training_that_it_cannot_use_and_no_other(out, resumed, kept):
    for name in (*USERS_FILES, *LEFT_OVERS, *RUN_FILES):
        (out / name).write_text(name)
    clear_run(out, resumed and out / resumed)
    assert names(out) == sorted([*USERS_FILES, *kept])


@contextmanager
def small_files():
    """Files may have 1,000 bytes within the block, pytest's own output included."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("existing", "count"), [([], 4), (["best.pt"], 3)])
def test_space_for_the_checkpoints_to_come_is_tried(tmp_path, existing, count):
    for name in existing:
        (tmp_path / name).write_text("x")
    checkpoint.reserve_space(tmp_path, 1000)
    message = f"^{tmp_path}: File too large: {count} more checkpoints of 2 MB have to fit: "
    with small_files(), pytest.raises(OSError, match=message):
        checkpoint.reserve_space(tmp_path, 2_000_000)
    assert names(tmp_path) == existing


LOCK = """
import sys, checkpoint
from pathlib import Path
lock = checkpoint.lock_run(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_directory_has_one_run_until_its_process_ends(tmp_path):
    command = [sys.executable, "-c", LOCK, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPO, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"{tmp_path}: another run writes there.*/.lock"):
            lock_run(tmp_path)
        other.kill()
    lock_run(tmp_path).close()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", refuse)
    lock_run(tmp_path).close()
    assert capsys.readouterr().err == (
        f"warning: {tmp_path} cannot be locked: No locks available\n"
    )
