"""Names of a model's tensors in a checkpoint: the same for a compiled model and a plain one."""

from torch import Tensor, nn

_COMPILED = "_orig_mod."
"""What `torch.compile` puts into the names of a module's tensors."""


def plain_name(name: str) -> str:
    """Return the name that a tensor has in the model that is not compiled."""
    return name.replace(_COMPILED, "")


def named_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their plain names, shared ones once."""
    return {plain_name(name): param for name, param in model.named_parameters()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers by their plain names, shared ones once."""
    return {plain_name(name): buffer for name, buffer in model.named_buffers()}
