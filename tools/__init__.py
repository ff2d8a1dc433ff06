# SPDX-License-Identifier: Apache-2.0
"""Tools beside the recogniser, run from the project's root: python -m tools.<name>.

Every tool ends without a traceback at Ctrl-C, and when the reader of its output has ended, as in
`| head`. Its status then is the one that shells report for the signals SIGINT and SIGPIPE.
"""

import fcntl
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

QUIET = {KeyboardInterrupt: 130, BrokenPipeError: 141}  # exception: exit status


def end_quietly(kind: type[BaseException], error: BaseException,
                traceback: TracebackType | None) -> None:
    """Exits with the status of an exception in QUIET; prints the traceback of any other one."""
    if kind not in QUIET:
        sys.__excepthook__(kind, error, traceback)
        return
    if kind is BrokenPipeError:  # the interpreter flushes standard output once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(QUIET[kind])


# A hook, unlike an `except` in every main function, also acts while libraries are imported.
sys.excepthook = end_quietly
if isinstance(sys.stdout, io.TextIOWrapper):  # notebooks have another one
    sys.stdout.reconfigure(line_buffering=True)  # a closed pipe is noticed at the next line


LOG_INTERVAL_S = 30


class LogLines:
    """A file for tqdm that makes a line of stderr of every state of a bar."""

    def write(self, text: str) -> None:
        if state := text.strip():  # tqdm begins with a carriage return
            print(state, file=sys.stderr, flush=True)


def bar_options() -> dict:
    """Options of a tqdm bar: a log, unlike a terminal, gets a line every LOG_INTERVAL_S."""
    if sys.stderr.isatty():
        return {"leave": False}
    return {"file": LogLines(), "mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits for the lock of a folder, then holds it. A killed process releases its lock.

    NFS locks files that are opened for writing for all its hosts, and folders for one host only.
    """
    path, is_held = folder / ".lock", False
    while not is_held:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # its last holder has deleted the file by now
                is_held = os.path.samestat(os.fstat(file.fileno()), path.stat())
            if is_held:
                try:
                    yield
                finally:
                    path.unlink()
