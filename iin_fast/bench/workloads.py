"""What is timed, and the least that a machine needs for it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .systems import PUBLISHED, SMALL, FlowSize, System

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True)
class Workload:
    """One timed case.

    ``kind``: forward, inverse (both without gradients), gradient (forward and backward) or step (gradient and Adam).
    ``batch`` counts rows; where ``pairs`` is set, the rows are the two samples of ``batch // 2`` pairs.
    """

    name: str
    kind: str
    batch: int
    size: FlowSize = PUBLISHED
    pairs: bool = False
    target: float | None = None  # the ratio to eager that docs/performance.md holds us to

    @property
    def inference(self) -> bool:
        return self.kind in ("forward", "inverse")

    def prepare(self, system: System) -> Callable[[], object]:
        """The call that is timed."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, self.size.dim, generator=generator).to(system.parameters[0])
        if self.inference:
            function = system.forward if self.kind == "forward" else system.inverse

            def infer() -> object:
                with torch.no_grad():
                    return function(x)

            return infer
        half = self.batch // 2
        calls = [x[:half], x[half:]] if self.pairs and not system.joint_pairs else [x]
        optimizer = torch.optim.Adam(system.parameters, lr=1e-5, betas=(0.5, 0.9), **system.adam)

        def nll(rows: Tensor) -> Tensor:
            z, logdet = system.forward(rows)
            return 0.5 * z.square().sum() - logdet.sum()

        def train() -> object:
            optimizer.zero_grad()
            torch.stack([nll(rows) for rows in calls]).sum().backward()
            if self.kind == "step":
                optimizer.step()
            return None

        return train

    def floor(self, flops: float, read: float, copy: float) -> float:
        """Seconds below which this case cannot come on a machine with these peaks.

        Matrix products at ``flops`` operations a second, hidden behind them or hiding them the weights: read at ``read``
        bytes a second once forward and once backward, their gradient written at ``copy``. After that Adam, which reads
        weight, gradient and two moments and writes weight and moments, at ``copy``.
        """
        size = 4.0 * self.size.weights
        products = 2.0 * self.size.weights * self.batch / flops
        if self.inference:
            return max(products, size / read)
        gradient = max(3 * products, 2 * size / read + size / copy)
        return gradient + (7 * size / copy if self.kind == "step" else 0.0)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("forward, batch 1", "forward", 1, target=2.0),
        Workload("forward, batch 25", "forward", 25, target=4.5),
        Workload("inverse, batch 25", "inverse", 25, target=4.5),
        Workload("forward, batch 256", "forward", 256, target=1.3),
        Workload("forward, batch 4096", "forward", 4096, target=1.1),
        Workload("forward+backward, 25 pairs", "gradient", 50, pairs=True, target=3.0),
        Workload("training step, 25 pairs", "step", 50, pairs=True, target=3.0),
        Workload("small flow, forward+backward, batch 128", "gradient", 128, SMALL, target=5.0),
    )
}
