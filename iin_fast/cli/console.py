"""Where the commands print, and how they fail: one line, no traceback."""

from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["Commands", "console"]

console = Console()
errors = Console(stderr=True)


class Commands(typer.core.TyperGroup):
    """Commands whose errors are one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ArithmeticError, ImportError, OSError, TypeError, ValueError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            errors.print(f"[red]error:[/red] {escape(text)}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
