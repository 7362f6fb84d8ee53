"""Imported before torch: Ctrl-C while the command line imports its packages ends it at once, without a traceback."""

import signal
import sys

__all__ = ["raise_on_interrupt"]


def _is_command() -> bool:
    return sys.orig_argv[1:3] == ["-m", "iin_fast.cli"] or sys.argv[0].endswith("iin-fast")


def raise_on_interrupt() -> None:
    """Ctrl-C raises KeyboardInterrupt again; where it is ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_command() and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
