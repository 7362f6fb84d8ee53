"""A whole normalizing flow as one module and one op."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    check_device,
    check_features,
    check_floating,
    checked_choice,
    checked_dtype,
    checked_flag,
    checked_int,
    checked_number,
)
from ..ops.flow import MEMORY
from ..ops.flow import flow as flow_op
from ..ops.flow.layout import pack
from .actnorm import MIN_SPREAD, DataDependentStart, start_values
from .distribution import Density
from .program_flow import draw_linear
from .state_dict_layout import Entry, export_tensors, import_tensors, is_sharded, keep_starts

__all__ = ["Flow"]


class Flow(DataDependentStart, Density):
    """A stack of ``n_flows`` blocks (ActNorm, double affine coupling, permutation) that runs as one op.

    One block, with c = ceil(dim / 2) features that condition and dim - c that are transformed:

        h = scale * (x + loc)                               log|det|: sum log|scale|
        h = h if h >= 0 else activation_slope * h           log|det|: 0, or exact with ``exact_logdet``
        twice, the halves swapped in between:
            h[c:] = h[c:] * exp(s) + t                      log|det|: sum s
            s = tanh(S(h[:c], context)), t = T(h[:c], context)
        y = h[permutation]

    S and T are MLPs of ``hidden_depth + 2`` linear layers with LeakyReLU between them, four to a block. For an odd dim,
    each half transforms the smaller part.

    The parameters of all blocks lie stacked in a few tensors, the weights in the layout that the kernels read, so an
    optimizer step touches few tensors. ``state_dict`` holds the same keys with weights as ``[…, out, in]``; its entries
    are copies, and editing them does not change the module.

    The first call of ``forward`` starts ActNorm from its batch (see :meth:`initialize`), as the published code does,
    in training and in evaluation mode alike. ``inverse`` starts nothing.

    See also :class:`iin_fast.compat.iin.VectorTransformer`, the same flow under the published names.

    References:
        Esser et al. 2020, Sec. 3.1. Dinh et al. 2017 (RealNVP), Eq. 4–8. Kingma and Dhariwal 2018 (Glow), Sec. 3.1.

    Args:
        dim: number of features, at least 2.
        n_flows: number of blocks.
        hidden_dim: width of the MLPs.
        hidden_depth: number of hidden-to-hidden layers of each MLP.
        context_dim: features of the context that every MLP reads beside its half; 0: none.
        leaky_slope: negative slope of the MLPs' LeakyReLU.
        activation_slope: negative slope of the invertible activation after ActNorm; 1: none. Positive.
        exact_logdet: count the activation in the log-det. The published net2net code does not.
        actnorm: False leaves ActNorm out (no ``loc``, ``scale`` parameters).
        permute: False leaves the permutations out.
        min_spread: at the start of ActNorm, a feature with less than this share of the median standard deviation is
            taken as constant; 0 is the published formula, in which a constant feature is scaled by 1e6.
        memory: what is kept for the backward. "save": activations. "checkpoint" (CPU): the input of every half of a
            block, a few percent of that. "auto": "save", and on a CPU "checkpoint" where that would be much. "invert": the
            output alone, from which the backward inverts; its gradients are as wrong as the inverse is in this precision.
        generator: draws the parameters and permutations. Weights and biases start as in torch.nn.Linear.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size, slope or ``memory`` that makes no flow.
        TypeError: a size that is no integer, a slope that is no number, a switch that is not True or False.

    Example:
        >>> flow = Flow(6, n_flows=2, hidden_dim=16, generator=torch.Generator().manual_seed(0))
        >>> x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        >>> z, logdet = flow(x)
        >>> x_again, inverse_logdet = flow.inverse(z)
        >>> torch.allclose(x, x_again, atol=1e-5), torch.allclose(logdet, -inverse_logdet, atol=1e-5)
        (True, True)
    """

    loc: Tensor  # [n_flows, dim]
    scale: Tensor  # [n_flows, dim]
    permutation: Tensor  # [n_flows, dim] int64, y = h[:, permutation]

    def __init__(
        self,
        dim: int,
        n_flows: int = 12,
        hidden_dim: int = 512,
        hidden_depth: int = 2,
        *,
        context_dim: int = 0,
        leaky_slope: float = 0.01,
        activation_slope: float = 1.0,
        exact_logdet: bool = False,
        actnorm: bool = True,
        permute: bool = True,
        min_spread: float = MIN_SPREAD,
        memory: str = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim = checked_int("Flow", "dim", dim, least=2)
        self.n_flows = n_flows = checked_int("Flow", "n_flows", n_flows)
        self.hidden_dim = hidden_dim = checked_int("Flow", "hidden_dim", hidden_dim)
        self.hidden_depth = hidden_depth = checked_int("Flow", "hidden_depth", hidden_depth, least=0)
        self.context_dim = context_dim = checked_int("Flow", "context_dim", context_dim, least=0)
        self.leaky_slope = checked_number("Flow", "leaky_slope", leaky_slope, least=0)
        self.activation_slope = checked_number("Flow", "activation_slope", activation_slope, above=0)
        self.exact_logdet = checked_flag("Flow", "exact_logdet", exact_logdet)
        self.actnorm = checked_flag("Flow", "actnorm", actnorm)
        self.permute = checked_flag("Flow", "permute", permute)
        self.min_spread = checked_number("Flow", "min_spread", min_spread, least=0)
        self.memory = checked_choice("Flow", "memory", memory, MEMORY)
        checked_dtype("Flow", dtype)

        kept = dim - dim // 2  # c: features that condition
        self.matrices = {  # (out, in) of each layer; the hidden one repeats
            "weight_in": (hidden_dim, kept + context_dim),
            "weight_hidden": (hidden_dim, hidden_dim),
            "weight_out": (dim - kept, hidden_dim),
        }

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(n_flows, *shape, device=device, dtype=dtype))

        if actnorm:
            self.loc, self.scale = empty(dim), empty(dim)
        else:  # the op reads them all the same
            self.register_buffer("loc", torch.empty(n_flows, dim, device=device, dtype=dtype), persistent=False)
            self.register_buffer("scale", torch.empty(n_flows, dim, device=device, dtype=dtype), persistent=False)
        # [n_flows, half, net (s, t), …], weights in panels
        self.weight_in = empty(2, 2, (kept + context_dim) * hidden_dim)
        self.bias_in = empty(2, 2, hidden_dim)
        self.weight_hidden = empty(2, 2, hidden_depth, hidden_dim * hidden_dim)
        self.bias_hidden = empty(2, 2, hidden_depth, hidden_dim)
        self.weight_out = empty(2, 2, hidden_dim * (dim - kept))
        self.bias_out = empty(2, 2, dim - kept)
        self._register_start((n_flows,), not actnorm, device)
        index = torch.empty(n_flows, dim, dtype=torch.int64, device=device)
        self.register_buffer("permutation", index, persistent=permute)
        self.reset_parameters(generator)

    def extra_repr(self) -> str:
        text = f"{self.dim}, n_flows={self.n_flows}, hidden_dim={self.hidden_dim}, hidden_depth={self.hidden_depth}"
        text += f", context_dim={self.context_dim}" if self.context_dim else ""
        text += f", activation_slope={self.activation_slope}" if self.activation_slope != 1 else ""
        text += "" if self.actnorm else ", actnorm=False"
        return text + ("" if self.permute else ", permute=False")

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters and permutations anew, and forget the start of ActNorm.

        Net by net in the order of the published code, so that the same seed gives the same flow.
        """
        self._fill_constants()
        for block in range(self.n_flows):
            self._reset_block(block, generator)
        if self.actnorm:
            self._forget_start()

    @torch.no_grad()
    def _fill_constants(self) -> None:
        """The buffers that no checkpoint holds, and that the op reads all the same."""
        device = self.weight_in.device
        values: dict[str, int | Tensor] = {} if self.actnorm else {"loc": 0, "scale": 1, "initialized": 1}
        if not self.permute:
            values["permutation"] = torch.arange(self.dim, device=device)
        for name, value in values.items():
            if getattr(self, name).device != device:  # on the meta device, when a file has given the parameters theirs
                setattr(self, name, torch.empty_like(getattr(self, name), device=device))
            getattr(self, name)[:] = value

    @torch.no_grad()
    def _reset_block(self, block: int, generator: torch.Generator | None = None) -> None:
        def draw(layer: str, index: tuple[int, ...]) -> None:
            weight = self.weight_in.new_empty(self.matrices[f"weight_{layer}"])
            bias = weight.new_empty(weight.shape[0])
            draw_linear(weight, bias, generator)
            getattr(self, f"weight_{layer}")[index].copy_(pack(weight))
            getattr(self, f"bias_{layer}")[index].copy_(bias)

        for net in (0, 1):
            for half in (0, 1):
                draw("in", (block, half, net))
                for layer in range(self.hidden_depth):
                    draw("hidden", (block, half, net, layer))
                draw("out", (block, half, net))
        if self.permute:
            source = generator.device if generator else "cpu"
            self.permutation[block].copy_(torch.randperm(self.dim, generator=generator, device=source))

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start ActNorm from a batch, block by block: each block's output of ActNorm gets mean 0 and std 1.

        loc = -mean, scale = 1 / (std + 1e-6) with the unbiased std. A feature that (almost) does not vary (``min_spread``)
        gets the scale of the median one, and a warning names it. A batch of one row has no spread: scale = 1. An empty
        batch starts nothing. Blocks that have had their start keep it. ``forward`` does this by itself at its
        first call; under DistributedDataParallel all processes then take the start of the first one. Before
        ``fully_shard``, call it with one batch for all processes.

        Args:
            x: ``[batch, dim]``.
            context: as for ``forward``.

        Raises:
            ValueError: NaN or Inf in the batch, or where it has gone through some blocks; then nothing has started.
        """
        context = self._check("x", x, context)
        if x.shape[0] == 0:
            return
        for block, started in enumerate(self._started):
            if not started:
                loc, scale = start_values(f"{type(self).__name__}, block {block}", x, self.min_spread)
                self.loc[block].copy_(loc)
                self.scale[block].copy_(scale)
            if block + 1 < self.n_flows:
                x, _ = self._transform(x, context, block=block)
        self._finish_start()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data to latents.

        Args:
            x: ``[batch, dim]``.
            context: ``[batch, context_dim]``, or one for each block, ``[n_flows, batch, context_dim]``.

        Returns:
            z ``[batch, dim]`` and log|det dz/dx| ``[batch]`` in nats.

        Raises:
            ValueError: another rank, feature count, batch or device; a context that is missing or not wanted; NaN or Inf
                in the first batch.
            RuntimeError: the start of ActNorm under torch.func, or after ``fully_shard``.
            TypeError: an integer, boolean or complex tensor.
        """
        context = self._check("x", x, context)
        if self._awaits_start():
            self.initialize(x, context)
        return self._transform(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latents to data.

        Args:
            z: ``[batch, dim]``.
            context: as for ``forward``.

        Returns:
            x ``[batch, dim]`` and log|det dx/dz| ``[batch]`` in nats, the negative of what ``forward`` gives for x.

        Raises:
            ValueError, TypeError: as ``forward``.
        """
        return self._transform(z, self._check("z", z, context), inverse=True)

    def _transform(
        self, x: Tensor, context: Tensor | None, *, inverse: bool = False, block: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the op on checked input, over all blocks or one."""
        tensors: tuple[Tensor, ...] = (
            self.loc,
            self.scale,
            self.weight_in,
            self.bias_in,
            self.weight_hidden,
            self.bias_hidden,
            self.weight_out,
            self.bias_out,
            self.permutation,
        )
        if block is not None:
            tensors = tuple(tensor[block : block + 1] for tensor in tensors)
            if context is not None and context.shape[0] > 1:
                context = context[block : block + 1]
        return flow_op(
            x,
            context,
            *tensors,
            leaky_slope=self.leaky_slope,
            activation_slope=self.activation_slope,
            exact_logdet=self.exact_logdet,
            inverse=inverse,
            memory=self.memory,
        )

    def _check(self, name: str, x: Tensor, context: Tensor | None) -> Tensor | None:
        """Refuse bad input; gives the context as the op reads it, ``[1 or n_flows, batch, context_dim]``."""
        check_features("Flow", name, x, self.dim)
        check_device("Flow", name, x, self.weight_in, "the parameters")
        if is_sharded(self.weight_in):
            raise RuntimeError(
                "Flow: the parameters are sharded, and not gathered here; call initialize before fully_shard, and name "
                "methods other than forward with torch.distributed.fsdp.register_fsdp_forward_method(module, 'inverse')"
            )
        if (context is None) != (self.context_dim == 0):
            got, wanted = list(context.shape) if isinstance(context, Tensor) else repr(context), "None"
            if self.context_dim:
                wanted = f"[{x.shape[0]}, {self.context_dim}] (context_dim is {self.context_dim})"
            raise ValueError(f"Flow: context is {got}, expected {wanted}")
        if context is None:
            return None
        check_floating("Flow", "context", context)
        check_device("Flow", "context", context, x, name)
        shape = tuple(context.shape)
        if shape[-2:] == (x.shape[0], self.context_dim):  # ranks are told apart first: a dynamic batch is not n_flows
            if len(shape) == 2:
                return context[None]
            if len(shape) == 3 and shape[0] in (self.n_flows, 1):
                return context
        raise ValueError(
            f"Flow: context has shape {list(shape)}, expected [{x.shape[0]}, {self.context_dim}] "
            f"or [{self.n_flows}, {x.shape[0]}, {self.context_dim}]"
        )

    # The layout of the state_dict. Subclasses with other keys override ``entries`` alone.

    def entries(self) -> Iterator[Entry]:
        for name, tensor in self._stored().items():
            panels = self.matrices.get(name)
            yield Entry(name, name, (), tuple(tensor.shape[:-1]) + panels if panels else tuple(tensor.shape), panels)

    def _stored(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds, as they are stored."""
        tensors = self._parameters | self._buffers
        return {k: v for k, v in tensors.items() if v is not None and k not in self._non_persistent_buffers_set}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with torch.set_grad_enabled(keep_vars and torch.is_grad_enabled()):
            for key, tensor in export_tensors(self.entries(), self._stored()).items():
                destination[prefix + key] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        current = self._stored()
        entries = [entry for entry in self.entries() if entry.name in current]  # others are parametrized
        missing: list[str] = []
        stored = import_tensors(
            entries,
            current,
            state_dict,
            prefix,
            keep_dtype=local_metadata.get("assign_to_params_buffers", False),
            missing=missing,
            errors=error_msgs,
        )
        if strict:
            missing_keys.extend(missing)
            known = {prefix + entry.key for entry in entries}
            unexpected_keys.extend(
                key
                for key in state_dict
                if key.startswith(prefix)
                and key not in known
                and key[len(prefix) :].split(".", 1)[0] not in self._modules  # parametrizations read their own
            )
        keep_starts(entries, stored, state_dict, prefix)
        stored = {prefix + name: tensor for name, tensor in stored.items()}
        super()._load_from_state_dict(stored, prefix, local_metadata, strict, [], [], error_msgs)
        if not self.weight_in.is_meta:
            self._fill_constants()
