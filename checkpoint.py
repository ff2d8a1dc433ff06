# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: write them whole, read them safely, and keep other runs out of a run directory."""

import fcntl
import hashlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

CHECKPOINT_FORMAT = 4


class DamagedCheckpoint(ValueError):
    """Not what was written: truncated, or a bit of it flipped."""


def digest(value: object) -> str:
    """SHA-256 of everything in a checkpoint. torch.load checks no sums of its own."""
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


def load_checkpoint(path: str | Path) -> dict:
    """What train.save_checkpoint wrote; no code in it is run.

    Raises:
        OSError: missing, or cannot be read.
        DamagedCheckpoint: not readable, or its checksum is wrong.
        ValueError: of another program or another version of this one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - zipfile, pickle and torch raise all kinds here
            raise DamagedCheckpoint(f"{path}: not readable as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: not a checkpoint of train.py")
    checksum = checkpoint.pop("sha256", None)
    is_whole = checksum == digest(checkpoint)
    # Another format may have no checksum, or another one: only a damaged file has a wrong one.
    if not is_whole and (checksum or checkpoint.get("format") == CHECKPOINT_FORMAT):
        raise DamagedCheckpoint(f"{path}: damaged: the checksum is wrong")
    if "format" not in checkpoint:
        raise ValueError(f"{path}: not a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path}: format {checkpoint['format']}, this version reads {CHECKPOINT_FORMAT}"
        )
    return checkpoint


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes beside `path` and renames, so that `path` is always whole.

    Raises:
        OSError: the disk is full, the folder gone or read-only; what was at `path` is still there.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(checkpoint | {"sha256": digest(checkpoint)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer, on a full disk
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error


def list_checkpoints(out: Path) -> list[Path]:
    """Oldest first. A copy under any other name is the user's."""
    return sorted(out.glob(f"checkpoint-{'[0-9]' * 8}.pt"))


def lock_run(out: Path) -> TextIO:
    """Keeps other runs out of the run directory until what is returned is closed.

    POSIX's locks hold across a network and end with the process, killed or not, if its host lives;
    loader workers do not inherit them.

    Raises:
        ValueError: another process has it.
    """
    lock = (out / ".lock").open("a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows both
        raise ValueError(f"{out}: another run writes there: give this one another --out; if its "
                         f"host is gone, delete {lock.name}") from error
    except OSError as error:
        print(f"warning: {out} cannot be locked: {error}", file=sys.stderr)
    return lock


def clear(out: Path, is_new: bool) -> None:
    """Deletes what a run that was killed had half written to its run directory; for a new run all
    that training ever wrote there, and nothing else."""
    paths = [*out.glob("checkpoint-*.partial"), out / "best.partial", out / "log.partial"]
    if is_new:
        paths += [*list_checkpoints(out), out / "best.pt", *out.glob("events.out.tfevents.*")]
        paths += (out / name for name in ("log.jsonl", "mllog.log", "curves.png", "trace.json"))
    for path in paths:
        path.unlink(missing_ok=True)
