"""The loss that teaches an IIN its factors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from ..checks import check_device, check_floating, check_kind, check_latents, check_shape, checked_flag, checked_number
from .factors import RESIDUAL, Factors
from .model import IIN, unwrapped

__all__ = ["FactorLoss"]


class FactorLoss(nn.Module):
    r"""Creates the negative log-likelihood of pairs of latents that share factors.

    .. math::
        \ell = \tfrac12 \|\tilde z^a\|^2 - \log|\det T'(z^a)|
             + \sum_k \frac{\|\tilde z^b_k - m_k \rho \, \tilde z^a_k\|^2}{2 (1 - m_k \rho^2)} - \log|\det T'(z^b)|

    with m_k = 1 where the pair shares factor k, else 0. The residual is never shared.

    A pair may share several factors, or none: with m = 0 throughout, the loss is the negative log-likelihood of two
    single latents, -log p(z^a) - log p(z^b) (exactly so with ``normalized``). So latents without labels still teach
    the network the density, and where only some labels are missing, m_k = 0 for those: whether or not two samples share
    factor k, each alone is N(0, 1) in it, and that is all the term says. :class:`PairSampler` marks pairs so.

    Args:
        rho: correlation of a shared factor, the paper's σ_ab, between 0 and 1 exclusive.
        normalized: add the constants that the formula drops (log 2π per dimension and pair, ½ log(1 − ρ²) per shared
            dimension), so that the value is the true negative log-likelihood in nats. Gradients are the same.

    Raises:
        ValueError: ``rho`` outside (0, 1).
        TypeError: ``rho`` that is no number, ``normalized`` that is not True or False.

    References:
        Esser, Rombach, Ommer, CVPR 2020, Sec. 3.2; CompVis/iin, ``FactorLoss``.

    Example:
        >>> from iin_fast import IIN, FactorLoss
        >>> model = IIN(8, {"digit": 3, "color": 2}, n_flows=2, hidden_dim=16)
        >>> za, zb = torch.randn(2, 4, 8).unbind()
        >>> loss = FactorLoss(rho=0.975)
        >>> loss(model, za, zb, "digit").shape
        torch.Size([])
        >>> mixed = loss(model, za, zb, ["digit", "color", "color", "digit"])
        >>> mixed.backward()
    """

    def __init__(self, rho: float = 0.975, normalized: bool = False) -> None:
        super().__init__()
        self.rho = checked_number("FactorLoss", "rho", rho, above=0, below=1)
        self.normalized = checked_flag("FactorLoss", "normalized", normalized)

    def extra_repr(self) -> str:
        return f"rho={self.rho}, normalized={self.normalized}"

    def forward(
        self,
        model: IIN | nn.Module,
        za: Tensor,
        zb: Tensor,
        shared: Tensor | str | Sequence[str],
        context_a: Tensor | None = None,
        context_b: Tensor | None = None,
    ) -> Tensor:
        """The mean loss over the batch, a scalar in nats. Both samples go through the flow as one batch.

        Args:
            model: the IIN; or the IIN wrapped by torch.compile, DistributedDataParallel, AveragedModel or Fabric, which is
                then what is called.
            za: first latents, ``[batch, dim]``.
            zb: second latents, ``[batch, dim]``.
            shared: what the pairs share: a boolean tensor ``[batch, concepts]`` in the order of ``model.concepts``, the
                name of one factor for all pairs, or a sequence of ``batch`` names.
            context_a, context_b: what ``za`` and ``zb`` come with, ``[batch, context_dim]``; None for a model without.

        Raises:
            TypeError, ValueError: latents that don't fit the model or each other, an empty batch, an unknown factor.
        """
        iin = unwrapped("FactorLoss", model, "; give what another model makes to FactorLoss.from_factors")
        check_latents("FactorLoss", (("za", za), ("zb", zb)), iin.dim, iin.like)
        batch = za.shape[0]
        if batch == 0:
            raise ValueError("FactorLoss: za has no samples, expected at least one pair for a mean")
        mask = self._mask(shared, iin.sizes, batch, za.device)
        for name, context in (("context_a", context_a), ("context_b", context_b)):
            iin._check_context("FactorLoss", name, context, batch)
        contexts = None if context_a is None or context_b is None else torch.cat([context_a, context_b])
        factors, logdet = model(torch.cat([za, zb]), contexts)
        a, b = factors.tensor[:batch], factors.tensor[batch:]
        return self._pair_nll(a, logdet[:batch], b, logdet[batch:], mask, iin.sizes).mean()

    def from_factors(
        self,
        factors_a: Factors,
        logdet_a: Tensor,  # [batch]
        factors_b: Factors,
        logdet_b: Tensor,  # [batch]
        shared: Tensor | str | Sequence[str],
    ) -> Tensor:
        """The loss of each pair, ``[batch]`` in nats, from what the model's forward gives for either sample.

        ``shared`` is as in :meth:`forward`, in the order of the factors' names without the residual.

        Raises:
            TypeError, ValueError: factors or log-determinants that don't match, an unknown factor.
        """
        where = "FactorLoss.from_factors"
        for name, factors in (("factors_a", factors_a), ("factors_b", factors_b)):
            if not isinstance(factors, Factors):
                raise TypeError(f"{where}: {name} is a {type(factors).__name__}, expected iin_fast.Factors")
        sizes = factors_a.sizes
        if list(factors_b.sizes.items()) != list(sizes.items()):
            raise ValueError(f"{where}: factors_b has sizes {factors_b.sizes}, expected {sizes} like factors_a")
        a, b = factors_a.tensor, factors_b.tensor
        check_latents(where, (("factors_a", a), ("factors_b", b)), a.shape[1], a)
        for name, logdet in (("logdet_a", logdet_a), ("logdet_b", logdet_b)):
            check_floating(where, name, logdet)
            check_shape(where, name, logdet, a.shape[:1], "([batch])")
            check_device(where, name, logdet, a, "factors_a")
        return self._pair_nll(a, logdet_a, b, logdet_b, self._mask(shared, sizes, a.shape[0], a.device), sizes)

    def _pair_nll(
        self, a: Tensor, logdet_a: Tensor, b: Tensor, logdet_b: Tensor, mask: Tensor, sizes: dict[str, int]
    ) -> Tensor:
        return functional.pair_nll(
            a, b, logdet_a, logdet_b, mask, list(sizes.values()), self.rho, normalized=self.normalized
        )

    @staticmethod
    def _mask(shared: Tensor | str | Sequence[str], sizes: dict[str, int], batch: int, device: torch.device) -> Tensor:
        """``shared`` as a boolean mask ``[batch, factors]``, the residual included."""
        concepts = [name for name in sizes if name != RESIDUAL]
        if isinstance(shared, Tensor):
            check_kind("FactorLoss", "shared", shared, torch.bool, "torch.bool")
            if shared.shape != (batch, len(concepts)):
                expected = f"[{batch}, {len(concepts)}], one column for each of {concepts}"
                raise ValueError(f"FactorLoss: shared has shape {list(shared.shape)}, expected {expected}")
            if shared.device != device:
                raise ValueError(f"FactorLoss: shared is on {shared.device}, expected {device} like the latents")
            mask = shared
        else:
            if not isinstance(shared, Sequence):
                kind = type(shared).__name__
                raise TypeError(
                    f"FactorLoss: shared is a {kind}, expected a bool tensor, a name or a sequence of names"
                )
            names = [shared] if isinstance(shared, str) else list(shared)
            for name in names:
                if name not in concepts:
                    raise ValueError(f"FactorLoss: shared names {name!r}, expected one of {concepts}")
            if not isinstance(shared, str) and len(names) != batch:
                raise ValueError(f"FactorLoss: shared has {len(names)} names, expected {batch}, one for each pair")
            rows = [[name == concept for concept in concepts] for name in names]
            mask = torch.tensor(rows, dtype=torch.bool, device=device).reshape(len(names), len(concepts))
            mask = mask.expand(batch, len(concepts))
        if len(concepts) < len(sizes):
            mask = torch.cat([mask, mask.new_zeros(batch, 1)], dim=1)
        return mask
