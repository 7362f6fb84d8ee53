"""How a pretrained model comes in: anything with ``encode(x) -> z [batch, dim]``, and, for pictures, ``decode(z) -> x``.

    class MyModel:
        def encode(self, x):
            return model.encoder(x).flatten(1)
        def decode(self, z):
            return model.decoder(z)

Those five lines are an adapter. :func:`from_layer` makes one of a layer of any network, :func:`from_huggingface` of a
Hugging Face encoder; :func:`pool_features` and :func:`unpool_features` lead from a spatial feature map to latents and back.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..checks import check_device, check_dtype, check_floating, check_shape

__all__ = [
    "Adapter",
    "HuggingFaceAdapter",
    "LayerAdapter",
    "from_huggingface",
    "from_layer",
    "pool_features",
    "unpool_features",
]

POOLS = ("mean", "max", "first", "flatten", "positions")
TOKEN_POOLS = ("mean", "max", "first", "last")


@runtime_checkable
class Adapter(Protocol):
    """What this package asks of a pretrained model. ``decode(z) -> x`` beside it is optional."""

    def encode(self, x: Any) -> Tensor:
        """Latents ``[batch, dim]`` of inputs."""


def pool_features(features: Tensor, pool: str = "mean", channels: str | None = None) -> Tensor:
    """Latents ``[batch, dim]`` of a feature map.

    Args:
        features: ``[batch, channels, *positions]`` (convolutions) or ``[batch, *positions, channels]`` (transformers); or
            ``[batch, dim]``, which stays as it is.
        pool: ``"mean"`` or ``"max"`` over the positions; ``"first"``: the first position (a class token);
            ``"flatten"``: all features of a sample side by side; ``"positions"``: each position is a latent of its own,
            ``[batch * positions, channels]``, those of one sample in a row (``labels.repeat_interleave(positions)``).
        channels: ``"first"`` or ``"last"``; by default last for three axes (tokens), else first.

    Raises:
        TypeError, ValueError: no floating tensor of two axes at least, an unknown ``pool`` or ``channels``.

    Example:
        >>> features = torch.randn(4, 16, 7, 7)
        >>> pool_features(features).shape, pool_features(features, "positions").shape
        (torch.Size([4, 16]), torch.Size([196, 16]))
    """
    tokens = _tokens("pool_features", features, pool, channels)
    if features.dim() == 2:
        return features
    if pool == "mean":
        return tokens.mean(1)
    if pool == "max":
        return tokens.amax(1)
    if pool == "first":
        return tokens[:, 0]
    if pool == "flatten":
        return features.flatten(1)
    return tokens.flatten(0, 1)


def unpool_features(z: Tensor, features: Tensor, pool: str = "mean", channels: str | None = None) -> Tensor:
    """The feature map that has the latents ``z``, and is otherwise like ``features``: the way back for an edited z.

    ``pool_features`` of the result is ``z``. With ``"flatten"`` and ``"positions"`` z says everything; with ``"mean"``
    every position is shifted by the change of the mean, with ``"first"`` that position alone is new. From a maximum there
    is no way back.

    Args:
        z: latents, as :func:`pool_features` gives them for such features.
        features: the feature map that is edited, of the sample(s) that ``z`` came from.
        pool, channels: as for :func:`pool_features`.

    Raises:
        TypeError, ValueError: ``z`` that doesn't fit ``features``, ``pool="max"``; as :func:`pool_features`.

    Example:
        >>> features = torch.randn(4, 16, 7, 7)
        >>> z = pool_features(features) + 1
        >>> bool(torch.allclose(unpool_features(z, features), features + 1, atol=1e-5))
        True
    """
    where = "unpool_features"
    tokens = _tokens(where, features, pool, channels)
    if pool == "max":
        raise ValueError(f"{where}: pool is 'max', expected one of 'mean', 'first', 'flatten', 'positions'")
    check_floating(where, "z", z)
    check_shape(where, "z", z, pool_features(features, pool, channels).shape, f"(the {pool} of features)")
    check_dtype(where, "z", z, features.dtype, "like features")
    check_device(where, "z", z, features, "features")
    if features.dim() == 2 or pool == "flatten":
        return z.reshape(features.shape)
    if pool == "mean":
        tokens = tokens + (z - tokens.mean(1))[:, None]
    elif pool == "first":
        tokens = torch.cat([z[:, None], tokens[:, 1:]], 1)
    else:
        tokens = z.reshape(tokens.shape)
    if _last(features, channels):
        return tokens.reshape(features.shape)
    return tokens.transpose(1, 2).reshape(features.shape)


class LayerAdapter:
    """A layer of a network as an encoder; made by :func:`from_layer`."""

    def __init__(
        self,
        module: nn.Module,
        layer: str,
        *,
        pool: str = "mean",
        channels: str | None = None,
        decode: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"from_layer: module is a {type(module).__name__}, expected a torch.nn.Module")
        names = [name for name, _ in module.named_modules()]
        if layer not in names:
            near = [name for name in names if name and str(layer).split(".")[-1] in name] or names[1:]
            raise ValueError(f"from_layer: layer is {layer!r}, expected one of {', '.join(near[:12])}")
        _check_pool("from_layer", pool, channels)
        self.module, self.layer, self.pool, self.channels = module, layer, pool, channels
        if decode is not None:
            self.decode = decode

    def __repr__(self) -> str:
        return f"LayerAdapter({type(self.module).__name__}, layer={self.layer!r}, pool={self.pool!r})"

    @torch.no_grad()
    def features(self, x: Any) -> Tensor:
        """What the layer puts out for ``x``, before pooling."""
        return self._run(x, torch.clone, None)[0]

    @torch.no_grad()
    def encode(self, x: Any) -> Tensor:
        """Latents ``[batch, dim]`` of ``x``: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
        return self._run(x, lambda features: pool_features(features, self.pool, self.channels).clone(), None)[0]

    @torch.no_grad()
    def resume(self, x: Any, z: Tensor) -> Any:
        """What the whole network puts out for ``x`` when the layer says ``z`` instead.

        Args:
            x: the input, as for :meth:`encode`; what the layer does not see of it goes on as it is.
            z: edited latents, in place of ``encode(x)``; see :func:`unpool_features`.
        """
        return self._run(x, lambda features: features, z)[1]

    def _run(self, x: Any, take: Callable[[Tensor], Tensor], z: Tensor | None) -> tuple[Tensor, Any]:
        """What ``take`` makes of the layer's output, and the network's own.

        A later layer may overwrite the layer's output, so ``take`` copies what it keeps, and z is copied too.
        """
        found: list[Tensor] = []

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            features = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(features, Tensor):
                kind = type(output).__name__
                raise TypeError(
                    f"from_layer: layer {self.layer!r} gives a {kind}, expected a tensor or a tuple that starts with one"
                )
            found.append(take(features))
            if z is None:
                return None
            edited = unpool_features(z.clone() if isinstance(z, Tensor) else z, features, self.pool, self.channels)
            return type(output)([edited, *output[1:]]) if isinstance(output, tuple | list) else edited

        handle = self.module.get_submodule(self.layer).register_forward_hook(hook)
        try:
            with _in_evaluation(self.module):
                if isinstance(x, Mapping):
                    result = self.module(**x)
                else:
                    result = self.module(*x) if isinstance(x, tuple) else self.module(x)
        finally:
            handle.remove()
        if len(found) != 1:
            raise ValueError(f"from_layer: layer {self.layer!r} ran {len(found)} times for one input, expected once")
        return found[0], result


