"""The command line of iin-fast: train an IIN on latents, look into it, change one factor; check and time the kernels."""

from collections.abc import Callable

try:
    import rich  # noqa: F401
    import typer
except ImportError as missing:
    raise SystemExit(f"iin-fast: the command line needs {missing.name}: pip install 'iin-fast[cli]'") from missing

from .._interrupt import raise_on_interrupt
from . import method, tools
from .console import Commands

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)
METHOD: tuple[Callable[..., None], ...] = (
    *(method.train, method.dims, method.encode, method.decode, method.swap),
    *(method.interpolate, method.axis, method.sample, method.score, method.evaluate, method.report, method.explore),
)
MACHINE: tuple[Callable[..., None], ...] = (tools.info, tools.check, tools.demo, tools.bench)
for panel, commands in (("The method", METHOD), ("This machine", MACHINE)):
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def main() -> None:
    raise_on_interrupt()
    app()
