"""Where the commands print, and how they fail: one line, no traceback."""

import os
from typing import Any

import typer
from rich.markup import escape

from .._output import Output

__all__ = ["Commands", "console"]

console = Output()
errors = Output(stderr=True)


EXPECTED = (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError)


class Commands(typer.core.TyperGroup):
    """Commands whose errors are one line on stderr and exit code 2; Ctrl-C gives 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (
            typer.Abort,
            typer.Exit,
            BrokenPipeError,
        ):  # RuntimeErrors themselves; of --help, which typer ends without a word
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get("IIN_FAST_TRACEBACK"):
                raise
            # an option that is missing or unknown says its name in format_message alone
            usage = getattr(error, "format_message", None)
            text = " ".join((str(error) if usage is None else usage()).split())
            if usage is None and (not text or not isinstance(error, EXPECTED)):
                text = f"{type(error).__name__}: {text}; IIN_FAST_TRACEBACK=1 shows where"
            errors.print(f"[red]error:[/red] {escape(text)}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
