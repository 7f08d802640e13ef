"""How much memory is free."""

from __future__ import annotations

import psutil
import torch


def available_bytes(device: torch.device) -> int:
    """Bytes that can be taken on ``device`` without pushing anything out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
