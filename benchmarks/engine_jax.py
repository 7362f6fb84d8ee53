"""The JAX side of benchmarks/engine.py: the same flows in flowjax, compiled by jax.jit.

Runs in an environment of its own (pip install jax flowjax). Reads one request a line, a JSON object with the flow's sizes and
how long to measure, and answers with one line: seconds of each call, or of a call among "in_a_row" that are asked for.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from paramax import unwrap


def model(case: dict[str, Any]) -> Any:
    common = {
        "base_dist": Normal(jnp.zeros(case["dim"])),
        "cond_dim": case["context_dim"] or None,
        "flow_layers": case["layers"],
        "nn_width": case["hidden"],
        "nn_depth": case["depth"],
    }
    if case["transformer"] == "spline":
        common["transformer"] = RationalQuadraticSpline(knots=case["bins"], interval=3)
    make = masked_autoregressive_flow if case["kind"] == "autoregressive" else coupling_flow
    return make(jax.random.key(0), **common)


def call(case: dict[str, Any], flow: Any) -> Callable[[], Any]:
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (case["batch"], case["dim"]))
    context = jax.random.normal(keys[1], (case["batch"], case["context_dim"])) if case["context_dim"] else None

    if case["measure"] == "log_prob":
        density = eqx.filter_jit(lambda f: unwrap(f).log_prob(x, context))
        return lambda: density(flow)

    if case["measure"] == "sample":
        draw = eqx.filter_jit(lambda f, key: unwrap(f).sample(key, (case["batch"],)))
        return lambda: draw(flow, keys[0])

    parameters, static = eqx.partition(flow, eqx.is_inexact_array)
    optimizer = optax.adam(1e-3)
    state = {"parameters": parameters, "optimizer": optimizer.init(parameters)}

    @eqx.filter_jit
    def step(parameters: Any, state: Any) -> tuple[Any, Any]:
        def loss(p: Any) -> Any:
            return -unwrap(eqx.combine(p, static)).log_prob(x, context).mean()

        updates, state = optimizer.update(eqx.filter_grad(loss)(parameters), state, parameters)
        return eqx.apply_updates(parameters, updates), state

    def train() -> Any:
        state["parameters"], state["optimizer"] = step(state["parameters"], state["optimizer"])
        return state["parameters"]

    return train


def prepare(case: dict[str, Any]) -> tuple[int, Callable[[], Any]]:
    flow = model(case)
    size = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(flow, eqx.is_inexact_array)))
    return size, call(case, flow)


def serve(prepare: Callable[[dict[str, Any]], tuple[int, Callable[[], Any]]], *libraries: str) -> None:
    """Answer requests, one at a time; ``prepare`` gives the number of parameters and the call of a case."""
    ready: dict[str, Callable[[], Any]] = {}
    print(json.dumps({name: version(name) for name in ("jax", "jaxlib", *libraries)}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        answer: dict[str, Any] = {}
        if case["name"] not in ready:
            answer["parameters"], made = prepare(case)
            ready = {case["name"]: made}
            start = time.perf_counter()
            jax.block_until_ready(made())
            answer["first_call"] = time.perf_counter() - start
        run, in_a_row = ready[case["name"]], case.get("in_a_row", 1)
        times: list[float] = []
        end = time.perf_counter() + case["seconds"]
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            for _ in range(in_a_row):
                result = run()
            jax.block_until_ready(result)
            times.append((time.perf_counter() - start) / in_a_row)
        print(json.dumps(answer | {"times": times}), flush=True)


if __name__ == "__main__":
    serve(prepare, "flowjax")
