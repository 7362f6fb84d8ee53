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
        x = torch.randn(self.batch, self.size.dim, generator=generator)
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

    def work(self) -> tuple[float, float]:
        """(floating-point operations, bytes): the matrix products, and each weight moved as often as it must be."""
        weights = self.size.weights
        operations = 2.0 * weights * self.batch
        moved = 4.0 * weights  # read once
        if not self.inference:
            operations *= 3  # forward, gradients of inputs, gradients of weights
            moved *= 3  # read forward and backward, gradient written
        if self.kind == "step":
            moved += 4.0 * weights * 7  # Adam reads weight, gradient and two moments, writes weight and moments
        return operations, moved

    def floor(self, flops: float, bandwidth: float) -> float:
        """Seconds below which this case cannot come on a machine with these peaks."""
        operations, moved = self.work()
        products = operations / flops
        if self.kind != "step":
            return max(products, moved / bandwidth)
        adam = 4.0 * self.size.weights * 7 / bandwidth  # the optimizer comes after the products
        return max(products, (moved - adam * bandwidth) / bandwidth) + adam


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
