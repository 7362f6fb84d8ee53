"""What training code does with modules: copies, files, hooks, autocast, checkpointing, parametrizations, averages."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from iin_fast.nn import ActNorm, Flow
from iin_fast.nn.actnorm import DataDependentStart

from .cases import CASES, DIM, MODULES, Case, gradients, normal, same, seeded, tensors

every = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
modules = pytest.mark.parametrize("case", MODULES, ids=[case.name for case in MODULES])


def moved(module: nn.Module) -> nn.Module:
    """With other parameters and buffers than every new one of its case."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.25).add_(0.03)
        for name, buffer in module.named_buffers():
            if name.endswith("permutation"):
                buffer.copy_(buffer.roll(1, -1))
    return module


def twins(case: Case, twin: nn.Module, module: nn.Module) -> None:
    """Equal results and gradients, nothing shared."""
    assert twin is not module
    for mine, other in zip(twin.parameters(), module.parameters(), strict=True):
        assert mine is not other and mine.data_ptr() != other.data_ptr()
    inputs = case.inputs(5)
    same(gradients(twin, twin, inputs), gradients(module, module, inputs), rtol=0, atol=0)


@modules
def test_deepcopy(case: Case):
    module = moved(case.module())
    twins(case, copy.deepcopy(module), module)


@modules
def test_pickle(case: Case):
    module = moved(case.module())
    twins(case, pickle.loads(pickle.dumps(module)), module)


@modules
def test_weights_only_file(case: Case, tmp_path: Path):
    module, twin = moved(case.module()), case.module()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    twins(case, twin, module)


@modules
@pytest.mark.parametrize("way", ["tensors", "model"])
def test_safetensors(case: Case, way: str, tmp_path: Path):
    files = pytest.importorskip("safetensors.torch")
    module, twin, path = moved(case.module()), case.module(), tmp_path / "weights.safetensors"
    if way == "tensors":
        files.save_file(module.state_dict(), path)
        twin.load_state_dict(files.load_file(path))
    else:
        files.save_model(module, str(path))
        files.load_model(twin, path)
    twins(case, twin, module)


