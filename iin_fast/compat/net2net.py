"""The published flat flows of net2net, name for name, on fast flows.

Replace ``from net2net.modules.flow.flatflow import …`` (or ``.blocks``, ``.loss``) by ``from iin_fast.compat.net2net
import …``; in a config, the ``target`` likewise. Constructors, calls, return values and state_dicts are the published
ones; a checkpoint of either side loads in the other with ``strict=True``. ActNorm starts from the first batch, in
training mode only, as published, without reading the device at every call.

The stacks run as one op on stacked parameters. Published parameter names exist in ``state_dict`` and
``load_state_dict`` only; ``iin_fast.testing.published_grads`` gives gradients under them.

Different from the published code, on purpose:

- Odd numbers of channels: the published reverse swaps the unequal halves at the wrong place and is not the inverse of
  its own forward. This one is. The conditional flow refuses them there and takes them here.
- ``conditioning_option="parallel"`` crashes there; here every block reads its own linear map of the embedding.
- InvLeakyRelu adds nothing to the log-det, as published, though it scales by its slope. ``exact_logdet=True`` counts
  it.
- ``last_outs`` and ``last_logdets`` are not kept: no block's output leaves the op.
- The condition is converted to the type of the embedder, not always to float32, so that double models work.

References:
    Rombach, Esser, Ommer 2020: Network-to-Network Translation with Conditional Invertible Neural Networks (NeurIPS,
    arXiv 2005.13580), Sec. 3 and App. G.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import checked_choice, checked_int, checked_number
from .blocks import Flow, FullyConnected, PublishedNorm, Shuffle, double_coupling, flat
from .state_dict_names import Names, PublishedFlow

__all__ = [
    "NLL",
    "ActNorm",
    "BasicFullyConnectedNet",
    "ConditionalDoubleVectorCouplingBlock",
    "ConditionalFlatCouplingFlow",
    "ConditionalFlatDoubleCouplingFlowBlock",
    "ConditionalFlow",
    "DoubleVectorCouplingBlock",
    "Flow",
    "IgnoreLeakyRelu",
    "InvLeakyRelu",
    "InvParametricRelu",
    "NormalizingFlow",
    "PureAffineDoubleCouplingFlowBlock",
    "PureAffineFlatCouplingFlow",
    "Shuffle",
    "UnconditionalFlatCouplingFlow",
    "UnconditionalFlatDoubleCouplingFlowBlock",
    "nll",
]

NAMES = Names(norm="norm_layer", coupling="coupling", shuffle="shuffle")
SLOPES = {"lrelu": 0.9, "none": 1.0}  # of the invertible activation
CONDITIONING = ("none", "parallel", "sequential")
REVERSE_START = (
    "{}: reverse was called in training mode before the first forward, so ActNorm has no start yet; call forward on a "
    "batch, load a checkpoint, or call eval() first"
)


class NormalizingFlow(nn.Module):
    """The published base class: ``forward`` gives (transformed, log-det), ``reverse`` and ``sample`` a sample."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def reverse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class ActNorm(PublishedNorm):
    """ActNorm over channels: y = scale * (x + loc), log|det| = height * width * sum log|scale|.

    Starts from the first input in training mode; see :class:`iin_fast.nn.ActNorm`. Unlike IIN's, it keeps the shape of
    its input.

    Args:
        num_features: number of channels.
        logdet: return the log-det beside the output.
        affine: only True exists.
        allow_reverse_init: let a reverse call in training mode be the start.

    Raises:
        ValueError: ``affine=False``.
        RuntimeError: (at reverse) not started, in training mode, without ``allow_reverse_init``.
    """

    def __init__(
        self, num_features: int, logdet: bool = False, affine: bool = True, allow_reverse_init: bool = False
    ) -> None:
        if not affine:
            raise ValueError("ActNorm: affine is False, expected True; no other ActNorm exists")
        super().__init__(num_features)
        self.logdet = logdet
        self.allow_reverse_init = allow_reverse_init

    def forward(self, input: Tensor, reverse: bool = False) -> Any:
        """Map ``[batch, channels(, height, width)]``; gives y, or (y, log-det ``[batch]``)."""
        if reverse:
            return self.reverse(input)
        four = self._four(input)
        if self.training and self._awaits_start():
            self.initialize(four)
        output = (self.scale * (four + self.loc)).view_as(input)
        return (output, self._logdet(four)) if self.logdet else output

    def reverse(self, output: Tensor) -> Tensor:
        """Map back; gives x alone."""
        four = self._four(output)
        if self.training and self._awaits_start():
            if not self.allow_reverse_init:
                raise RuntimeError(REVERSE_START.format("ActNorm") + ", or set allow_reverse_init=True")
            self.initialize(four)
        return (four / self.scale - self.loc).view_as(output)


