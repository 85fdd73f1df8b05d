"""From the host to a GPU without waiting. It lies here since this is the room that all others may import."""

import torch


def on_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The same tensor on `device`. What the host sends to a GPU goes through pinned memory and is not waited
    for: a copy from pageable memory would wait for all that was launched on the stream before it."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned already, it is not copied
