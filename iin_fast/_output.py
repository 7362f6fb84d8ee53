"""Where commands and trainings print. Needs rich."""

import os

from rich.console import Console

__all__ = ["Output"]


class Output(Console):
    """Goes on when nobody reads any more (``iin-fast train … | head``): what a command makes is worth more than its lines."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # else Python fails when it closes the stream
