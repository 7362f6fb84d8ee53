"""What is compared: our flow, the published eager composition, torch.compile of it, and the flows of other libraries.

Every system maps ``[batch, dim]`` to ``(z, log-det)`` through ``n_flows`` blocks of ActNorm, a double affine coupling and a
permutation. The published nets are two per half (s and t); the other libraries take one net for both, so its width is
chosen to give the whole flow as nearly as possible the same number of parameters.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Flow
from ..testing import eager_flow

__all__ = ["PUBLISHED", "SMALL", "SYSTEMS", "FlowSize", "System", "build"]


@dataclass(frozen=True)
class FlowSize:
    """Shape of a flow: features, blocks, width and hidden layers of the nets."""

    dim: int
    n_flows: int
    hidden_dim: int
    hidden_depth: int

    def net_parameters(self, hidden: int, out: int) -> int:
        kept = self.dim - self.dim // 2
        return (kept + 1) * hidden + self.hidden_depth * (hidden + 1) * hidden + (hidden + 1) * out

    @property
    def weights(self) -> int:
        """Parameters of all nets: what a pass over the flow must read at least once."""
        return self.n_flows * 4 * self.net_parameters(self.hidden_dim, self.dim // 2)

    @property
    def joint_hidden(self) -> int:
        """Width of one net for s and t together that has the parameters of the published two."""
        wanted = 2 * self.net_parameters(self.hidden_dim, self.dim // 2)
        widths = range(1, 4 * self.hidden_dim)
        return min(widths, key=lambda h: abs(self.net_parameters(h, 2 * (self.dim // 2)) - wanted))

    def joint_net(self, inputs: int, outputs: int) -> nn.Sequential:
        hidden = self.joint_hidden
        layers: list[nn.Module] = [nn.Linear(inputs, hidden), nn.LeakyReLU()]
        for _ in range(self.hidden_depth):
            layers += [nn.Linear(hidden, hidden), nn.LeakyReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden, outputs))


PUBLISHED = FlowSize(dim=64, n_flows=12, hidden_dim=512, hidden_depth=2)
"""configs/*_iin.yaml of the published code."""
SMALL = FlowSize(dim=8, n_flows=6, hidden_dim=64, hidden_depth=2)
"""As in simulation-based inference."""


@dataclass
class System:
    """A flow under test."""

    name: str
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    inverse: Callable[[Tensor], Any]
    parameters: list[nn.Parameter]
    adam: dict[str, Any]  # options of torch.optim.Adam
    joint_pairs: bool = True  # both samples of a pair as one batch; the published code makes two calls
    module: nn.Module | None = None  # what holds the parameters

    def to(self, *where: Any) -> "System":
        """Move it to a device or another type, before its first call."""
        assert self.module is not None
        self.module.to(*where)
        self.parameters = _trainable(self.module.parameters())
        return self


def _started_flow(size: FlowSize, **options: Any) -> Flow:
    flow = Flow(size.dim, size.n_flows, size.hidden_dim, size.hidden_depth, **options)
    with torch.no_grad():
        flow(torch.randn(256, size.dim))
    return flow


def ours(size: FlowSize, memory: str = "auto") -> System:
    flow = _started_flow(size, memory=memory)
    return System("iin-fast", flow, flow.inverse, list(flow.parameters()), {"fused": True}, module=flow)


def eager(size: FlowSize) -> System:
    flow = eager_flow(_started_flow(size))
    return System("eager", flow, flow.reverse, list(flow.parameters()), {}, joint_pairs=False, module=flow)


def eager_joint(size: FlowSize, reads_flag: bool = True) -> System:
    """The published composition with both samples of a pair in one batch, and the fused optimizer."""
    flow = eager_flow(_started_flow(size), reads_flag=reads_flag)
    return System("eager joint", flow, flow.reverse, list(flow.parameters()), {"fused": True}, module=flow)


def compiled(size: FlowSize, mode: str | None = None) -> System:
    flow = eager_flow(_started_flow(size), reads_flag=False)
    forward = torch.compile(flow.forward, dynamic=False, mode=mode)
    inverse = torch.compile(flow.reverse, dynamic=False, mode=mode)
    return System("compile", forward, inverse, list(flow.parameters()), {"fused": True}, module=flow)


def frozen(size: FlowSize) -> System:
    """torch.compile for inference alone: max-autotune, weights frozen into the code."""
    system = compiled(size)
    flow = eager_flow(_started_flow(size), reads_flag=False).eval()
    options: dict[str, Any] = {"freezing": True, "max_autotune": True}
    forward = torch.compile(flow.forward, dynamic=False, options=options)
    inverse = torch.compile(flow.reverse, dynamic=False, options=options)
    return System("compile frozen", forward, inverse, system.parameters, {})


def freia(size: FlowSize) -> System:
    framework = importlib.import_module("FrEIA.framework")
    modules = importlib.import_module("FrEIA.modules")
    flow = framework.SequenceINN(size.dim)
    for _ in range(size.n_flows):
        flow.append(modules.ActNorm)
        flow.append(modules.GLOWCouplingBlock, subnet_constructor=size.joint_net)
        flow.append(modules.PermuteRandom)
    return System(
        "FrEIA", flow, lambda z: flow(z, rev=True), _trainable(flow.parameters()), {"fused": True}, module=flow
    )


def nflows(size: FlowSize) -> System:
    transforms = importlib.import_module("nflows.transforms")

    class Net(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.net = size.joint_net(inputs, outputs)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.net(x)

    first = torch.arange(size.dim) < size.dim // 2
    parts: list[nn.Module] = []
    for _ in range(size.n_flows):
        parts.append(transforms.ActNorm(size.dim))
        for mask in (first, ~first):
            parts.append(transforms.AffineCouplingTransform(mask.long(), Net))
        parts.append(transforms.RandomPermutation(size.dim))
    flow = transforms.CompositeTransform(parts)
    with torch.no_grad():
        flow(torch.randn(256, size.dim))
    flow.eval()  # ActNorm has had its start
    return System("nflows", flow, flow.inverse, _trainable(flow.parameters()), {"fused": True}, module=flow)


def normflows(size: FlowSize) -> System:
    library = importlib.import_module("normflows")
    parts: list[nn.Module] = []
    for _ in range(size.n_flows):
        parts.append(library.flows.ActNorm((size.dim,)))
        for _ in range(2):
            net = size.joint_net(size.dim - size.dim // 2, 2 * (size.dim // 2))
            parts.append(library.flows.AffineCouplingBlock(net, scale_map="exp"))
            parts.append(library.flows.Permute(size.dim, mode="swap"))
        parts.append(library.flows.Permute(size.dim, mode="shuffle"))
    flow = library.NormalizingFlow(library.distributions.DiagGaussian(size.dim, trainable=False), parts)
    with torch.no_grad():
        flow.forward_and_log_det(torch.randn(256, size.dim))
    parameters = _trainable(flow.parameters())
    return System("normflows", flow.forward_and_log_det, flow.inverse, parameters, {"fused": True}, module=flow)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


SYSTEMS: dict[str, Callable[[FlowSize], System]] = {
    "eager": eager,
    "eager joint": eager_joint,
    "compile": compiled,
    "compile frozen": frozen,
    "FrEIA": freia,
    "nflows": nflows,
    "normflows": normflows,
    "iin-fast": ours,
}
"""By the name they carry in results. "eager" is what ratios refer to."""


def build(name: str, size: FlowSize) -> System:
    """A system by its name.

    Raises:
        ValueError: no system of that name.
        ImportError: the library behind it is not installed.
    """
    if name not in SYSTEMS:
        raise ValueError(f"bench: peer {name!r} is unknown, expected some of {', '.join(SYSTEMS)}")
    torch.manual_seed(0)
    return SYSTEMS[name](size)
