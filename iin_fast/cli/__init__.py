"""The command line of iin-fast: see what this machine has, check every backend, run the demo, time the flow."""

import sys

try:
    import typer
    from rich.markup import escape
except ImportError as missing:
    raise SystemExit(f"iin-fast: the command line needs {missing.name}: pip install 'iin-fast[cli]'") from missing

from . import tools
from .console import console

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
for command in (tools.info, tools.check, tools.demo, tools.bench):
    app.command()(command)


def main() -> None:
    try:
        app()
    except (ArithmeticError, ImportError, OSError, TypeError, ValueError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(1)