class BasicFullyConnectedNet(FullyConnected):
    """An MLP with LeakyReLU (slope 0.01): ``depth + 2`` linear layers.

    Args:
        dim: input features.
        depth: number of hidden-to-hidden layers.
        hidden_dim: hidden width.
        use_tanh: end with tanh.
        use_bn: batch normalisation after every linear layer but the last.
        out_dim: output features; ``dim`` when left out.
        use_an: ActNorm after the first linear layer.

    Raises:
        ValueError: both ``use_bn`` and ``use_an``.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        hidden_dim: int = 256,
        use_tanh: bool = False,
        use_bn: bool = False,
        out_dim: int | None = None,
        use_an: bool = False,
    ) -> None:
        if use_bn and use_an:
            raise ValueError("BasicFullyConnectedNet: use_bn and use_an are both True, expected at most one")
        norms = [nn.BatchNorm1d] * (depth + 1) if use_bn else [ActNorm] if use_an else []
        super().__init__(dim, depth, hidden_dim, dim if out_dim is None else out_dim, use_tanh, norms)


class IgnoreLeakyRelu(nn.Module):
    """The identity, log-det 0. ``alpha`` has no effect."""

    def __init__(self, alpha: float = 0.9) -> None:
        super().__init__()

    def forward(self, input: Tensor, reverse: bool = False) -> Any:
        return input if reverse else (input, 0.0)

    def reverse(self, input: Tensor) -> Tensor:
        return input


class InvLeakyRelu(nn.Module):
    """y = x for x >= 0, else alpha * x.

    Args:
        alpha: the slope, more than 0.
        exact_logdet: give log|det| = (number of negative features) * log(alpha), ``[batch]``, where the published code
            gives 0.
    """

    alpha: Any

    def __init__(self, alpha: float = 0.9, *, exact_logdet: bool = False) -> None:
        super().__init__()
        self.alpha = checked_number(type(self).__name__, "alpha", alpha, above=0)
        self.exact_logdet = exact_logdet

    def forward(self, input: Tensor, reverse: bool = False) -> Any:
        if reverse:
            return self.reverse(input)
        logdet: Any = 0.0
        if self.exact_logdet:
            logdet = (input < 0).flatten(1).sum(1) * torch.as_tensor(self.alpha).to(input).log()
        return torch.where(input < 0, self.alpha * input, input), logdet

    def reverse(self, input: Tensor) -> Tensor:
        return torch.where(input < 0, input / self.alpha, input)


class InvParametricRelu(InvLeakyRelu):
    """InvLeakyRelu with a slope that is learned."""

    def __init__(self, alpha: float = 0.9, *, exact_logdet: bool = False) -> None:
        super().__init__(alpha, exact_logdet=exact_logdet)
        self.start = self.alpha
        del self.alpha
        self.alpha = nn.Parameter(torch.tensor(self.start))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the slope that the constructor was given."""
        self.alpha.fill_(self.start)


class ConditionalDoubleVectorCouplingBlock(nn.Module):
    """Two affine couplings, the halves swapped in between; every net also reads a condition.

    x2 = x2 * exp(s) + t, s = tanh(S(x1, condition)), t = T(x1, condition); log|det| = sum s.

    Args:
        in_channels, cond_channels: of the input and the condition.
        hidden_dim, depth: of the nets.
    """

    def __init__(self, in_channels: int, cond_channels: int, hidden_dim: int, depth: int = 2) -> None:
        super().__init__()
        where = type(self).__name__
        self.in_channels = in_channels = checked_int(where, "in_channels", in_channels)
        self.cond_channels = cond_channels = checked_int(where, "cond_channels", cond_channels, least=0)
        kept = in_channels - in_channels // 2

        def nets(use_tanh: bool) -> nn.ModuleList:
            return nn.ModuleList(
                BasicFullyConnectedNet(
                    kept + cond_channels, depth, hidden_dim, use_tanh=use_tanh, out_dim=in_channels - kept
                )
                for _ in range(2)
            )

        self.s = nets(use_tanh=True)
        self.t = nets(use_tanh=False)

    def forward(self, x: Tensor, xc: Tensor | None = None, reverse: bool = False) -> Any:
        """Map ``x [batch, in_channels(, 1, 1)]`` under ``xc [batch, cond_channels(, 1, 1)]``.

        Returns:
            (y ``[batch, in_channels, 1, 1]``, log-det ``[batch]``); with ``reverse=True`` x alone.
        """
        where = type(self).__name__
        context = None if xc is None else flat(where, xc, self.cond_channels)
        y, logdet = double_coupling(flat(where, x, self.in_channels), self.s, self.t, context, reverse)
        y = y[:, :, None, None]
        return y if reverse else (y, logdet)


