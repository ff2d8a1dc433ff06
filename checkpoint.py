# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: write them whole, read them safely, keep two, and lock a run directory.

    save_checkpoint(out / "checkpoint-00000042.pt", {"model": model.state_dict(), "step": 42})
    found = newest_checkpoint(out, warn=print)    # (path, contents), or None

Stands alone: copy this file into another project and it works (torch only; POSIX). A checkpoint
is a dictionary of tensors, numbers, strings, lists and dictionaries in torch's own file format.
"""

import errno
import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

CHECKPOINT_FORMAT = 5  # rises whenever older checkpoints can no longer be read


class DamagedCheckpoint(ValueError):
    """The file was truncated, or bits of it changed, since it was written."""


# ---------------------------------------------------------------------------------- one checkpoint


def digest(value: object) -> str:
    """SHA-256 of a checkpoint's keys and values; torch.load itself checks no sums."""
    sha = hashlib.sha256()

    def feed(item: object) -> None:
        if isinstance(item, Tensor):
            sha.update(f"{item.dtype} {tuple(item.shape)}".encode())
            sha.update(item.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(item, Mapping):
            for key, inner in item.items():
                feed(key)
                feed(inner)
        elif isinstance(item, (list, tuple)):
            for inner in item:
                feed(inner)
        else:
            sha.update(repr(item).encode())

    feed(value)
    return sha.hexdigest()


def save_checkpoint(path: Path, contents: dict) -> None:
    """Writes a temporary file and renames it, so that the file at `path` is always whole.

    Raises:
        OSError: the disk is full, or the folder is gone or read-only; an older file at `path`
            is left as it was.
    """
    partial = path.with_suffix(".partial")
    contents = {"format": CHECKPOINT_FORMAT, **contents}
    try:
        with partial.open("wb") as file:
            torch.save(contents | {"sha256": digest(contents)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        # torch ends its archive after a write that failed, and that error hides the system's.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        why = getattr(cause, "strerror", None) or cause
        raise OSError(f"{path} could not be written: {why}") from error


def load_checkpoint(path: str | Path) -> dict:
    """Reads a file of `save_checkpoint` without running any code that it may contain.

    Raises:
        OSError: the file is missing or cannot be read.
        DamagedCheckpoint: the file is not readable as a checkpoint, or its checksum is wrong.
        ValueError: another program or another version of this one wrote it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    with open(path, "rb") as file:
        try:
            contents = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise  # the file may be whole
        except Exception as error:  # noqa: BLE001 - zipfile, pickle and torch raise many types
            raise DamagedCheckpoint(f"{path}: not readable as a checkpoint: {error}") from error
    if not isinstance(contents, dict) or not {"format", "sha256"} & contents.keys():
        raise ValueError(f"{path}: not a checkpoint of train.py")
    checksum = contents.pop("sha256", None)
    # Another format may compute its checksum in another way, but a flipped bit in the format
    # number must count as damage: only a file without any checksum is taken at its word.
    if checksum != digest(contents) and (checksum or contents["format"] == CHECKPOINT_FORMAT):
        raise DamagedCheckpoint(f"{path}: damaged: the checksum is wrong")
    if contents.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: format {contents.get('format')}, this version reads "
                         f"{CHECKPOINT_FORMAT}")
    return contents


# ------------------------------------------------------------------------------- the run directory


def list_checkpoints(out: Path) -> list[Path]:
    """Oldest first. A copy under any other name belongs to the user and is not listed."""
    return sorted(out.glob(f"checkpoint-{'[0-9]' * 8}.pt"))


def newest_checkpoint(out: Path, warn: Callable[[str], None]) -> tuple[Path, dict] | None:
    """Path and contents of the newest checkpoint that is not damaged, or None.

    Raises:
        ValueError: another version wrote it.
    """
    for path in reversed(list_checkpoints(out)):
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            warn(f"{error}; trying the one before")
    return None


def keep_newest(out: Path) -> None:
    """Deletes all checkpoints but the newest two: one is left if the other is damaged."""
    for path in list_checkpoints(out)[:-2]:
        path.unlink()


def reserve_space(out: Path, size: int) -> None:
    """Reserves the space that a run's checkpoints will need, and frees it at once, so that a full
    disk is noticed before training.

    Beside best.pt and the newest two, a run writes a fourth file before it deletes the oldest.
    Systems that cannot reserve space are not tried.

    Args:
        size: of a checkpoint, in bytes.
    Raises:
        OSError: the disk, a quota or a limit on the size of files is too small.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    count = 4 - len([*out.glob("best.pt"), *list_checkpoints(out)])
    with ExitStack() as files:
        for _ in range(count):
            file = files.enter_context(tempfile.TemporaryFile(dir=out))
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise OSError(f"{out}: {error.strerror}: {count} more checkpoints of "
                                  f"{size / 1e6:.0f} MB have to fit: free space, or give another "
                                  "folder") from error


def lock_run(out: Path) -> TextIO:
    """Keeps other runs out of the run directory until the returned file is closed.

    POSIX locks hold across network file systems and end with their process, even if it is killed,
    as long as its host lives; child processes do not inherit them.

    Raises:
        ValueError: another process holds the lock.
    """
    lock = (out / ".lock").open("a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either
        raise ValueError(f"{out}: another run writes there: give this one another --out; if its "
                         f"host is gone, delete {lock.name}") from error
    except OSError as error:
        print(f"warning: {out} cannot be locked: {error}", file=sys.stderr)
    return lock


def clear_run(out: Path, resumed: Path | None) -> None:
    """Deletes the files of a run directory that the coming run cannot use.

    Args:
        resumed: the checkpoint from which the run goes on: half-written files are deleted, and
            newer checkpoints, which are damaged. None for a new run: every file that training
            writes is deleted. Other files are kept in both cases.
    """
    paths = [*out.glob("checkpoint-*.partial"), out / "best.partial", out / "log.partial"]
    paths += (path for path in list_checkpoints(out) if resumed is None or path > resumed)
    if resumed is None:
        paths += [out / "best.pt", *out.glob("events.out.tfevents.*")]
        paths += (out / name for name in ("log.jsonl", "mllog.log", "curves.png", "trace.json"))
    for path in paths:
        path.unlink(missing_ok=True)
