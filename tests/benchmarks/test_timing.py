"""Timing in turn: who is called when, and what counts."""

from iin_fast.bench.timing import in_turn


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