class DoubleVectorCouplingBlock(ConditionalDoubleVectorCouplingBlock):
    """Two affine couplings, the halves swapped in between; odd numbers of channels too (see the module's docstring).

    Args:
        in_channels: number of channels.
        hidden_dim, hidden_depth: of the nets.
    """

    def __init__(self, in_channels: int, hidden_dim: int, hidden_depth: int = 2) -> None:
        super().__init__(in_channels, 0, hidden_dim, hidden_depth)

    def forward(self, x: Tensor, reverse: bool = False) -> Any:  # type: ignore[override]
        """Map ``x [batch, in_channels(, 1, 1)]`` to (y, log-det ``[batch]``); ``reverse=True`` gives x alone."""
        return super().forward(x, None, reverse)


class PureAffineDoubleCouplingFlowBlock(nn.Module):
    """A block of couplings alone."""

    def __init__(self, in_channels: int, hidden_dim: int, hidden_depth: int) -> None:
        super().__init__()
        self.coupling = DoubleVectorCouplingBlock(in_channels, hidden_dim, hidden_depth)

    def forward(self, x: Tensor, reverse: bool = False) -> Any:
        return self.coupling(x, reverse=reverse)

    def reverse(self, out: Tensor) -> Tensor:
        return self.forward(out, reverse=True)  # type: ignore[no-any-return]


class UnconditionalFlatDoubleCouplingFlowBlock(nn.Module):
    """A block of ActNorm, couplings and shuffle."""

    def __init__(self, in_channels: int, hidden_dim: int, hidden_depth: int) -> None:
        super().__init__()
        self.norm_layer = ActNorm(in_channels, logdet=True)
        self.coupling = DoubleVectorCouplingBlock(in_channels, hidden_dim, hidden_depth)
        self.shuffle = Shuffle(in_channels)

    def forward(self, x: Tensor, reverse: bool = False) -> Any:
        if reverse:
            return self.norm_layer(self.coupling(self.shuffle(x, reverse=True), reverse=True), reverse=True)
        h, logdet_norm = self.norm_layer(x)
        h, logdet = self.coupling(h)
        return self.shuffle(h)[0], logdet_norm + logdet

    def reverse(self, out: Tensor) -> Tensor:
        return self.forward(out, reverse=True)  # type: ignore[no-any-return]


class ConditionalFlatDoubleCouplingFlowBlock(nn.Module):
    """A block of ActNorm, activation, conditional couplings and shuffle.

    Args:
        in_channels, cond_channels: of the input and the condition.
        hidden_dim, hidden_depth: of the nets.
        activation: "lrelu" (InvLeakyRelu, slope 0.9) or "none".
        exact_logdet: count the activation in the log-det.
    """

    def __init__(
        self,
        in_channels: int,
        cond_channels: int,
        hidden_dim: int,
        hidden_depth: int,
        activation: str = "lrelu",
        *,
        exact_logdet: bool = False,
    ) -> None:
        super().__init__()
        _slope(type(self).__name__, activation)
        self.norm_layer = ActNorm(in_channels, logdet=True)
        self.coupling = ConditionalDoubleVectorCouplingBlock(in_channels, cond_channels, hidden_dim, hidden_depth)
        self.activation = InvLeakyRelu(exact_logdet=exact_logdet) if activation == "lrelu" else IgnoreLeakyRelu()
        self.shuffle = Shuffle(in_channels)

    def forward(self, x: Tensor, xcond: Tensor, reverse: bool = False) -> Any:
        if reverse:
            h = self.coupling(self.shuffle(x, reverse=True), xcond, reverse=True)
            return self.norm_layer(self.activation(h, reverse=True), reverse=True)
        h, logdet_norm = self.norm_layer(x)
        h, logdet_activation = self.activation(h)
        h, logdet = self.coupling(h, xcond)
        return self.shuffle(h)[0], logdet_norm + logdet_activation + logdet

    def reverse(self, out: Tensor, xcond: Tensor) -> Tensor:
        return self.forward(out, xcond, reverse=True)  # type: ignore[no-any-return]


