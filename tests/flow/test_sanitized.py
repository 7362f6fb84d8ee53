"""Random texts, right and wrong, through the parser and the walks under sanitizers: refused, or nothing out of bounds, no race."""

import os
import random
from pathlib import Path

import pytest
from sanitizers import ISAS, ROOT, compiled, run

from flow.test_op import example
from iin_fast.nn import MaskedAutoregressiveFlow, NeuralSplineFlow, RealNVP
from iin_fast.ops.flow.program import flow_as_program

SOURCES = [
    Path(__file__).with_name("sanitized.cpp"),
    *(
        ROOT / "csrc" / "flow_program" / f"{part}.cpp"
        for part in ("flow_program_plan", "flow_program_loops", "wide_net_loops")
    ),
]
# Each with how many changed texts of each program (make sanitize has more): ThreadSanitizer takes ten times as long, and races
# don't hide in the texts.
SANITIZERS = {"address,undefined": int(os.environ.get("IIN_FAST_TEXTS", 75)), "thread": 10}


def texts(changes: int) -> list[str]:
    """Programs, and each many times with some tokens changed, dropped or doubled."""
    flows = [
        NeuralSplineFlow(3, 2, n_flows=1, bins=3, hidden_dim=5, hidden_depth=1, mixing="lu"),
        MaskedAutoregressiveFlow(3, 1, n_flows=2, hidden_dim=5, hidden_depth=1),
        RealNVP(4, 0, n_flows=2, hidden_dim=3, hidden_depth=0),
        MaskedAutoregressiveFlow(3, 1, n_flows=1, hidden_dim=185, hidden_depth=1),  # a wide walk, as 200 below
    ]
    right = [example().program.text, *(flow.program().text for flow in flows)]
    right += [flow_as_program(3, 2, hidden, 1, 2, 2, 0.1, 0.9, True).text for hidden in (5, 200)]  # 200: a wide walk
    draw = random.Random(0)
    words = sorted({word for text in right for word in text.split()}) + ["-1", "0", "1", "2", "16777216", "99999999999"]
    found = list(right)
    for text in right:
        for _ in range(changes):
            tokens = text.split()
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                at = draw.randrange(len(tokens))
                tokens[at : at + 1] = draw.choice(([draw.choice(words)], [draw.choice(words)], [], [tokens[at]] * 2))
            found.append(" ".join(tokens))
    return found


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_out_of_bounds_and_no_thread_races(sanitizer: str, isa: str) -> None:
    changes = SANITIZERS[sanitizer]
    program = compiled("sanitized", *SOURCES, sanitizer=sanitizer, isa=isa)
    found = texts(changes)
    done = run(program, text="\n".join(found))
    assert done.returncode == 0, done.stderr[-3000:]
    refused, walked = map(int, done.stdout.split())
    assert 0 < refused < len(found) and walked > len(found) / 8
