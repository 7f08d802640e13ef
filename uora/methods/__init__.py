"""Every method through one interface: put on a base model, trained by PEFT, taken off as a stored adapter.

LoRA and VeRA are PEFT's own tuners, OLoRA is LoRA with another start, UORA and OSoRA are tuners of ours
(``uora.tuner``, ``uora.osora``). What distinguishes them here is in ``uora.methods.kinds``; everything else is the same
for all.
"""

from uora.methods.attaching import adapted_layers, attach
from uora.methods.storing import (
    adapter_fingerprint,
    check_modules,
    export_artifact,
    load_artifact,
    restore_artifact,
)

__all__ = [
    "adapted_layers",
    "adapter_fingerprint",
    "attach",
    "check_modules",
    "export_artifact",
    "load_artifact",
    "restore_artifact",
]
