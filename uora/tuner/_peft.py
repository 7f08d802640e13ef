"""The one seam to PEFT's private names (peft 0.21; pinned by tests/uora/test_peft_contract.py)."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.tuners.tuners_utils import _get_in_out_features as get_in_out_features
from peft.utils import PeftType, register_peft_method
from peft.utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING as QUERY_VALUE_NAMES
from peft.utils.other import ModulesToSaveWrapper

__all__ = [
    "QUERY_VALUE_NAMES",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "ModulesToSaveWrapper",
    "check_adapters_to_merge",
    "get_in_out_features",
    "register",
]


def register(name: str, *, config_cls: type[Any], model_cls: type[Any]) -> PeftType:
    """Make a method of ours known to PEFT, once per process.

    PEFT's registry takes only members of its closed enum ``PeftType``, so a member is added first.

    Raises:
        RuntimeError: PEFT ships a method of this name itself.
    """
    member_name = name.upper()
    if member_name in PeftType.__members__:
        member = PeftType[member_name]
        if PEFT_TYPE_TO_TUNER_MAPPING.get(member) is not model_cls:
            raise RuntimeError(f"This PEFT has its own {member_name}; drop uora.tuner's registration and use it.")
        return member
    member = _add_member(member_name)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    return member


def _add_member(name: str) -> PeftType:
    """Add a member to PeftType; an Enum class refuses plain attribute assignment, hence ``type``'s."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member
