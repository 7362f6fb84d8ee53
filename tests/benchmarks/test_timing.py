"""Timing in turn: who is called when, and what counts."""

from iin_fast.bench.timing import in_turn, noise_in


def test_calls_take_turns_and_warm_up_does_not_count(monkeypatch):
    now, made = 0.0, []
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def call(name, cost):
        def run():
            nonlocal now
            made.append(name)
            now += cost * (100 if len(made) <= 6 else len(made))  # the first calls are slow

        return run

    found = in_turn({"a": call("a", 1.0), "b": call("b", 0.5)}, 3, warm_up=1, burst=3)
    assert "".join(made) == "aaabbb" * 4
    a = [sum(range(start, start + 3)) / 3 for start in (7, 13, 19)]
    assert found["a"] == {"min": min(a), "median": a[1], "max": max(a)}
    assert found["b"]["max"] == (22 + 23 + 24) / 3 / 2


def test_noise_is_named():
    rows = {"steady": {"min": 1.0, "max": 2.0}, "shaken": {"min": 1.0, "max": 2.1}, "worse": {"min": 0.1, "max": 4.0}}
    assert noise_in(rows) == "noise, not a result (slowest over 2 × fastest): shaken, worse"
    assert noise_in({"steady": rows["steady"]}) is None