class Net2NetFlow(PublishedFlow):
    """A stacked flow that starts ActNorm in training mode only."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            return super().forward(x, context)
        return self._transform(x, self._check("x", x, context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and self._awaits_start():
            raise RuntimeError(REVERSE_START.format("flow"))
        return super().inverse(z, context)


class UnconditionalFlatCouplingFlow(NormalizingFlow):
    """``n_flows`` blocks of ActNorm, double coupling and shuffle, as one op.

    ``last_outs`` and ``last_logdets`` are not kept: no block's output leaves the op.

    Args:
        in_channels: number of channels; odd ones work in both directions.
        n_flows: number of blocks.
        hidden_dim, hidden_depth: of the nets.

    Example:
        >>> flow = UnconditionalFlatCouplingFlow(in_channels=5, n_flows=2, hidden_dim=16, hidden_depth=1)
        >>> z, logdet = flow(torch.randn(4, 5))
        >>> z.shape, logdet.shape, flow.reverse(z).shape
        (torch.Size([4, 5, 1, 1]), torch.Size([4]), torch.Size([4, 5, 1, 1]))
    """

    def __init__(self, in_channels: int, n_flows: int, hidden_dim: int, hidden_depth: int) -> None:
        super().__init__()
        sizes = _checked_sizes(type(self).__name__, in_channels, hidden_dim, hidden_depth, n_flows)
        self.in_channels, self.mid_channels, self.num_blocks, self.n_flows = sizes
        self.sub_layers = Net2NetFlow(NAMES, in_channels, n_flows, hidden_dim, hidden_depth)

    def forward(self, x: Tensor, reverse: bool = False) -> Any:
        """Map ``x [batch, in_channels(, 1, 1)]`` to (z ``[batch, in_channels, 1, 1]``, log-det ``[batch]``).

        ``reverse=True`` gives x alone.
        """
        x = flat(type(self).__name__, x, self.in_channels)
        if reverse:
            return self.sub_layers.inverse(x)[0][:, :, None, None]
        z, logdet = self.sub_layers(x)
        return z[:, :, None, None], logdet

    def reverse(self, out: Tensor) -> Tensor:
        """Map z ``[batch, in_channels(, 1, 1)]`` back to ``[batch, in_channels, 1, 1]``."""
        return self(out, reverse=True)  # type: ignore[no-any-return]

    def sample(self, num_samples: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw ``[num_samples, in_channels, 1, 1]`` with torch's global generator."""
        z = torch.randn(num_samples, self.in_channels, 1, 1)
        return self.reverse(z.to(device=device, dtype=self.sub_layers.weight_in.dtype))

    def get_last_layer(self) -> Tensor:
        """The stacked output weights of all nets; the published code gives the last net's alone."""
        return self.sub_layers.weight_out


class PureAffineFlatCouplingFlow(UnconditionalFlatCouplingFlow):
    """``n_flows`` double couplings without ActNorm and shuffle, as one op. Arguments and calls as its base class."""

    def __init__(self, in_channels: int, n_flows: int, hidden_dim: int, hidden_depth: int) -> None:
        super().__init__(in_channels, n_flows, hidden_dim, hidden_depth)
        self.sub_layers = Net2NetFlow(
            NAMES, in_channels, n_flows, hidden_dim, hidden_depth, actnorm=False, permute=False
        )


