"""A base model whose weights are shared out among the processes of a run (torch's FSDP2).

Each process holds a part of every frozen weight; a block's whole weights are there only while a batch goes through it.
What is trained is small and whole in every process, so that adapters, states and reinitialisation see it as ever, and
its gradients are exchanged as without sharding, by DistributedDataParallel.

Every pass through the model is one of all processes: each sends its part of the weights to the others.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from uora.errors import SpecError, UnsupportedLayerError
from uora.training.processes import launched, world_size


def check_processes() -> None:
    """Sharding takes several.

    Raises:
        SpecError: this process was started alone.
    """
    if launched() < 2:
        raise SpecError(
            "shard=True shares the base model out among the processes of a run, found one process. Start at least two "
            "with torchrun --nproc-per-node, or leave shard out.",
            param="shard",
        )


def shard_base(model: PeftModel, *, device: torch.device) -> None:
    """Share the frozen weights out, block by block, and put what is left on the device.

    Args:
        model: a base model with its adapter, the same in every process, anywhere.
        device: where this process trains. It never has more than its parts and one whole block.

    Raises:
        UnsupportedLayerError: the base model is quantised, or does not say what its blocks are.
    """
    blocks = _blocks(model)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    mesh = init_device_mesh(device.type, (world_size(),))
    # The outermost module last, for the weights outside of blocks. It is PEFT's, which calls the base model's forward
    # past its hooks.
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(device)


def _blocks(model: PeftModel) -> list[nn.Module]:
    """The modules that transformers keeps on one device, inner ones first."""
    base = model.get_base_model()
    names = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in base.modules() if type(module).__name__ in names]
    if not blocks:
        raise UnsupportedLayerError(
            f"A {type(base).__name__} does not say what its blocks are (expected classes of its modules in "
            "_no_split_modules), so it cannot be sharded. Train it without shard.",
            param="shard",
        )
    packed = next((name for name, weight in base.named_parameters() if not weight.is_floating_point()), None)
    if packed is not None:
        raise UnsupportedLayerError(
            f"The base model is quantised ({packed} holds packed numbers), and only float weights can be sharded. "
            "Train it without shard, or take the base model that it was quantised from.",
            param="shard",
        )
    return blocks[::-1]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_base` has shared it out."""
    return isinstance(model, FSDPModule)


def exchanging(model: PeftModel, *, device: torch.device) -> DistributedDataParallel:
    """A sharded model whose processes exchange the gradients of what is trained. accelerate refuses to make one."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model  # has no types
    ignore(model, frozen)
    # A processor has no number, whatever accelerate calls it.
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, forward_sync_buffers=False)
