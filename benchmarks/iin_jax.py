"""The JAX side of benchmarks/iin.py: the published flow of an IIN in plain JAX, compiled by jax.jit; Adam is optax's.

Runs in an environment of its own (pip install jax optax). Requests and answers are those of engine_jax.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from engine_jax import serve

Tree = Any


def start(case: dict[str, Any]) -> tuple[list[Tree], list[jax.Array]]:
    """Parameters and permutation of each block."""
    dim, hidden, depth = case["dim"], case["hidden"], case["depth"]
    keys = iter(jax.random.split(jax.random.key(0), case["n_flows"] * (4 * (depth + 2) + 1)))

    def net(inputs: int, outputs: int) -> list[tuple[jax.Array, jax.Array]]:
        sizes = [inputs, *[hidden] * (depth + 1), outputs]
        return [
            (jax.random.uniform(next(keys), (i, o), minval=-1, maxval=1) / i**0.5, jnp.zeros(o))
            for i, o in zip(sizes, sizes[1:], strict=False)
        ]

    blocks, permutations = [], []
    for _ in range(case["n_flows"]):
        halves = [[net(dim - dim // 2, dim // 2) for _ in range(2)] for _ in range(2)]
        blocks.append({"loc": jnp.zeros(dim), "scale": jnp.ones(dim), "halves": halves})
        permutations.append(jax.random.permutation(next(keys), dim))
    return blocks, permutations


def mlp(layers: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    for weight, bias in layers[:-1]:
        x = jax.nn.leaky_relu(x @ weight + bias, 0.01)
    weight, bias = layers[-1]
    return x @ weight + bias


def forward(blocks: list[Tree], permutations: list[jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = x.shape[1] - x.shape[1] // 2
    logdet = jnp.zeros(x.shape[0])
    for block, permutation in zip(blocks, permutations, strict=True):
        x = block["scale"] * (x + block["loc"])
        logdet += jnp.log(jnp.abs(block["scale"])).sum()
        for i, (scale, shift) in enumerate(block["halves"]):
            if i:
                x = jnp.concatenate([x[:, half:], x[:, :half]], 1)
            kept, moved = x[:, :half], x[:, half:]
            s = jnp.tanh(mlp(scale, kept))
            x = jnp.concatenate([kept, moved * jnp.exp(s) + mlp(shift, kept)], 1)
            logdet += s.sum(1)
        x = x[:, permutation]
    return x, logdet


def inverse(blocks: list[Tree], permutations: list[jax.Array], x: jax.Array) -> jax.Array:
    half = x.shape[1] - x.shape[1] // 2
    for block, permutation in zip(reversed(blocks), reversed(permutations), strict=True):
        x = x[:, jnp.argsort(permutation)]
        for i in (1, 0):
            scale, shift = block["halves"][i]
            kept, moved = x[:, :half], x[:, half:]
            x = jnp.concatenate([kept, (moved - mlp(shift, kept)) * jnp.exp(-jnp.tanh(mlp(scale, kept)))], 1)
            if i:
                x = jnp.concatenate([x[:, -half:], x[:, :-half]], 1)
        x = x / block["scale"] - block["loc"]
    return x


def prepare(case: dict[str, Any]) -> tuple[int, Callable[[], Any]]:
    blocks, permutations = start(case)
    x = jax.random.normal(jax.random.key(1), (case["batch"], case["dim"]))
    size = sum(leaf.size for leaf in jax.tree.leaves(blocks))
    if case["kind"] == "forward":
        mapped = jax.jit(forward)
        return size, lambda: mapped(blocks, permutations, x)
    if case["kind"] == "inverse":
        unmapped = jax.jit(inverse)
        return size, lambda: unmapped(blocks, permutations, x)

    def loss(blocks: list[Tree]) -> jax.Array:
        z, logdet = forward(blocks, permutations, x)
        return 0.5 * (z**2).sum() - logdet.sum()

    if case["kind"] == "gradient":
        gradient = jax.jit(jax.grad(loss))
        return size, lambda: gradient(blocks)
    optimizer = optax.adam(1e-5, b1=0.5, b2=0.9)
    state = {"blocks": blocks, "optimizer": optimizer.init(blocks)}

    @jax.jit
    def step(blocks: list[Tree], state: Any) -> tuple[list[Tree], Any]:
        updates, state = optimizer.update(jax.grad(loss)(blocks), state)
        return optax.apply_updates(blocks, updates), state

    def train() -> Any:
        state["blocks"], state["optimizer"] = step(state["blocks"], state["optimizer"])
        return state["blocks"]

    return size, train


if __name__ == "__main__":
    serve(prepare, "optax")
