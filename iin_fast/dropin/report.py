"""What ``accelerate`` and ``patch`` did."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Line", "Report"]


@dataclass(frozen=True)
class Line:
    """One module or class: where it stands, its qualified class name, and what was done, or why nothing was."""

    path: str
    name: str
    replaced: bool
    why: str = ""


class Report:
    """What was replaced, what was left and why; ``str`` gives a table with one row per class and reason.

    Attributes:
        lines: one for each module (``accelerate``) or class (``patch``) that belongs to a known library.

    Example:
        >>> print(Report([Line("0", "nflows.X", True), Line("2", "nflows.X", True), Line("3", "mine.Y", False, "why")]))
        count  class
            2  nflows.X  replaced
            1  mine.Y    left: why
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = tuple(lines)

    @property
    def replaced(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.replaced)

    @property
    def left(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if not line.replaced)

    def __repr__(self) -> str:
        return f"Report({len(self.replaced)} replaced, {len(self.left)} left)"

    def __str__(self) -> str:
        if not self.lines:
            return "nothing of a known library found"
        counts = Counter((not line.replaced, line.name, line.why) for line in self.lines)
        width = max(len("class"), *(len(name) for _, name, _ in counts))
        rows = [f"count  {'class':{width}}"]
        for (left, name, why), count in sorted(counts.items()):
            outcome = f"left: {why}" if left else f"replaced{': ' + why if why else ''}"
            rows.append(f"{count:5d}  {name:{width}}  {outcome}")
        return "\n".join(row.rstrip() for row in rows)
