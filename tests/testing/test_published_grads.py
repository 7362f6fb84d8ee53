"""Gradients under published names."""

import torch
from torch import nn

from iin_fast.compat.iin import VectorTransformer
from iin_fast.nn import Flow
from iin_fast.testing import published_grads


def test_names_and_shapes_are_those_of_the_state_dict():
    model = VectorTransformer({"Transformer": dict(in_channel=6, n_flow=2, hidden_depth=1, hidden_dim=70)})
    assert published_grads(model) == {}
    z, logdet = model(torch.randn(5, 6))
    (z.square().sum() - logdet.sum()).backward()
    grads = published_grads(model)
    learned = {k: v for k, v in model.state_dict().items() if not k.endswith(("initialized", "shuffle_idx"))}
    assert {k: v.shape for k, v in grads.items()} == {k: v.shape for k, v in learned.items()}


def test_a_step_along_them_is_a_step_of_the_optimizer():
    flow = Flow(7, n_flows=2, hidden_dim=70, hidden_depth=1)
    model = nn.Sequential(nn.Linear(7, 7), nn.ModuleDict({"flow": flow}))
    z, logdet = flow(model[0](torch.randn(5, 7)))
    before = model.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    (z.square().sum() - logdet.sum()).backward()
    grads = published_grads(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model.state_dict()
    assert {"0.weight", "1.flow.weight_hidden", "1.flow.loc"} < grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(after[key], before[key] - 0.1 * grad)


def test_gradients_are_copies():
    flow = Flow(6, n_flows=1, hidden_dim=16)
    flow(torch.randn(5, 6))[0].sum().backward()
    published_grads(flow)["bias_out"].zero_()
    assert flow.bias_out.grad.any()