class ConditionalFlow(nn.Module):
    """``n_flows`` blocks of ActNorm, activation, conditional double coupling and shuffle, as one op.

    Args:
        in_channels: number of channels.
        embedding_dim: features of the embedding that every block reads.
        hidden_dim, hidden_depth: of the nets.
        n_flows: number of blocks.
        conditioning_option: "none": every block reads the embedding itself; "parallel": each its own linear map of it;
            "sequential": each its own linear map of what the block before read.
        activation: "lrelu" (slope 0.9) or "none".
        exact_logdet: count the activation in the log-det, which the published code does not.

    Raises:
        ValueError: another ``conditioning_option`` or ``activation``.
    """

    def __init__(
        self,
        in_channels: int,
        embedding_dim: int,
        hidden_dim: int,
        hidden_depth: int,
        n_flows: int,
        conditioning_option: str = "none",
        activation: str = "lrelu",
        *,
        exact_logdet: bool = False,
    ) -> None:
        super().__init__()
        self._build(
            in_channels, embedding_dim, hidden_dim, hidden_depth, n_flows, conditioning_option, activation, exact_logdet
        )

    def _build(
        self,
        in_channels: int,
        embedding_dim: int,
        hidden_dim: int,
        hidden_depth: int,
        n_flows: int,
        conditioning_option: str,
        activation: str,
        exact_logdet: bool,
    ) -> None:
        where = type(self).__name__
        lower = conditioning_option.lower() if isinstance(conditioning_option, str) else conditioning_option
        checked_choice(where, "conditioning_option", lower, CONDITIONING)
        sizes = _checked_sizes(type(self).__name__, in_channels, hidden_dim, hidden_depth, n_flows)
        self.in_channels, self.mid_channels, self.num_blocks, self.n_flows = sizes
        self.cond_channels = embedding_dim = checked_int(where, "embedding_dim", embedding_dim)
        self.conditioning_option = conditioning_option
        layered = conditioning_option.lower() != "none"
        self.sub_layers = Net2NetFlow(
            NAMES,
            in_channels,
            n_flows,
            hidden_dim,
            hidden_depth,
            context_dim=embedding_dim,
            activation_slope=_slope(where, activation),
            exact_logdet=exact_logdet,
            # with conditioning layers, the blocks are drawn below, in turn with them
            generator=torch.Generator() if layered else None,
        )
        if layered:
            self.conditioning_layers = nn.ModuleList()
            for block in range(n_flows):
                self.sub_layers._reset_block(block)
                self.conditioning_layers.append(nn.Conv2d(embedding_dim, embedding_dim, 1))

    def _contexts(self, embedding: Tensor) -> Tensor:  # [batch, embedding_dim] or [n_flows, batch, embedding_dim]
        option = self.conditioning_option.lower()
        if option == "none":
            return embedding
        contexts = []
        context = embedding
        for layer in self.conditioning_layers:
            assert isinstance(layer, nn.Conv2d)
            context = F.linear(embedding if option == "parallel" else context, layer.weight.flatten(1), layer.bias)
            contexts.append(context)
        return torch.stack(contexts)

    def _embed(self, embedding: Tensor) -> Tensor:  # [batch, embedding_dim]
        return flat(type(self).__name__, embedding, self.cond_channels)

    def forward(self, x: Tensor, embedding: Tensor, reverse: bool = False) -> Any:
        """Map ``x [batch, in_channels(, 1, 1)]`` under ``embedding [batch, embedding_dim]``.

        Returns:
            (z ``[batch, in_channels, 1, 1]``, log-det ``[batch]``); with ``reverse=True`` x alone.
        """
        contexts = self._contexts(self._embed(embedding))
        x = flat(type(self).__name__, x, self.in_channels)
        if reverse:
            return self.sub_layers.inverse(x, contexts)[0][:, :, None, None]
        z, logdet = self.sub_layers(x, contexts)
        return z[:, :, None, None], logdet

    def reverse(self, out: Tensor, xcond: Tensor) -> Tensor:
        """Map z ``[batch, in_channels(, 1, 1)]`` back to ``[batch, in_channels, 1, 1]``."""
        return self(out, xcond, reverse=True)  # type: ignore[no-any-return]


