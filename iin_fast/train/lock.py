"""One training at a time in a run folder."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock"]


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Keeps other trainings out of a run folder, which is made if it is not there; an empty one goes again.

    The system holds the lock for this process and lets go of it however the process ends, so the file ``lock`` that a killed one
    leaves behind locks nothing.

    Raises:
        RuntimeError: another training is at work there.
        OSError: the folder can't be made or written.
    """
    new = not run.exists()
    file = run / "lock"
    opened = _locked(file)
    try:
        os.ftruncate(opened, 0)
        os.write(opened, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if fcntl is None:  # Windows takes no open file away
            os.close(opened)
        file.unlink(missing_ok=True)
        if fcntl is not None:
            os.close(opened)
        if new:
            with suppress(OSError):  # not empty
                run.rmdir()


def _locked(file: Path) -> int:
    """The file, open and locked."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
            for path in (file.parent, *file.parent.parents):
                if os.path.lexists(path) and not path.is_dir():
                    what = "a file" if path.is_file() else "no folder, nor a link to one that is there"
                    raise NotADirectoryError(f"train: {path} is {what}, expected a folder for the run") from error
            continue  # another training has just taken its empty folder away
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, "this system has no such locks")
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(opened, 300).decode(errors="replace").strip()
            os.close(opened)
            raise RuntimeError(
                f"train: {file.parent} is in use by another training (process {who or 'unknown'}); wait for it, or take "
                "another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"train: {file.parent} can't be locked ({error.strerror}); see to it that one training at a time writes there",
                stacklevel=4,
            )
            return opened
        with suppress(FileNotFoundError):  # another training may have ended, and taken its file away, in between
            if os.path.samestat(os.fstat(opened), os.stat(file)):
                return opened
        os.close(opened)
