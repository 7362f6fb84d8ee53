"""The options of train: one for each field of Settings, with the field's default and its entry in the docstring as help."""

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ..train import Settings

__all__ = ["settings_options", "sizes"]

SHORT = {"learning_rate": "--lr"}
PLAIN = (bool, int, float, str, type(None))  # types that a command line can hold


def settings_options(command: Callable[..., None], kind: type[Settings] = Settings) -> Callable[..., None]:
    """``command`` with an option for each field of ``kind`` in place of its argument ``settings``."""
    hints, helps = get_type_hints(kind), docstring_entries(kind.__doc__ or "")
    mappings = [name for name, hint in hints.items() if not set(get_args(hint) or (hint,)) <= set(PLAIN)]
    options = []
    for field in fields(kind):
        flags = (
            [f"--{field.name.replace('_', '-')}"] if field.default is False or field.name in SHORT else []
        )  # without a --no-…
        flags += [SHORT[field.name]] if field.name in SHORT else []
        hint = str | None if field.name in mappings else hints[field.name]
        option = Annotated[hint, typer.Option(*flags, help=helps.get(field.name, "").replace("[", r"\["))]  # type: ignore[valid-type]
        anyhow = inspect.Parameter.POSITIONAL_OR_KEYWORD
        options.append(inspect.Parameter(field.name, anyhow, default=field.default, annotation=option))

    parameters = list(inspect.signature(command, eval_str=True).parameters.values())
    place = [parameter.name for parameter in parameters].index("settings")
    parameters[place : place + 1] = options
    signature = inspect.Signature(parameters)

    def run(*arguments: Any, **named: Any) -> None:
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        given = bound.arguments
        values = {field.name: given.pop(field.name) for field in fields(kind)}
        values = {name: None if value == "" else value for name, value in values.items()}
        command(settings=kind(**values | {name: sizes(name, values[name]) for name in mappings}), **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def docstring_entries(text: str) -> dict[str, str]:
    """Argument to what the docstring says of it, each in one line and without marks of code and links."""
    found = re.search(r"Args:\n(.*?)(?:\n\n|$)", inspect.cleandoc(text), re.DOTALL)
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", found[1] if found else "", re.MULTILINE)
    return {name: re.sub(r":\w+:(?=`)|`+\"?|\"?`+", "", " ".join(entry.split())).rstrip(".") for name, entry in entries}


def sizes(option: str, text: str | None) -> dict[str, int] | None:
    """``digit=22,color=11`` as a mapping."""
    if not text:
        return None
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.rpartition("="))
        if not equals or not name or not number.isdigit():
            raise ValueError(f"--{option} has {part!r}, expected sizes like digit=22,color=11")
        if name in found:
            raise ValueError(f"--{option} names {name!r} twice")
        found[name] = int(number)
    return found
