"""Formulas for the site: MathML, made when the site is built, so that a page needs no script and no network to show them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'(class="arithmatex">)\\(\(|\[)(.*?)\\[)\]](?=</)', re.DOTALL
)
LETTER = r'<mi mathvariant="normal">(\w)</mi>'
# What latex2mathml writes in a way that browsers space badly.
REPAIRS = [
    (
        re.compile(rf"{LETTER}(?:{LETTER})+"),
        lambda name: "<mi>" + re.sub(LETTER, r"\1", name[0]) + "</mi>",
    ),
    (
        re.compile(
            r"<m([io])( movablelimits=\"true\")?>(log|exp|det|max|Pr)</m\1>"
        ),
        r'<mo\2 lspace="0.167em" rspace="0.167em">\3</mo>',
    ),
    (
        re.compile(
            r'<mo( fence="false")? stretchy="false">(&#x0007C;|&#x02016;)</mo>'
        ),
        r'<mo\1 stretchy="false" lspace="0" rspace="0">\2</mo>',
    ),
    (re.compile("<mi>&#x0007E;</mi>"), "<mo>&#x0223C;</mo>"),
]


def _mathml(found: re.Match[str]) -> str:
    text = convert(
        html.unescape(found[3]).strip(),
        display="block" if found[2] == "[" else "inline",
    )
    for pattern, repair in REPAIRS:
        text = pattern.sub(repair, text)
    return found[1] + text


def on_page_content(text: str, **kwargs: Any) -> str:
    """mkdocs calls this with the HTML of each page; what latex2mathml can't read stops the build."""
    return FORMULA.sub(_mathml, text)
