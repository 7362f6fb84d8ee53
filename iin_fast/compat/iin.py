"""The published Invertible Interpretation Network, name for name, on fast flows.

Replace ``from iin.models.iin import …`` and ``from iin.losses.iin import …`` by ``from iin_fast.compat.iin import …``.
Constructors, calls, return values and state_dicts are the published ones; a checkpoint of either side loads in the
other with ``strict=True``. Where the published code crashes, this one works: batches of one, odd numbers of channels,
factors held as torch tensors on any device. A data-dependent start is as published (first ``forward``, in training and
in evaluation), without reading the device at every call.

The stack [VectorActNorm, DoubleVectorCouplingBlock, Shuffle] runs as one op on stacked parameters. Its published
parameter names exist in ``state_dict`` and ``load_state_dict`` only; ``parameters()`` gives the stacked tensors, and
``iin_fast.testing.published_grads`` their gradients under the published names.

References:
    Esser, Rombach, Ommer 2020: A Disentangling Invertible Interpretation Network for Explaining Latent Representations
    (CVPR, arXiv 2004.13166).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import checked_int, checked_ints, checked_number
from ..functional import pair_nll
from .blocks import Flow, FullyConnected, PublishedNorm, Shuffle, double_coupling, flat
from .state_dict_names import Names, PublishedFlow

__all__ = [
    "BasicFullyConnectedNet",
    "DoubleVectorCouplingBlock",
    "EfficientVRNVP",
    "FactorLoss",
    "FactorTransformer",
    "Flow",
    "Loss",
    "Shuffle",
    "VectorActNorm",
    "VectorTransformer",
    "nll",
]

NAMES = Names(norm="flow.0", coupling="flow.1", shuffle="flow.2")
REQUIRED: Any = object()


def retrieve(config: Mapping[str, Any], key: str, default: Any = REQUIRED) -> Any:
    """Look up ``"Transformer/in_channel"`` in a nested or a flat config.

    Raises:
        KeyError: the key is missing and has no default.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}, expected a mapping that holds {key!r}")
    if key in config:
        return config[key]
    value: Any = config
    for part in key.split("/"):
        if not isinstance(value, Mapping) or part not in value:
            if default is REQUIRED:
                nested = "".join(f"[{part!r}]" for part in key.split("/"))
                raise KeyError(f"config lacks {key!r}; set config{nested} or config[{key!r}]")
            return default
        value = value[part]
    return value