def from_layer(
    module: nn.Module,
    layer: str,
    *,
    pool: str = "mean",
    channels: str | None = None,
    decode: Callable[[Tensor], Any] | None = None,
) -> LayerAdapter:
    """Creates an adapter of a layer of any network, through a forward hook; the network itself stays as it is.

    Latents carry no gradients, and are the layer's own values even where a later layer overwrites them in place.

    Args:
        module: the network. It runs in evaluation mode, and after each call its modules are in the modes they had before.
        layer: name of the layer, as in ``module.named_modules()``; ``""`` for the network's own output.
        pool, channels: what becomes of a feature map; see :func:`pool_features`.
        decode: gives x for z, where the network has a part that does.

    Returns:
        an adapter with ``encode(x)``; ``features(x)``, before pooling; ``resume(x, z)``, the network's output when the
        layer says z: what a classifier makes of an edited latent; and ``decode`` if it is given.

    Raises:
        TypeError, ValueError: no such layer, unknown ``pool``; when called, a layer that doesn't run exactly once or whose
            output is no tensor (nor a tuple or list that starts with one).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))
        >>> model = from_layer(net, "1", pool="mean")
        >>> images = torch.rand(5, 3, 32, 32)
        >>> z = model.encode(images)
        >>> z.shape, model.resume(images, z + 0.1).shape
        (torch.Size([5, 8]), torch.Size([5, 10]))
    """
    return LayerAdapter(module, layer, pool=pool, channels=channels, decode=decode)


