"""What the scripts of this folder share."""

import torch


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """max |found - reference| / max |reference|"""
    return ((value - reference).abs().max() / reference.abs().max()).item()


def randomise(module: torch.nn.Module, spread: float = 0.05) -> dict[str, torch.Tensor]:
    """Every weight normal with that standard deviation (running variances positive); the state dict."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(0, spread)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module.state_dict()