class BasicFullyConnectedNet(FullyConnected):
    """An MLP with LeakyReLU (slope 0.01): ``depth + 2`` linear layers.

    Args:
        dim: input features.
        depth: number of hidden-to-hidden layers.
        hidden_dim: hidden width.
        use_tanh: end with tanh.
        use_bn: batch normalisation after every linear layer but the last.
        out_dim: output features; ``dim`` when left out.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        hidden_dim: int = 256,
        use_tanh: bool = False,
        use_bn: bool = False,
        out_dim: int | None = None,
    ) -> None:
        norms = [nn.BatchNorm1d] * (depth + 1) if use_bn else []
        super().__init__(dim, depth, hidden_dim, dim if out_dim is None else out_dim, use_tanh, norms)


class DoubleVectorCouplingBlock(nn.Module):
    """``n_blocks`` affine couplings, the halves swapped before every second one.

    x2 = x2 * exp(s) + t, s = tanh(S(x1)), t = T(x1); log|det| = sum s.

    With an odd number of channels, the smaller part is transformed. With an odd ``n_blocks`` the published reverse is
    not the inverse of its forward; this one is.

    Args:
        in_channels: number of channels.
        hidden_dim, depth: of the nets.
        use_hidden_bn: has no effect, as published.
        n_blocks: number of couplings.
    """

    def __init__(
        self, in_channels: int, hidden_dim: int, depth: int = 2, use_hidden_bn: bool = False, n_blocks: int = 2
    ) -> None:
        super().__init__()
        where = type(self).__name__
        self.in_channels = in_channels = checked_int(where, "in_channels", in_channels)
        n_blocks = checked_int(where, "n_blocks", n_blocks)
        kept = in_channels - in_channels // 2

        def nets(use_tanh: bool) -> nn.ModuleList:
            return nn.ModuleList(
                BasicFullyConnectedNet(kept, depth, hidden_dim, use_tanh=use_tanh, out_dim=in_channels - kept)
                for _ in range(n_blocks)
            )

        self.s = nets(use_tanh=True)
        self.t = nets(use_tanh=False)

    def forward(self, x: Tensor, reverse: bool = False) -> Any:
        """Map ``x [batch, in_channels]`` to (y, log-det ``[batch]``); ``reverse=True`` gives x alone."""
        y, logdet = double_coupling(flat(type(self).__name__, x, self.in_channels), self.s, self.t, None, reverse)
        return y if reverse else (y, logdet)


class VectorActNorm(PublishedNorm):
    """ActNorm over channels: y = scale * (x + loc), log|det| = height * width * sum log|scale|.

    The first ``forward`` starts it from its input: mean 0, unbiased std 1 (+1e-6); one value per channel has no spread,
    so there scale = 1 (the published code crashes). Height and width of size 1 are dropped from the output.

    Args:
        in_channel: number of channels.
        logdet: return the log-det beside the output.
    """

    def __init__(self, in_channel: int, logdet: bool = True, **kwargs: Any) -> None:
        super().__init__(in_channel)
        self.logdet = logdet

    def forward(self, input: Tensor, reverse: bool = False, conditioning: Any = None) -> Any:
        """Map ``[batch, channels(, height, width)]``; gives y, or (y, log-det ``[batch]``)."""
        if reverse:
            return self.reverse(input)
        input = self._four(input)
        if self._awaits_start():
            self.initialize(input)
        output = (self.scale * (input + self.loc)).squeeze(3).squeeze(2)
        return (output, self._logdet(input)) if self.logdet else output

    def reverse(self, output: Tensor, conditioning: Any = None) -> Tensor:
        """Map back; gives x alone."""
        return (self._four(output) / self.scale - self.loc).squeeze(3).squeeze(2)


class EfficientVRNVP(nn.Module):
    """``n_flow`` times the modules of ``module_list``.

    [VectorActNorm, DoubleVectorCouplingBlock, Shuffle] runs as one op on stacked parameters; any other list is composed
    of its modules.

    Args:
        module_list: classes, as for :class:`Flow`.
        in_channels: number of channels.
        n_flow: number of blocks.
        hidden_dim, hidden_depth: of the nets.
    """

    def __init__(
        self,
        module_list: Sequence[Callable[..., nn.Module]],
        in_channels: int,
        n_flow: int,
        hidden_dim: int,
        hidden_depth: int,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels = checked_int("EfficientVRNVP", "in_channels", in_channels)
        n_flow = checked_int("EfficientVRNVP", "n_flow", n_flow)
        hidden_dim = checked_int("EfficientVRNVP", "hidden_dim", hidden_dim)
        hidden_depth = checked_int("EfficientVRNVP", "hidden_depth", hidden_depth, least=0)
        self.flow: PublishedFlow | nn.ModuleList
        if list(module_list) == [VectorActNorm, DoubleVectorCouplingBlock, Shuffle]:
            self.flow = PublishedFlow(NAMES, in_channels, n_flow, hidden_dim, hidden_depth)
        else:
            self.flow = nn.ModuleList(Flow(module_list, in_channels, hidden_dim, hidden_depth) for _ in range(n_flow))

    def forward(self, x: Tensor, condition: Any = None, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map ``x [batch, in_channels]`` to (y, log-det ``[batch]``); ``reverse=True`` gives (x, None)."""
        if isinstance(self.flow, PublishedFlow):
            x = flat(type(self).__name__, x, self.in_channels)
            return (self.flow.inverse(x)[0], None) if reverse else self.flow(x)
        if reverse:
            for block in reversed(self.flow):
                x = block(x, condition=condition, reverse=True)
            return x, None
        logdet: Any = 0
        for block in self.flow:
            x, logdet_i = block(x, condition=condition)
            logdet = logdet + logdet_i
        return x, logdet

    def reverse(self, x: Tensor, condition: Any = None) -> tuple[Tensor, None]:
        """``forward(x, reverse=True)``; the published one crashes."""
        return self(x, condition=condition, reverse=True)  # type: ignore[no-any-return]