class HuggingFaceAdapter:
    """A Hugging Face encoder; made by :func:`from_huggingface`."""

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, pool: str = "mean", layer: int | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"from_huggingface: model is a {type(model).__name__}, expected a torch.nn.Module")
        if tokenizer is not None and not callable(tokenizer):
            raise TypeError(
                f"from_huggingface: tokenizer is a {type(tokenizer).__name__}, expected a tokenizer or None"
            )
        if pool not in TOKEN_POOLS:
            raise ValueError(f"from_huggingface: pool is {pool!r}, expected one of {', '.join(map(repr, TOKEN_POOLS))}")
        if layer is not None:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"from_huggingface: layer is {layer!r}, expected an integer or None")
        self.model, self.tokenizer, self.pool, self.layer = model, tokenizer, pool, layer

    def __repr__(self) -> str:
        return f"HuggingFaceAdapter({type(self.model).__name__}, pool={self.pool!r})"

    @torch.no_grad()
    def encode(self, x: Any) -> Tensor:
        """Latents ``[batch, dim]`` of texts; without a tokenizer of the model's own inputs, a mapping or pixel values."""
        if self.tokenizer is not None:
            texts = [x] if isinstance(x, str) else list(x)
            if not texts or not all(isinstance(text, str) for text in texts):
                raise TypeError("from_huggingface: x is expected to be one or more strings")
            x = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        elif isinstance(x, Tensor):
            x = {"pixel_values": x}
        if not isinstance(x, Mapping):
            raise TypeError(
                f"from_huggingface: x is a {type(x).__name__}, expected a mapping of the model's inputs or pixel values; "
                f"texts need a tokenizer"
            )
        device = next(self.model.parameters()).device
        inputs = {name: value.to(device) for name, value in x.items()}
        more = {} if self.layer is None else {"output_hidden_states": True}
        with _in_evaluation(self.model):
            output = self.model(**inputs, **more)
        if self.layer is None:
            states = output.last_hidden_state
        else:
            all_states = output.hidden_states
            if not -len(all_states) <= self.layer < len(all_states):
                raise ValueError(
                    f"from_huggingface: layer is {self.layer}, expected {-len(all_states)} to {len(all_states) - 1}"
                )
            states = all_states[self.layer]
        if states.dim() != 3:  # the feature map of a convolutional network
            return pool_features(states, self.pool)
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape != states.shape[:2]:
            mask = torch.ones(states.shape[:2], device=states.device)
        return _pool_tokens(states, mask.bool(), self.pool)


def from_huggingface(
    model: nn.Module, tokenizer: Any = None, *, pool: str = "mean", layer: int | None = None
) -> HuggingFaceAdapter:
    """Creates an adapter of a Hugging Face encoder, for texts or pictures. Padding is left out of every pool.

    Args:
        model: what ``AutoModel.from_pretrained`` gives, or any module whose output has ``last_hidden_state``
            ``[batch, tokens, dim]``. It runs in evaluation mode, and has its own modes back after each call.
        tokenizer: what ``AutoTokenizer.from_pretrained`` gives; None for a model of pictures, whose ``encode`` takes pixel
            values or a mapping of inputs.
        pool: ``"mean"`` or ``"max"`` over the tokens, ``"first"`` (the class token) or ``"last"`` (for models that read
            from left to right).
        layer: take ``hidden_states[layer]``, counted from the embeddings (0) on; by default the model's own output.

    Raises:
        TypeError, ValueError: no module, an unknown ``pool``; when called, inputs of another kind, a layer that is not there.

    Example:
        >>> adapter = from_huggingface(model, tokenizer)  # doctest: +SKIP
        >>> adapter.encode(["The film was good.", "The film was bad."]).shape  # doctest: +SKIP
        torch.Size([2, 384])
    """
    return HuggingFaceAdapter(model, tokenizer, pool=pool, layer=layer)


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    """All modules of ``module`` in evaluation mode, then in their own again, which may differ from module to module.

    Only the flags change: a class may have an ``eval`` of its own that changes more.
    """
    changed = [part for part in module.modules() if part.training]
    try:
        for part in changed:
            part.training = False
        yield
    finally:
        for part in changed:
            part.training = True


def _check_pool(where: str, pool: str, channels: str | None) -> None:
    if pool not in POOLS:
        raise ValueError(f"{where}: pool is {pool!r}, expected one of {', '.join(map(repr, POOLS))}")
    if channels not in (None, "first", "last"):
        raise ValueError(f"{where}: channels is {channels!r}, expected 'first', 'last' or None")


def _last(features: Tensor, channels: str | None) -> bool:
    return channels == "last" if channels else features.dim() == 3


def _tokens(where: str, features: Tensor, pool: str, channels: str | None) -> Tensor:
    """A feature map as ``[batch, positions, channels]``."""
    _check_pool(where, pool, channels)
    check_floating(where, "features", features)
    if features.dim() < 2 or 0 in features.shape[1:]:
        raise ValueError(
            f"{where}: features has shape {list(features.shape)}, expected [batch, dim] or [batch, channels, *positions]"
        )
    if features.dim() == 2:
        return features[:, None]
    return features.flatten(1, -2) if _last(features, channels) else features.flatten(2).transpose(1, 2)


def _pool_tokens(states: Tensor, mask: Tensor, pool: str) -> Tensor:
    """``[batch, tokens, dim]`` over the tokens that are no padding, ``mask [batch, tokens]``."""
    if pool == "mean":
        weight = mask[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp_min(1)
    if pool == "max":
        return states.masked_fill(~mask[..., None], -torch.inf).amax(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    place = place.where(mask, mask.shape[1] if pool == "first" else -1)
    chosen = place.amin(1) if pool == "first" else place.amax(1)
    return states[torch.arange(len(states), device=states.device), chosen.clamp(0, mask.shape[1] - 1)]