class ConditionalFlatCouplingFlow(ConditionalFlow):
    """A ConditionalFlow that embeds its condition with an MLP first.

    Args:
        in_channels: number of channels; odd ones work too.
        conditioning_dim: features of the condition.
        embedding_dim, hidden_dim, hidden_depth, n_flows, conditioning_option, activation, exact_logdet: as
            :class:`ConditionalFlow`.
        conditioning_hidden_dim, conditioning_depth: of the embedder.
        conditioner_use_bn: batch normalisation in the embedder.
        conditioner_use_an: ActNorm in the embedder. Not both.

    Raises:
        ValueError: another ``conditioning_option`` or ``activation``, or both normalisations.

    Example:
        >>> flow = ConditionalFlatCouplingFlow(6, 3, 4, hidden_dim=16, hidden_depth=1, n_flows=2)
        >>> z, logdet = flow(torch.randn(5, 6, 1, 1), torch.randn(5, 3))
        >>> z.shape, logdet.shape, flow.sample(torch.randn(7, 3)).shape
        (torch.Size([5, 6, 1, 1]), torch.Size([5]), torch.Size([7, 6, 1, 1]))
    """

    def __init__(
        self,
        in_channels: int,
        conditioning_dim: int,
        embedding_dim: int,
        hidden_dim: int,
        hidden_depth: int,
        n_flows: int,
        conditioning_option: str = "none",
        activation: str = "lrelu",
        conditioning_hidden_dim: int = 256,
        conditioning_depth: int = 2,
        conditioner_use_bn: bool = False,
        conditioner_use_an: bool = False,
        *,
        exact_logdet: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.conditioning_dim = checked_int(type(self).__name__, "conditioning_dim", conditioning_dim)
        self.embedder = BasicFullyConnectedNet(
            conditioning_dim,
            conditioning_depth,
            conditioning_hidden_dim,
            use_bn=conditioner_use_bn,
            out_dim=embedding_dim,
            use_an=conditioner_use_an,
        )
        self._build(
            in_channels, embedding_dim, hidden_dim, hidden_depth, n_flows, conditioning_option, activation, exact_logdet
        )

    def _embed(self, embedding: Tensor) -> Tensor:
        condition = flat(type(self).__name__, embedding, self.conditioning_dim)
        return self.embedder(condition.to(self.sub_layers.weight_in.dtype))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, cond: Tensor, reverse: bool = False) -> Any:
        """Map ``x [batch, in_channels(, 1, 1)]`` under ``cond [batch, conditioning_dim(, 1, 1)]``.

        Returns:
            (z ``[batch, in_channels, 1, 1]``, log-det ``[batch]``); with ``reverse=True`` x alone.
        """
        return super().forward(x, cond, reverse)

    def sample(self, xc: Tensor) -> Tensor:
        """Draw ``[batch, in_channels, 1, 1]``, one for each condition ``xc``, with torch's global generator."""
        z = torch.randn(xc.shape[0], self.in_channels, 1, 1)
        return self.reverse(z.to(self.sub_layers.weight_in), xc)


def nll(sample: Tensor) -> Tensor:
    """0.5 * ||sample||² for each of ``[batch, channels(, height, width)]``: ``[batch]``, in nats up to a constant."""
    return 0.5 * sample.pow(2).flatten(1).sum(1)


class NLL(nn.Module):
    """Negative log-likelihood under a standard normal, without its constant: mean of 0.5 ||z||² - logdet."""

    def forward(self, sample: Tensor, logdet: Tensor, split: str = "train") -> tuple[Tensor, dict[str, Tensor]]:
        """From z ``[batch, channels(, 1, 1)]`` and log-det ``[batch]`` to (loss, log).

        The log's keys start with ``split``: total_loss, reference_nll_loss (of noise, drawn from torch's global
        generator), nlogdet_loss, nll_loss.
        """
        if logdet.dim() != 1:
            raise ValueError(f"NLL: logdet has shape {list(logdet.shape)}, expected [batch]")
        if len(logdet) != len(sample):
            raise ValueError(
                f"NLL: logdet has shape {list(logdet.shape)}, expected [{len(sample)}] like sample's batch"
            )
        nll_loss = nll(sample).mean()
        nlogdet_loss = -logdet.mean()
        loss = nll_loss + nlogdet_loss
        log = {
            f"{split}/total_loss": loss,
            f"{split}/reference_nll_loss": nll(torch.randn_like(sample)).mean(),
            f"{split}/nlogdet_loss": nlogdet_loss,
            f"{split}/nll_loss": nll_loss,
        }
        return loss, log


def _checked_sizes(
    where: str, in_channels: int, hidden_dim: int, hidden_depth: int, n_flows: int
) -> tuple[int, int, int, int]:
    """The sizes of a stack, in the order of the arguments."""
    return (
        checked_int(where, "in_channels", in_channels, least=2),
        checked_int(where, "hidden_dim", hidden_dim),
        checked_int(where, "hidden_depth", hidden_depth, least=0),
        checked_int(where, "n_flows", n_flows),
    )


def _slope(where: str, activation: str) -> float:
    return SLOPES[checked_choice(where, "activation", activation, tuple(SLOPES))]
