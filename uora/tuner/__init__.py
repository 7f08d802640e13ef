"""UORA as a PEFT method. Importing this package registers it with PEFT."""

from uora.tuner._peft import register
from uora.tuner.config import UoraConfig
from uora.tuner.layer import Linear, UoraLayer
from uora.tuner.model import UoraModel, reinitialise
from uora.tuner.state import export_artifact, load_artifact

__all__ = [
    "Linear",
    "UoraConfig",
    "UoraLayer",
    "UoraModel",
    "export_artifact",
    "load_artifact",
    "reinitialise",
]

register("uora", config_cls=UoraConfig, model_cls=UoraModel)
