"""Docstrings for the site: formulas, roles and examples as Markdown has them."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`~?([^`]+)`")
MATH_ROLE = re.compile(r":math:`([^`]+)`")


def convert(text: str) -> str:
    """reStructuredText's formulas and roles, of which our docstrings use these few, as Markdown."""
    lines, formula, indent = [], False, 0
    for line in text.split("\n"):
        depth = len(line) - len(line.lstrip())
        if formula and line.strip() and depth <= indent:
            lines.append(" " * indent + "$$\n")
            formula = False
        start = re.match(r"( *)\.\. math::(.*)", line)
        if start:
            formula, indent = True, len(start[1])
            lines += ["", " " * indent + "$$"] + ([" " * indent + start[2].strip()] if start[2].strip() else [])
        elif formula:
            if line.strip():
                lines.append(line)
        else:
            lines.append(line)
    if formula:
        lines.append(" " * indent + "$$")
    text = "\n".join(lines)
    text = MATH_ROLE.sub(r"$\1$", ROLE.sub(r"`\1`", text))
    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = convert(obj.docstring.value)
