"""What of PEFT's private half ``uora.tuner._peft`` leans on: a PEFT upgrade that changes it fails here, readably."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import ModulesToSaveWrapper, PeftType

from tests.uora.toys import VOCABULARY, llama, output
from uora.osora import OsoraModel
from uora.tuner import UoraConfig, UoraLinear, UoraModel
from uora.tuner._peft import register

SIGNATURES = {
    "_create_and_replace": [
        "self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name",
    ],
    "inject_adapter": ["self", "model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"],
    "_prepare_model": ["self", "peft_config", "model"],
    "_pre_injection_hook": ["self", "model", "config", "adapter_name"],
    "_get_adapter_state_dict": ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"],
    "_remap_adapter_state_dict_for_load": ["model", "config", "adapter_name", "state_dict"],
}  # fmt: skip


def test_version_bound() -> None:
    assert version("peft").startswith("0.21.")


@pytest.mark.parametrize(("hook", "arguments"), SIGNATURES.items())
def test_hook_signatures(hook: str, arguments: list[str]) -> None:
    assert list(inspect.signature(getattr(BaseTuner, hook)).parameters) == arguments


def test_forward_hook_is_called_only_where_the_tuner_has_one() -> None:
    assert "_enable_peft_forward_hooks" in inspect.getsource(PeftModel._enable_peft_forward_hooks)


def test_buffer_dict_takes_persistence() -> None:
    assert list(inspect.signature(BufferDict.__init__).parameters) == ["self", "buffers", "persistent"]


def test_layers_are_asked_where_their_adapters_go() -> None:
    # AdditiveLinear keeps PEFT from rounding float32 vectors to the base layer's dtype.
    assert "_get_base_layer_device_and_dtype(" in inspect.getsource(
        BaseTunerLayer._move_adapter_to_device_of_base_layer
    )


def test_adapted_layers_are_known_by_their_names() -> None:
    # PEFT takes an adapter layer for a linear one ("all-linear") if "Linear" is in its class's name.
    assert 'linear_names = ("Linear",)' in inspect.getsource(_maybe_include_all_linear_layers)
    assert "Linear" in UoraLinear.__name__
    assert "Linear" in OsoraModel.tuner_layer_cls.__name__


def test_saved_modules_hold_a_copy_per_adapter() -> None:
    model = get_peft_model(llama(), UoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    (wrapper,) = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert list(wrapper.modules_to_save) == ["default"]
    assert wrapper.original_module is not wrapper.modules_to_save["default"]


def test_peft_ships_no_uora() -> None:
    assert "UORA" not in inspect.getsource(PeftType)


def test_registering_twice_is_harmless_and_a_foreign_owner_is_not() -> None:
    assert register("uora", config_cls=object, model_cls=UoraModel) is PeftType["UORA"]
    with pytest.raises(RuntimeError, match="own UORA"):
        register("uora", config_cls=object, model_cls=BaseTuner)


def test_vera_ignores_adapter_names() -> None:
    # The reason why UoraModel has a forward hook of its own. When this fails, PEFT has mended it: look at both again.
    model = get_peft_model(llama(), VeraConfig(r=4, target_modules=["q_proj"])).eval()
    ids = torch.randint(0, VOCABULARY, (2, 5))
    assert torch.equal(output(model, ids, adapter_names=["no", "such", "names"]), output(model, ids))
