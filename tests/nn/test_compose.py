"""nn.Compose: one program where every layer has a place in one, layer by layer elsewhere, the same numbers in both."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import iin_fast
from iin_fast.nn import (
    ActNorm,
    AffineCoupling,
    Compose,
    Flow,
    LULinear,
    MaskedAutoregressiveFlow,
    NeuralSplineFlow,
    Permutation,
    ResidualNet,
    SplineCoupling,
)

DIM = 5
BINS = 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(inputs: int, outputs: int, *activations: nn.Module) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(inputs, 7)]
    for activation in activations:
        layers += [activation, nn.Linear(7, 7, bias=len(layers) % 4 == 1)]
    return nn.Sequential(*layers, nn.Identity(), nn.Linear(7, outputs))


def affine(context: int = 0, net: Callable[..., nn.Module] = nn.Linear, **options) -> AffineCoupling:
    outputs = 2 if options.get("squash") == "none" else 4
    return AffineCoupling(DIM, net(3 + context, outputs), **options)


def spline(context: int = 0, **options) -> SplineCoupling:
    outputs = SplineCoupling.outputs(DIM, bins=BINS, tails=options.get("tails", "linear"))
    return SplineCoupling(DIM, ResidualNet(3 + context, outputs, 8, 1), bins=BINS, tail_bound=2.0, **options)


def every_activation(inputs: int, outputs: int) -> nn.Module:
    kinds = nn.ReLU(), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.SiLU(), nn.GELU(), nn.Tanh(), nn.Sigmoid(), nn.Dropout(0.0)
    return mlp(inputs, outputs, *kinds)


STACKS: dict[str, Callable[[int], list[nn.Module]]] = {
    "one": lambda c: [affine(c)],
    "glow": lambda c: [ActNorm(DIM), LULinear(DIM), affine(c, every_activation), Permutation(DIM), affine(c, swap=True)],
    "squashes": lambda c: [affine(c, squash=s, swap=s < "j") for s in ("identity", "tanh", "atan", "sigmoid", "none")],
    "clamps": lambda c: [affine(c, squash="tanh", clamp=0.3), affine(c, squash="atan", clamp=1.5, swap=True)],
    "splines": lambda c: [ActNorm(DIM), spline(c), Permutation(DIM), spline(c, swap=True), LULinear(DIM, min_diagonal=0.1)],
    "zuko": lambda c: [spline(c, parameterization="zuko"), spline(c, swap=True, tails=None, min_bin_width=0.02)],
    "nested": lambda c: [Compose([ActNorm(DIM), affine(c)], c), Compose([LULinear(DIM), spline(c)], c), Permutation(DIM)],
    "flows": lambda c: [
        NeuralSplineFlow(DIM, c, n_flows=1, bins=BINS, hidden_dim=8),
        MaskedAutoregressiveFlow(DIM, c, n_flows=2, hidden_dim=8, order="random"),
        affine(c),
    ],
}  # fmt: skip
every = pytest.mark.parametrize("name", STACKS)
contexts = pytest.mark.parametrize("context_dim", [0, 2])


def make(name: str, context_dim: int = 0) -> Compose:
    """Started, with parameters that no new one has."""
    torch.manual_seed(0)
    stack = Compose(STACKS[name](context_dim), context_dim).double()
    stack(*data(context_dim, 30))
    with torch.no_grad():
        for i, parameter in enumerate(stack.parameters()):
            parameter += 0.1 * normal(i, *parameter.shape)
    return stack


def data(context_dim: int = 0, n: int = 6) -> tuple[Tensor, ...]:
    return (normal(1, n, DIM), normal(2, n, context_dim)) if context_dim else (normal(1, n, DIM),)


def alone(stack: Compose, inverse: bool, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
    return stack._layer_by_layer(x, context[0] if context else None, (), inverse, False)


class Count(TorchDispatchMode):
    """Names of this package's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "iin_fast":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def ops(call: Callable[[], object]) -> list[str]:
    with Count() as counted:
        call()
    return counted.names


@every
@contexts
@pytest.mark.parametrize("inverse", [False, True])
def test_a_program_is_its_layers(name, context_dim, inverse):
    stack, given = make(name, context_dim), data(context_dim)
    assert stack.obstacle() is None
    assert ops(lambda: (stack.inverse if inverse else stack)(*given)) == ["flow_program"]
    leaves = [t.requires_grad_() for t in given] + list(stack.parameters())

    def gradients(results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        score = sum((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in results)
        return torch.autograd.grad(score, leaves)

    found, wanted = (stack.inverse if inverse else stack)(*given), alone(stack, inverse, *given)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gradients(found), gradients(wanted), rtol=1e-7, atol=1e-8)


@every
@contexts
def test_density_and_samples(name, context_dim):
    stack, (x, *context) = make(name, context_dim), data(context_dim)
    z, logdet = stack(x, *context)
    torch.testing.assert_close(stack.inverse(z, *context)[0], x, rtol=1e-8, atol=1e-8)
    log_prob = stack.log_prob(x, *context)
    torch.testing.assert_close(log_prob, stack.distribution(*context).log_prob(x))
    jacobian = torch.autograd.functional.jacobian(lambda r: stack(r[None], *[c[:1] for c in context])[0][0], x[0])
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian).logabsdet)
    assert stack.sample(3, *context).shape == (3, *([6] if context else []), DIM)
    assert iin_fast.testing.compare_backends(stack, x, *context).ok


