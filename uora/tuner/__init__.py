"""UORA as a PEFT method. Importing this package registers it with PEFT."""

from uora.tuner._peft import register
from uora.tuner.config import UoraConfig
from uora.tuner.layer import UoraLinear
from uora.tuner.model import UoraModel, reinitialise

__all__ = [
    "UoraConfig",
    "UoraLinear",
    "UoraModel",
    "reinitialise",
]

register("uora", config_cls=UoraConfig, model_cls=UoraModel)
