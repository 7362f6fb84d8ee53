"""What stands before a flow: features come back to the last bit, and those that can't be learned from are set aside."""

import pytest
import torch

from iin_fast import IIN, FactorLoss
from iin_fast.iin import Inputs
from iin_fast.iin.inputs import usual_values


def draw(n=200, dtype=torch.float32, seed=0):
    """Ten features: of very different scale, three constant, one but for rounding, and two copies."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 10, dtype=torch.float64, generator=generator) * torch.logspace(-3, 3, 10) + 7
    z[:, [1, 4]] = torch.tensor([0.1, 0.0], dtype=torch.float64)
    z[:, 6] = 1 + torch.finfo(dtype).eps * torch.randint(3, (n,), generator=generator)
    z[:, [7, 9]] = z[:, [2, 2]]
    return z.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_standardised_or_set_aside(dtype):
    z = draw(dtype=dtype)
    inputs = Inputs.of(z)
    assert inputs.keep.tolist() == [0, 2, 3, 5, 8] and inputs.left.tolist() == [1, 4, 6, 7, 9]
    assert inputs.source.tolist() == [1, 4, 6, 2, 2]
    x, rest, logdet = inputs(z)
    assert x.dtype == rest.dtype == dtype
    # A mean of 7 in float32 is off by 1e-4 of the least deviation.
    assert torch.allclose(x.mean(0), torch.zeros(5, dtype=dtype), atol=1e-3 if dtype == torch.float32 else 1e-11)
    assert torch.allclose(x.std(0, correction=0), torch.ones(5, dtype=dtype), atol=1e-5)
    assert rest[:, [0, 1, 3, 4]].count_nonzero() == 0 and rest.abs().max() < 1e-6
    back, inverse = inputs.inverse(x, rest)
    assert torch.equal(back[:, inputs.left], z[:, inputs.left]) and torch.allclose(back, z, rtol=1e-6, atol=1e-6)
    assert logdet.item() == pytest.approx(-inverse.item())
    # Other latents, in which what was constant varies and copies differ, lose nothing.
    other = torch.randn(50, 10, dtype=dtype, generator=torch.Generator().manual_seed(1))
    x, rest, _ = inputs(other)
    assert torch.allclose(inputs.inverse(x, rest)[0], other, atol=1e-5)
    jacobian = torch.autograd.functional.jacobian(lambda z: torch.cat(inputs(z)[:2], 1), other[:1])[0, :, 0]
    assert torch.linalg.slogdet(jacobian.double()).logabsdet.item() == pytest.approx(logdet.item(), rel=1e-5)


def unit(size: float) -> torch.Tensor:
    return torch.tensor([[1.0, size], [2.0, 2 * size], [0.0, size]], dtype=torch.float64)


def test_what_is_no_latents_is_refused():
    for error, match, call in (
        (TypeError, "z has dtype int64", lambda: Inputs.of(torch.ones(3, 2, dtype=torch.int64))),
        (ValueError, r"expected latents \[n, dim\]", lambda: Inputs.of(torch.ones(3))),
        (ValueError, "NaN or Inf", lambda: Inputs.of(torch.full((3, 2), torch.nan))),
        (ValueError, "no feature that varies", lambda: Inputs.of(torch.ones(3, 2))),
        (ValueError, r"feature 1 of z has values up to 2e\+300, .* multiply it", lambda: Inputs.of(unit(1e300))),
        (ValueError, r"feature 1 of z has values up to 2e-200, .* multiply it", lambda: Inputs.of(unit(1e-200))),
        (ValueError, "left_out is 4, expected less than dim = 4", lambda: Inputs(4, 4)),
        (ValueError, "inputs are of 10 features, expected 4", lambda: IIN(4, inputs=Inputs.of(draw()))),
        (TypeError, "inputs is a bool", lambda: IIN(4, inputs=True)),
        (ValueError, "take 6 dimensions, expected at most 5: the other 5 are constant, copies, or",
         lambda: IIN(10, {"a": 6}, inputs=Inputs.of(draw()))),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def made(z, **options):
    generator = torch.Generator().manual_seed(0)
    inputs = Inputs.of(z)
    return IIN(10, {"a": 2}, 2, 16, inputs=inputs, generator=generator, dtype=z.dtype, **options)


@pytest.mark.parametrize("coupling", ["affine", "spline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_behind_it_is_invertible_and_its_density_right(coupling, dtype):
    z = draw(dtype=dtype)
    model = made(z, coupling=coupling)
    factors, logdet = model(z)
    assert factors.sizes == {"a": 2, "residual": 8} and torch.isfinite(logdet).all()
    back = model.decode(factors)
    assert torch.equal(back[:, [1, 4, 6]], z[:, [1, 4, 6]]) and torch.equal(back[:, 7], back[:, 2])
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert ((back - z) / z.std(0).clamp(min=1e-3)).abs().max() < tolerance
    swapped = model.swap(z, z.flip(0), "a")
    assert torch.equal(swapped[:, [1, 4, 6]], z[:, [1, 4, 6]]) and torch.equal(swapped[:, 9], swapped[:, 2])
    assert (swapped - z)[:, model.inputs.keep].abs().max() > 0
    jacobian = torch.autograd.functional.jacobian(lambda z: model.encode(z).tensor, z[:1])[0, :, 0].double()
    assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(logdet[0].item(), rel=1e-3, abs=1e-3)


def test_start_and_loss_do_not_feel_what_is_constant_or_large():
    z = draw()
    rows = torch.ones(100, 1, dtype=torch.bool)
    assert FactorLoss(0.9)(made(z), z[:100], z[100:], rows).item() < 100  # nats of ten features
    behind_too = made(z)
    behind_too.initialize(z)
    assert torch.equal(behind_too.encode(z).tensor, made(z).encode(z).tensor)


@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_saved_and_loaded(tmp_path, coupling):
    pytest.importorskip("safetensors")
    z = draw(dtype=torch.float64)
    model = made(z, coupling=coupling)
    model(z)
    model.save(tmp_path)
    loaded = IIN.load(tmp_path)
    assert loaded.config == model.config and loaded.config["left_out"] == 5
    assert torch.equal(loaded.log_prob(z), model.log_prob(z))
    assert torch.equal(loaded.swap(z, z.flip(0), "a"), model.swap(z, z.flip(0), "a"))
    meta = IIN(10, {"a": 2}, 2, 16, coupling=coupling, inputs=Inputs(10, 5), dtype=torch.float64, device="meta")
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.log_prob(z), model.log_prob(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_outliers_become_the_farthest_usual_value(dtype):
    z = torch.randn(400, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    z[:, 3] = (torch.arange(400) % 50 == 0) * torch.linspace(1, 3, 400, dtype=dtype)  # mostly 0
    z[:, 4] = 2.0
    assert torch.equal(usual_values(z)[0], z)
    spoilt = z.clone()
    spoilt[7, 0], spoilt[9, 1], spoilt[9, 2] = torch.finfo(dtype).max, -1e6, 1e6
    found, outliers = usual_values(spoilt)
    assert outliers.nonzero().tolist() == [[7, 0], [9, 1], [9, 2]]
    assert torch.equal(found[~outliers], z[~outliers])
    assert (found[outliers].abs() - 20).abs().max() < 3  # 19 of 20 of a Gaussian are within two deviations
    assert (found[outliers] > 0).tolist() == [True, False, True]
    # Like the probabilities of a hundred classes: each row has a large one.
    spoilt = torch.where(torch.eye(100, dtype=torch.bool).repeat(4, 1), 1, 1e-6 * z[:, :1].abs() + 1e-8)
    found, outliers = usual_values(spoilt)
    assert torch.equal(found, spoilt) and outliers.sum() == 400
    for few in (z[:1], z[:2]):
        assert torch.equal(usual_values(few)[0], few)