def test_the_first_batch_starts_every_actnorm():
    torch.manual_seed(0)
    stack = Compose([ActNorm(DIM), affine(), Compose([LULinear(DIM), ActNorm(DIM)]), affine(swap=True)])
    twin = copy.deepcopy(stack)
    x = 2 * torch.randn(40, DIM) + 1
    stack(x)
    twin.initialize(x)
    for module in (stack, twin):
        norms = [part for part in module.modules() if isinstance(part, ActNorm)]
        assert all(norm.initialized for norm in norms)
        seen = module.layers[1](module.layers[0](x)[0])[0]
        torch.testing.assert_close(norms[1].loc, -module.layers[2].layers[0](seen)[0].mean(0))
    assert ops(lambda: twin(x)) == ["flow_program"]
    torch.testing.assert_close(stack(x + 1), twin(x + 1))


class Doubling(nn.Module):
    """A user's own layer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, torch.full(x.shape[:1], DIM * 2.0, dtype=x.dtype).log()

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z / 2, -torch.full(z.shape[:1], DIM * 2.0, dtype=z.dtype).log()


class Other(AffineCoupling):
    def _map(self, part: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return super()._map(part, 2 * raw, inverse)


class Softer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Twice(nn.Module):
    def forward(self, stored: Tensor) -> Tensor:
        return 2 * stored


def hooked() -> AffineCoupling:
    layer = affine()
    layer.conditioner.register_forward_hook(lambda module, args, result: 3 * result)
    return layer


def parametrized() -> AffineCoupling:
    layer = affine()
    parametrize.register_parametrization(layer.conditioner, "weight", Twice())
    return layer


@pytest.mark.parametrize(
    ("layer", "obstacle"),
    [
        (Doubling, "layers.1 is a Doubling, which has no place in a program"),
        (lambda: Other(DIM, nn.Linear(3, 4)), "layers.1 is a Other, which has no place in a program"),
        (lambda: Flow(DIM, 1, 4, 0), "layers.1 is a Flow, which has no place in a program"),
        (lambda: affine(net=Softer), "layers.1.conditioner is a Softer"),
        (lambda: affine(net=lambda i, o: mlp(i, o, nn.Softplus())), "layers.1.conditioner.1 is a Softplus"),
        (lambda: affine(net=lambda i, o: mlp(i, o, nn.GELU("tanh"))), "layers.1.conditioner.1 is a GELU"),
        (lambda: affine(net=lambda i, o: mlp(i, o, nn.Dropout(0.5))), "layers.1.conditioner.1 drops values while it trains"),
        (lambda: affine(net=lambda i, o: ResidualNet(i, o, 4, dropout=0.5)), "layers.1.conditioner drops values while it trains"),
        (hooked, "layers.1.conditioner has hooks"),
        (parametrized, "layers.1.conditioner is a ParametrizedLinear"),
    ],
)  # fmt: skip
def test_an_obstacle_is_named_and_runs_layer_by_layer(layer, obstacle):
    torch.manual_seed(0)
    stack, x = Compose([ActNorm(DIM), layer(), affine(swap=True)]), torch.randn(30, DIM)
    stack(x)
    assert stack.obstacle() == obstacle and stack.program() is None
    assert f"layer by layer: {obstacle}" in repr(stack)
    torch.manual_seed(1)
    found = stack(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, alone(stack, False, x), rtol=0, atol=0)
    if "drops" in obstacle:
        assert stack.eval().obstacle() is None
        torch.testing.assert_close(stack(x), alone(stack, False, x))
        assert stack.train().obstacle() == obstacle
    else:
        torch.testing.assert_close(stack.inverse(found[0])[0], x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stack.log_prob(x).shape, x.shape[:1])


def swap_layer(stack: Compose) -> None:
    stack.layers[0] = affine(swap=True).double()


def swap_step(stack: Compose) -> None:
    stack.layers[2].conditioner[1] = nn.Sigmoid()


def write_permutation(stack: Compose) -> None:
    stack.layers[3].permutation.copy_(stack.layers[3].permutation.roll(1))


def write_permutation_unseen(stack: Compose) -> None:
    index = stack.layers[3].permutation.data
    index.copy_(index.roll(1))


def another_list(stack: Compose) -> None:
    stack.layers = nn.ModuleList([LULinear(DIM).double(), affine(swap=True).double()])


def add_bias(stack: Compose) -> None:
    stack.layers[2].conditioner[4].bias = nn.Parameter(torch.ones(7).double())


def set_option(stack: Compose) -> None:
    stack.layers[2].conditioner[3].negative_slope = -1.5


def flip(stack: Compose) -> None:
    stack.layers[2].swap = True


def new_parameter(stack: Compose) -> None:
    stack.layers[1].weight = nn.Parameter(stack.layers[1].weight.detach() * 2)


def add_hook(stack: Compose) -> None:
    stack.layers[1].register_forward_hook(lambda module, args, result: (2 * result[0], result[1]))


def own_forward(stack: Compose) -> None:
    stack.layers[0].forward = lambda x: (3 * x, torch.zeros(len(x)).double())


def add_parametrization(stack: Compose) -> None:
    parametrize.register_parametrization(stack.layers[1], "weight", Twice())


def another_class(stack: Compose) -> None:
    stack.layers[2].__class__ = Other


def load(stack: Compose) -> None:
    stack.load_state_dict({k: v if k.endswith("permutation") else v * 1.5 for k, v in stack.state_dict().items()})


def append(stack: Compose) -> None:
    stack.layers.append(Permutation(DIM, torch.tensor([1, 0, 3, 4, 2])))


@pytest.mark.parametrize(
    "change",
    [swap_layer, swap_step, write_permutation, write_permutation_unseen, another_list, add_bias, set_option, flip, new_parameter, add_hook, own_forward, add_parametrization, another_class, load, append],
)  # fmt: skip
@pytest.mark.parametrize("copied", [False, True])
def test_changes_count_from_the_next_call_on(change, copied):
    stack, (x,) = make("glow"), data()
    before = stack(x)[0]
    if copied:
        stack = copy.deepcopy(stack)
    change(stack)
    after, wanted = stack(x), alone(stack, False, x)
    assert not torch.allclose(before, after[0])
    torch.testing.assert_close(after, wanted)
    if change is add_parametrization:
        assert stack.obstacle() == "the stack has a parametrized layer"


@pytest.mark.parametrize("first", [False, True])
def test_a_layer_may_have_an_inverse_of_its_own(first):
    stack, (x,) = Compose([LULinear(DIM).double()]), data()
    if not first:
        stack.inverse(x)
    stack.layers[0].inverse = lambda z: (3 * z, z.sum(1))
    torch.testing.assert_close(stack.inverse(x), (3 * x, x.sum(1)))


@every
def test_copies_are_their_own(name):
    stack, (x,) = make(name), data()
    wanted = stack(x)
    for twin in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        torch.testing.assert_close(twin(x), wanted, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter += 0.1
        torch.testing.assert_close(twin(x), wanted, rtol=0, atol=0)
        stack = twin


def test_sixteen_bits_run_layer_by_layer():
    """Which the op for whole programs does not have on the CPU."""
    stack, (x,) = make("squashes"), data()
    wanted = stack.log_prob(x)
    narrow = copy.deepcopy(stack).bfloat16()
    found = narrow.log_prob(x.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=0.1)


def test_what_a_user_can_do_with_a_program():
    stack = make("glow", 2)
    assert str(stack.program()).startswith("flow of 5 features, context 2, 5 layers")
    assert "one program" in repr(stack)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "Compose: layers holds none with a number of features"),
        (([nn.Linear(3, 3)],), TypeError, r"Compose: layers\[0\] is a Linear, expected a module with forward and inverse"),
        (([ActNorm(3), LULinear(4)],), ValueError, r"Compose: layers\[1\] has dim 4, expected 3 like the ones before"),
        (([ActNorm(3)], -1), ValueError, "Compose: context_dim is -1"),
    ],
)  # fmt: skip
def test_bad_stacks(arguments, error, message):
    with pytest.raises(error, match=message):
        Compose(*arguments)


def test_bad_calls():
    stack, plain = make("glow", 2), make("glow")
    x, context = data(2)
    with pytest.raises(ValueError, match=r"Compose: context is None, expected \[6, 2\]"):
        stack(x)
    with pytest.raises(ValueError, match=r"Compose: context is \[6, 2\], expected None"):
        plain(x, context)
    with pytest.raises(ValueError, match=r"Compose: z has shape \[6, 4\], expected \[batch, 5\]"):
        plain.inverse(x[:, :4])
    with pytest.raises(TypeError, match="Compose: x has dtype float32, expected float64 like the parameters"):
        plain.log_prob(x.float())
    wrong = Compose([AffineCoupling(DIM, nn.Linear(3, 5))])
    assert "the net has 5 outputs, expected 4" in wrong.obstacle()
    with pytest.raises(ValueError, match=r"conditioner returned shape \[6, 5\], expected \[6, 4\]"):
        wrong(x.float())