@modules
def test_optimizer_state_survives_a_file(case: Case):
    """Two steps of Adam, or one, a file, and one more."""
    module, other = case.module(), case.module()
    if not list(module.parameters()):
        pytest.skip("nothing to learn")

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        sum(t.square().sum() for t in tensors(module(*case.inputs(5)))).backward()
        optimizer.step()

    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    step(module, optimizer)
    file = io.BytesIO()
    torch.save((module.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed = torch.optim.Adam(other.parameters(), lr=1e-3)
    resumed.load_state_dict(state)
    for one in ((module, optimizer), (other, resumed)):
        step(*one)
    same(list(other.parameters()), list(module.parameters()), rtol=0, atol=0)


@every
def test_autocast(case: Case):
    """Under bfloat16 autocast ops and flows compute in float32; only linear layers of the user's own run narrower."""
    module, inputs = case.module(), case.inputs(5)
    wanted = tensors(module(*inputs))
    narrow = [t.bfloat16() if i < case.batched and t.is_floating_point() else t for i, t in enumerate(inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        found = tensors(module(*inputs))
        rounded = tensors(module(*narrow))
    own = any(isinstance(part, nn.Linear) for part in module.modules())
    same(found, wanted, **(dict(rtol=0.03, atol=0.05) if own else dict(rtol=0, atol=0)))
    assert all(t.dtype == torch.float32 for t in found)
    same([t.float() for t in rounded], wanted, rtol=0.05, atol=0.15)


@every
def test_gradients_under_autocast(case: Case):
    module, inputs = case.module(), case.inputs(5)
    if not [*module.parameters()] and not any(t.is_floating_point() for t in inputs):
        pytest.skip("nothing to learn")

    def call(*inputs: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return tensors(module(*inputs))

    own = any(isinstance(part, nn.Linear) for part in module.modules())
    tolerance = dict(rtol=0.05, atol=0.1) if own else dict(rtol=0, atol=0)
    same(gradients(call, module, inputs), gradients(module, module, inputs), **tolerance)


@every
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoint(case: Case, use_reentrant: bool):
    module, inputs = case.module(), case.inputs(5)

    def call(*inputs: Tensor) -> list[Tensor]:
        return tensors(checkpoint(lambda *a: tuple(tensors(module(*a))), *inputs, use_reentrant=use_reentrant))

    if use_reentrant:  # which works with backward() alone

        def backward(call: object) -> list[Tensor]:
            leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
            module.zero_grad()
            results = tensors(call(*leaves))
            sum(t.square().sum() for t in results).backward()
            return [*results, *(t.grad for t in [*leaves, *module.parameters()] if t.grad is not None)]

        same(backward(call), backward(module))
    else:
        same(gradients(call, module, inputs), gradients(module, module, inputs))


@modules
def test_hooks(case: Case):
    module, inputs, seen = case.module(), case.inputs(5), []
    wanted = module(*inputs)
    before = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    after = module.register_forward_hook(lambda _, args, result: seen.append(result))
    found = module(*inputs)
    assert seen[0] is not None and seen[1] is found and len(seen) == 2
    same(found, wanted, rtol=0, atol=0)
    before.remove()
    after.remove()
    module.register_forward_hook(lambda _, args, result: [2 * t for t in tensors(result)])
    same(module(*inputs), [2 * t for t in tensors(wanted)], rtol=0, atol=0)
    if list(module.parameters()):
        grads = []
        for parameter in module.parameters():
            parameter.register_hook(grads.append)
        sum(t.sum() for t in tensors(module(*inputs))).backward()
        assert len(grads) == sum(p.grad is not None for p in module.parameters()) > 0


@modules
def test_backward_hook_of_a_module(case: Case):
    """Module.register_full_backward_hook wants tensors, or tuples of them, in and out."""
    module, (x, *rest), seen = case.module(), case.inputs(5), []
    wanted = gradients(module, module, (x, *rest))
    module.register_full_backward_hook(lambda _, grad_input, grad_output: seen.append((grad_input, grad_output)))
    same(gradients(module, module, (x, *rest)), wanted, rtol=0, atol=0)
    assert len(seen) == 1


class Doubled(nn.Module):
    """A parametrization: twice the stored tensor."""

    def forward(self, stored: Tensor) -> Tensor:
        return 2 * stored

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2


@modules
def test_parametrize(case: Case, tmp_path: Path):
    """Values and files go through the parametrization, gradients to what it stores."""

    def parametrized() -> nn.Module:
        module = case.module()
        for part in list(module.modules()):
            for name in list(dict(part.named_parameters(recurse=False))):
                parametrize.register_parametrization(part, name, Doubled())
        return module

    module, inputs = parametrized(), case.inputs(5)
    same(module(*inputs), case.module()(*inputs))
    plain = case.module()
    if not list(plain.parameters()):
        pytest.skip("nothing to learn")
    count = len(list(plain.parameters()))
    found, wanted = gradients(module, module, inputs)[-count:], gradients(plain, plain, inputs)[-count:]
    by_norm = dict(key=lambda t: t.norm().item())  # a parametrized module lists its parameters in another order
    same(sorted(found, **by_norm), [2 * t for t in sorted(wanted, **by_norm)])
    moved(module)
    twin = parametrized()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    same(twin(*inputs), module(*inputs), rtol=0, atol=0)
    for part in list(module.modules()):
        for name in list(getattr(part, "parametrizations", {})):
            parametrize.remove_parametrizations(part, name)
    same(module(*inputs), twin(*inputs))
    assert module.state_dict().keys() == plain.state_dict().keys()


@modules
def test_averages(case: Case):
    """An exponential moving average that was made before the first batch follows its start."""
    module = case.module()
    if not list(module.parameters()):
        pytest.skip("nothing to average")
    for part in module.modules():
        if isinstance(part, DataDependentStart) and part._started:  # not started
            part.initialized.zero_()
            part._started = (False,) * len(part._started)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    inputs = case.inputs(16)
    module(*inputs)  # the start
    average.update_parameters(module)
    first = [p.detach().clone() for p in module.parameters()]
    same(average(*inputs), module(*inputs))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.25)
    average.update_parameters(module)
    wanted = [(before + after) / 2 for before, after in zip(first, module.parameters(), strict=True)]
    average(*case.inputs(3))
    same(list(average.module.parameters()), wanted)


@modules
def test_stochastic_weight_averages(case: Case):
    """AveragedModel as it is by default: the plain mean of all that it was shown."""
    module = case.module()
    if not list(module.parameters()):
        pytest.skip("nothing to average")
    average, seen = AveragedModel(module), []
    for _ in range(3):
        moved(module)
        average.update_parameters(module)
        seen.append([p.detach().clone() for p in module.parameters()])
    same(list(average.module.parameters()), [torch.stack(steps).mean(0) for steps in zip(*seen, strict=True)])
    twin = case.module()
    twin.load_state_dict(average.module.state_dict())
    same(average(*case.inputs(5)), twin(*case.inputs(5)), rtol=0, atol=0)


def test_update_bn_leaves_actnorm_as_it_was_averaged():
    flow = next(case for case in MODULES if case.name == "Flow").module()
    average = AveragedModel(nn.Sequential(nn.BatchNorm1d(DIM), flow))
    before, data = [p.detach().clone() for p in average.parameters()], 3 * normal(5, 64, DIM) + 2
    update_bn(data.split(16), average)
    same(average.module[0].running_mean, data.mean(0))
    same(list(average.parameters()), before, rtol=0, atol=0)


def test_data_parallel_is_refused():
    for module in (Flow(DIM, n_flows=1, hidden_dim=4, generator=seeded()), ActNorm(DIM)):
        with pytest.raises(RuntimeError, match="DataParallel.*use torch.nn.parallel.DistributedDataParallel"):
            module._replicate_for_data_parallel()
    assert nn.DataParallel(module)(normal(1, 5, DIM))[0].shape == (5, DIM)  # without a GPU it calls the module itself
