"""What is called first in a new process compiles nothing, and loads no compiler."""

import subprocess
import sys

CODE = """
import sys, torch
import iin_fast
from iin_fast import functional as F
from iin_fast import nn
x = torch.randn(20, 6)
for flow in (nn.Flow(6, n_flows=2, hidden_dim=8), nn.RealNVP(6), nn.MaskedAutoregressiveFlow(6), nn.NeuralSplineFlow(6)):
    (-flow.log_prob(x).mean()).backward()
    flow.sample((5,))
leaf = x.clone().requires_grad_()
F.rational_quadratic_spline(leaf, *(torch.randn(20, 6, n) for n in (4, 4, 3)))[0].sum().backward()
F.affine_coupling(leaf, x, x)[0].sum().backward()
model = iin_fast.IIN(6, {"a": 2}, n_flows=2, hidden_dim=8)
iin_fast.FactorLoss()(model, x[:10], x[10:], torch.ones(10, 1, dtype=torch.bool)).backward()
model.swap(x[:10], x[10:], "a")
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy", "triton") if name in sys.modules))
"""


def test_loads_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
