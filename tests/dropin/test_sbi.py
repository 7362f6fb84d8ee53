"""sbi as its users call it: training inside of a patch, and a trained posterior for sampling."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import has
from torch import Tensor

import iin_fast

if not has("sbi"):
    pytest.skip("sbi is not installed", allow_module_level=True)


def trained(name: str) -> tuple[Any, Tensor]:
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    torch.manual_seed(0)
    theta = torch.rand(120, 2)
    npe = NPE(BoxUniform(torch.zeros(2), torch.ones(2)), density_estimator=name, show_progress_bars=False)
    npe.append_simulations(theta, theta + 0.1 * torch.randn(120, 2))
    npe.train(max_num_epochs=2, training_batch_size=50)
    return npe.build_posterior(), torch.tensor([[0.4, 0.6]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nsf", "maf", "zuko_nsf", "zuko_maf"])
def test_a_training_inside_of_a_patch_and_a_posterior_after_it(
    name: str, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where sbi writes its logs
    own, observed = trained(name)
    assert not calls
    with iin_fast.patch("sbi", fused_optimizer=True):
        fast, _ = trained(name)
        assert calls, "the training ran the libraries' own code"
    # Adam turns a gradient within rounding of 0 into a step of full length, so single weights may differ; the density does not.
    theta = torch.rand(200, 1, 2)
    got, want = (p.posterior_estimator.log_prob(theta, observed) for p in (fast, own))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    torch.manual_seed(1)
    wanted = own.sample((50,), x=observed, show_progress_bars=False)
    calls.clear()
    report = iin_fast.accelerate(own.posterior_estimator)
    assert report.replaced and not report.left, str(report)
    torch.manual_seed(1)
    found = own.sample((50,), x=observed, show_progress_bars=False)
    assert calls, "sampling ran the library's own code"
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
