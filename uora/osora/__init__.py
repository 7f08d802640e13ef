"""OSoRA as a PEFT method (arXiv 2505.14350). Importing this package registers it with PEFT."""

from uora.osora.config import OsoraConfig
from uora.osora.layer import OsoraLinear
from uora.osora.model import OsoraModel
from uora.tuner._peft import register

__all__ = ["OsoraConfig", "OsoraLinear", "OsoraModel"]

register("osora", config_cls=OsoraConfig, model_cls=OsoraModel)
