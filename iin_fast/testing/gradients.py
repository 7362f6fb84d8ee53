"""Gradients under the names that a checkpoint has, whatever the storage."""

from torch import Tensor, nn

from ..nn import Flow
from ..nn.state_dict_layout import export_tensors

__all__ = ["published_grads"]


def published_grads(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model under its state_dict's parameter names and shapes.

    For ``iin_fast.compat`` models these are the published names (``realnvp.flow.0.flow.1.s.0.main.0.weight`` …), so
    that gradients compare with the published code one by one.

    Args:
        model: any module; its flows are taken apart, other parameters appear under their own names.

    Returns:
        name to gradient, copies; parameters without a gradient are left out.
    """
    grads = {}
    for prefix, module in model.named_modules():
        prefix += "." if prefix else ""
        own = {name: p.grad for name, p in module.named_parameters(recurse=False) if p.grad is not None}
        if isinstance(module, Flow):
            grads.update({prefix + key: grad for key, grad in export_tensors(module.entries(), own).items()})
        else:
            grads.update({prefix + name: grad.clone() for name, grad in own.items()})
    return grads
