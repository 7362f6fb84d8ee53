"""What the progress bar says."""

import io

import pytest
from run_folder import metrics

from iin_fast.train import train
from iin_fast.train.logs import Bar

console_module = pytest.importorskip("rich.console")


@pytest.fixture
def console(monkeypatch):
    """A terminal that remembers what it showed, and whose clock ``console.now`` is set by the test."""
    console = console_module.Console(
        file=io.StringIO(), record=True, force_terminal=True, width=80, get_time=lambda: console.now
    )
    console.now = 0.0
    monkeypatch.setattr("iin_fast._output.Output", lambda: console)
    return console


def test_both_losses_and_the_time_left_fit_80_columns(console):
    """A resumed run: 20 of 100 steps are done, and each takes half a second from there."""
    with Bar(100, 20, True) as bar:
        for step in range(21, 61):
            console.now += 0.5
            bar.step(step)
        bar.tell(60, {"loss": 99.0, "held_out_loss": -123.456, "nats_per_dim": 0.0, "samples_per_second": 1.0})
        bar.tell(60, {"loss": -112.3456, "nats_per_dim": -0.98765, "samples_per_second": 12345.6})
    last = console.export_text().splitlines()[-1]
    assert "60/100" in last and len("training" + last.rpartition("training")[2]) <= 80
    assert "loss -112.35, held out -123.46" in last
    assert last.rstrip().endswith("0:00:20")  # 40 steps left, 2 a second


def test_no_bar_where_none_is_wanted(console):
    with Bar(100, 0, False) as bar:
        bar.step(1)
        bar.tell(1, {"loss": 1.0, "nats_per_dim": 1.0, "samples_per_second": 1.0})
    assert console.export_text() == ""


def test_outside_of_a_terminal_there_is_a_line_every_20_seconds(monkeypatch):
    console = console_module.Console(file=io.StringIO(), force_terminal=False, width=160, get_time=lambda: now[0])
    monkeypatch.setattr("iin_fast._output.Output", lambda: console)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    now = [0.0]
    with Bar(100, 0, True, "judge") as bar:
        for step in range(1, 101):
            now[0] += 0.5
            bar.step(step, f"loss {step}")
        lines = console.file.getvalue().splitlines()
    assert lines == ["judge: 41 of 100, 30 s left  loss 41", "judge: 82 of 100, 9 s left  loss 82"]


def test_bar_says_what_the_log_says(console, latents, settings, tmp_path):
    train(latents, tmp_path / "run", settings(steps=20), accelerator="cpu", progress=True)
    last = console.export_text().splitlines()[-1]
    line = metrics(tmp_path / "run")[-1]
    assert "20/20" in last and f"loss {float(line['loss']):.2f}, held out {float(line['held_out_loss']):.2f}" in last
