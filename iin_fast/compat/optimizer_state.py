"""Optimizer states between the published models and their stacked forms."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Flow
from ..nn.state_dict_layout import Entry, export_tensors, import_tensors

__all__ = ["convert_optimizer_state"]


@dataclass
class Part:
    """The parameters of one module: their numbers, and the published keys that they are cut into."""

    numbers: dict[str, int]  # name -> place in model.parameters()
    stored: Mapping[str, Tensor]
    entries: list[Entry]  # in the published order


def convert_optimizer_state(
    model: nn.Module, state: Mapping[str, Any], *, to_published: bool = False
) -> dict[str, Any]:
    """Makes the optimizer state of a published checkpoint one for the stacked parameters of ``model``, or back.

    An optimizer's ``state_dict`` knows parameters by their number in ``parameters()``. The published models have many
    small ones, the models of this package a few stacked ones. What an optimizer keeps for each element (Adam's moments,
    momentum) is stacked as the parameters are; what it keeps for each parameter (the number of steps) has to agree.

    Args:
        model: of ``iin_fast.compat``, or any module that holds such models.
        state: ``optimizer.state_dict()`` of an optimizer over all ``parameters()`` of the published model, in order; with
            ``to_published`` over those of ``model``.
        to_published: convert back.

    Returns:
        What ``load_state_dict`` of an optimizer of the same class takes, over all parameters of the other model.

    Raises:
        ValueError: a state of another model; parameters that lie stacked together but have different groups or steps, or
            of which some have no state.

    Example:
        >>> from iin_fast.compat import convert_optimizer_state
        >>> from iin_fast.compat.iin import VectorTransformer
        >>> sizes = {"in_channel": 6, "n_flow": 2, "hidden_depth": 1, "hidden_dim": 16}
        >>> model = VectorTransformer({"Transformer": sizes})
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(torch.randn(5, 6))[1].sum().backward()
        >>> optimizer.step()
        >>> published = convert_optimizer_state(model, optimizer.state_dict(), to_published=True)
        >>> len(optimizer.state_dict()["state"]), len(published["state"])
        (8, 52)
        >>> optimizer.load_state_dict(convert_optimizer_state(model, published))
    """
    parts = list(_parts(model))
    published = [(part, entry) for part in parts for entry in part.entries]
    # for each number here, the numbers there
    number_of = {(id(part), entry.key): i for i, (part, entry) in enumerate(published)}
    pieces: dict[int, list[int]] = {number: [] for part in parts for number in part.numbers.values()}
    for i, (part, entry) in enumerate(published):
        pieces[part.numbers[entry.name]].append(i)

    given = [number for group in state["param_groups"] for number in group["params"]]
    expected = len(pieces) if to_published else len(published)
    if sorted(given) != list(range(expected)):
        whose = "this model" if to_published else "the published model"
        raise ValueError(
            f"convert_optimizer_state: state is of {len(given)} parameters, expected all {expected} of {whose}, in order"
        )
    return {
        "state": _scattered(parts, state, number_of) if to_published else _stacked(parts, state, number_of, pieces),
        "param_groups": _groups(state["param_groups"], pieces, to_published),
    }


def _parts(model: nn.Module) -> Iterator[Part]:
    """The modules that own parameters, in the order of ``model.parameters()``."""
    numbers = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    for module in model.modules():
        stored = dict(module.named_parameters(recurse=False))
        if isinstance(module, Flow):
            entries = [entry for entry in module.entries() if entry.name in stored]
        else:
            entries = [Entry(name, name, (), tuple(tensor.shape)) for name, tensor in stored.items()]
        if stored:
            yield Part({name: numbers[id(tensor)] for name, tensor in stored.items()}, stored, entries)


def _groups(groups: list[dict[str, Any]], pieces: dict[int, list[int]], to_published: bool) -> list[dict[str, Any]]:
    result = []
    for group in groups:
        inside = set(group["params"])
        if to_published:
            params = sorted(i for number in inside for i in pieces[number])
        else:
            params = [number for number, members in pieces.items() if inside.issuperset(members)]
            split = [number for number, members in pieces.items() if 0 < len(inside & set(members)) < len(members)]
            if split:
                raise ValueError(
                    f"convert_optimizer_state: param_groups divide the parameters {pieces[split[0]]}, which are stacked "
                    f"into one here; expected them in one group"
                )
        result.append({**group, "params": params})
    return result


def _stacked(
    parts: list[Part], state: Mapping[str, Any], number_of: dict[tuple[int, str], int], pieces: dict[int, list[int]]
) -> dict[int, dict[str, Any]]:
    result: dict[int, dict[str, Any]] = {}
    for part in parts:
        for name, number in part.numbers.items():
            entries = [entry for entry in part.entries if entry.name == name]
            states = [state["state"].get(number_of[id(part), entry.key]) for entry in entries]
            if not any(states):
                continue
            if not all(states):
                lacking = [i for i in pieces[number] if not state["state"].get(i)]
                raise ValueError(
                    f"convert_optimizer_state: state has none for the parameters {lacking}, which are stacked with others "
                    f"that have one; expected all or none"
                )
            result[number] = {}
            for key, first in states[0].items():
                values = [one[key] for one in states]
                if not isinstance(first, Tensor) or first.dim() == 0:  # the number of steps
                    if any(value != first for value in values):
                        raise ValueError(
                            f"convert_optimizer_state: {key!r} differs among the parameters {pieces[number]}, which are "
                            f"stacked into one here"
                        )
                    result[number][key] = first.clone() if isinstance(first, Tensor) else first
                    continue
                errors: list[str] = []
                current = {name: torch.zeros_like(part.stored[name], device=first.device)}
                found = {entry.key: value for entry, value in zip(entries, values, strict=True)}
                made = import_tensors(entries, current, found, "", keep_dtype=True, missing=[], errors=errors)
                if errors:
                    raise ValueError(f"convert_optimizer_state: {key!r} is of another model: {errors[0]}")
                result[number][key] = made[name]
    return result


def _scattered(
    parts: list[Part], state: Mapping[str, Any], number_of: dict[tuple[int, str], int]
) -> dict[int, dict[str, Any]]:
    result: dict[int, dict[str, Any]] = {}
    for part in parts:
        for name, number in part.numbers.items():
            entries = [entry for entry in part.entries if entry.name == name]
            for key, value in (state["state"].get(number) or {}).items():
                whole = isinstance(value, Tensor) and value.dim() > 0
                if whole and value.shape != part.stored[name].shape:
                    raise ValueError(
                        f"convert_optimizer_state: {key!r} has shape {list(value.shape)}, expected "
                        f"{list(part.stored[name].shape)} like {name}"
                    )
                cut = export_tensors(entries, {name: value}) if whole else {}
                for entry in entries:
                    copied = value.clone() if isinstance(value, Tensor) and not whole else value
                    result.setdefault(number_of[id(part), entry.key], {})[key] = cut.get(entry.key, copied)
    return dict(sorted(result.items()))