class VectorTransformer(nn.Module):
    """The flow T of an IIN, from a config.

    Args:
        config: nested (``{"Transformer": {"in_channel": 64, …}}``) or flat (``{"Transformer/in_channel": 64, …}``),
            with ``in_channel``, ``n_flow``, ``hidden_depth`` and ``hidden_dim``.

    Raises:
        KeyError: the config lacks one of these.
        TypeError, ValueError: one is no integer, or too small.

    Example:
        >>> config = {"Transformer": {"in_channel": 6, "n_flow": 2, "hidden_depth": 1, "hidden_dim": 16}}
        >>> model = VectorTransformer(config)
        >>> z, logdet = model(torch.randn(5, 6, 1, 1))
        >>> z.shape, logdet.shape, model.reverse(z).shape
        (torch.Size([5, 6, 1, 1]), torch.Size([5]), torch.Size([5, 6, 1, 1]))
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.in_channel = self._size("in_channel", least=2)
        self.n_flow = self._size("n_flow")
        self.depth_submodules = self._size("hidden_depth", least=0)
        self.hidden_dim = self._size("hidden_dim")
        modules = [VectorActNorm, DoubleVectorCouplingBlock, Shuffle]
        self.realnvp = EfficientVRNVP(modules, self.in_channel, self.n_flow, self.hidden_dim, self.depth_submodules)

    def _size(self, name: str, least: int = 1) -> int:
        key = f"Transformer/{name}"
        return checked_int(type(self).__name__, key, retrieve(self.config, key), least)

    def forward(self, input: Tensor, reverse: bool = False) -> Any:
        """Map ``[batch, in_channel(, 1, 1)]`` to (z ``[batch, in_channel, 1, 1]``, log-det ``[batch]``)."""
        if reverse:
            return self.reverse(input)
        out, logdet = self.realnvp(flat(type(self).__name__, input, self.in_channel))
        return out[:, :, None, None], logdet

    def reverse(self, out: Any) -> Tensor:
        """Map z ``[batch, in_channel(, 1, 1)]`` back to ``[batch, in_channel, 1, 1]``."""
        x: Tensor = self.realnvp(flat(type(self).__name__, out, self.in_channel), reverse=True)[0]
        return x[:, :, None, None]


class FactorTransformer(VectorTransformer):
    """A VectorTransformer whose output is split into factors.

    Args:
        config: as for :class:`VectorTransformer`, and either ``Transformer/factor_config``, the sizes of all factors
            in order, or ``Transformer/n_factors`` (default 2) for equal parts.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        where, key = type(self).__name__, "Transformer/factor_config"
        n_factors = retrieve(config, "Transformer/n_factors", default=2)
        self.n_factors = checked_int(where, "Transformer/n_factors", n_factors)
        self.factor_config = checked_ints(where, key, retrieve(config, key, default=[]))
        if self.factor_config and sum(self.factor_config) != self.in_channel:
            raise ValueError(
                f"FactorTransformer: Transformer/factor_config {list(self.factor_config)} sums to "
                f"{sum(self.factor_config)}, expected Transformer/in_channel = {self.in_channel}"
            )

    def forward(self, input: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:  # type: ignore[override]
        """Map to (factors, each ``[batch, size, 1, 1]``; log-det ``[batch]``)."""
        out, logdet = super().forward(input)
        if self.factor_config:
            return torch.split(out, list(self.factor_config), dim=1), logdet
        return torch.chunk(out, self.n_factors, dim=1), logdet

    def reverse(self, out: Sequence[Tensor]) -> Tensor:
        """Map a sequence of factors back to ``[batch, in_channel, 1, 1]``."""
        return super().reverse(torch.cat(_factors(type(self).__name__, "out", out), dim=1))


def nll(sample: Tensor) -> Tensor:
    """0.5 * ||sample||² for each of ``[batch, channels, height, width]``: ``[batch]``, in nats up to a constant."""
    return 0.5 * sample.pow(2).sum(dim=[1, 2, 3])


def _no_train_op() -> None:
    """The published losses return an operation to run in training; it does nothing."""


def _factors(where: str, name: str, factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors as a list; one tensor would be taken apart along its batch."""
    parts = list(factors) if isinstance(factors, Iterable) and not isinstance(factors, Tensor) else []
    if not parts:
        kind = type(factors).__name__
        raise TypeError(f"{where}: {name} is a {kind}, expected a sequence of one or more factors [batch, size, 1, 1]")
    return parts


def _check_logdet(where: str, logdet: Tensor, batch: int) -> None:
    if logdet.dim() != 1:
        raise ValueError(f"{where}: logdet has shape {list(logdet.shape)}, expected [batch]")
    if len(logdet) != batch:
        raise ValueError(f"{where}: logdet has shape {list(logdet.shape)}, expected [{batch}] like the sample's batch")


class Loss(nn.Module):
    """Negative log-likelihood under a standard normal, without its constant: mean of 0.5 ||z||² - logdet.

    References:
        Esser et al. 2020, Sec. 3.1.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, sample: Tensor, logdet: Tensor, global_step: Any
    ) -> tuple[Tensor, dict[str, Any], Callable[[], None]]:
        """From z ``[batch, channels, 1, 1]`` and log-det ``[batch]`` to (loss, log, train_op).

        ``log["scalars"]`` has loss, reference_nll_loss (of noise, drawn from torch's global generator), nlogdet_loss
        and nll_loss.
        """
        _check_logdet("Loss", logdet, sample.shape[0])
        nll_loss = nll(sample).mean()
        nlogdet_loss = -logdet.mean()
        loss = nll_loss + nlogdet_loss
        scalars = {
            "loss": loss,
            "reference_nll_loss": nll(torch.randn_like(sample)).mean(),
            "nlogdet_loss": nlogdet_loss,
            "nll_loss": nll_loss,
        }
        return loss, {"images": {}, "scalars": scalars}, _no_train_op


class FactorLoss(nn.Module):
    """The factor loss over pairs, of which each shares some factors.

    Mean over pairs of  0.5 ||a||² - logdet_a + sum_k 0.5 ||b_k - m_k rho a_k||² / (1 - m_k rho²) - logdet_b,
    with m_k = 1 where factor k is shared.

    A factor code f >= 0 says that factor f is shared; f < 0 that all are shared but factor -f.

    References:
        Esser et al. 2020, Sec. 3.2.

    Args:
        config: may hold ``Loss/rho``, the correlation of a shared factor, in (0, 1); 0.975 when left out.

    Raises:
        ValueError: rho outside (0, 1).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        rho = retrieve(config, "Loss/rho", default=0.975)
        self.rho = checked_number("FactorLoss", "Loss/rho", rho, above=0, below=1)

    def forward(
        self,
        samples: Mapping[str, Sequence[Tensor]],
        logdets: Mapping[str, Tensor],
        factors: Tensor | np.ndarray[Any, Any],
        global_step: Any,
    ) -> tuple[Tensor, dict[str, Any], Callable[[], None]]:
        """The loss of a batch of pairs.

        Args:
            samples: "example1" and "example2", each the factors ``[batch, size, 1, 1]`` of a FactorTransformer.
            logdets: "example1" and "example2", ``[batch]`` each.
            factors: ``[batch]`` integer codes, as numpy array or torch tensor on any device.
            global_step: ignored.

        Returns:
            (loss, log, train_op); ``log["scalars"]`` has loss, loss1 (of example1) and loss2 (of
            example2 given example1).
        """
        a, b = (_factors("FactorLoss", f"samples[{name!r}]", samples[name]) for name in ("example1", "example2"))
        logdet_a, logdet_b = logdets["example1"], logdets["example2"]
        shapes_a, shapes_b = [list(factor.shape) for factor in a], [list(factor.shape) for factor in b]
        if shapes_a != shapes_b:
            raise ValueError(
                f"FactorLoss: samples['example2'] has shapes {shapes_b}, expected {shapes_a} like 'example1'"
            )
        za, zb = torch.cat(a, dim=1).flatten(1), torch.cat(b, dim=1).flatten(1)
        _check_logdet("FactorLoss", logdet_a, za.shape[0])
        _check_logdet("FactorLoss", logdet_b, za.shape[0])
        sizes = [factor.shape[1:].numel() for factor in b]
        codes = torch.as_tensor(factors, device=zb.device)
        if codes.is_floating_point() or codes.is_complex():
            raise TypeError(f"FactorLoss: factors is {codes.dtype}, expected integers")
        if codes.shape != za.shape[:1]:
            raise ValueError(
                f"FactorLoss: factors has shape {list(codes.shape)}, expected [{za.shape[0]}], one for each pair"
            )
        codes = codes.to(torch.int64)[:, None]
        numbers = torch.arange(len(b), device=zb.device)
        shared = (codes == numbers) | ((codes < 0) & (codes != -numbers))
        loss = pair_nll(za, zb, logdet_a, logdet_b, shared, sizes, self.rho).mean()
        loss1 = 0.5 * za.pow(2).sum(1).mean() - logdet_a.mean()
        scalars = {"loss": loss, "loss1": loss1, "loss2": loss - loss1}
        return loss, {"images": {}, "scalars": scalars}, _no_train_op
