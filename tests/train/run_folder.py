"""What a run folder holds, as the tests look at it."""

import json


def metrics(run):
    """The lines of the log as dictionaries of text."""
    head, *lines = (run / "logs" / "metrics.csv").read_text().splitlines()
    return [dict(zip(head.split(","), line.split(","), strict=True)) for line in lines]


def record(run):
    return json.loads((run / "run.json").read_text())
