"""Every method on every kind of model: one list of what users of PEFT expect, and of what a stored adapter promises."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.uora.toys import ALL_TOYS, PROVENANCE, Toy, export
from uora.artifact import Artifact, loads
from uora.convert import write_lora
from uora.errors import AdapterNotFoundError, FingerprintError, ShapeError
from uora.methods import attach, load_artifact
from uora.serving.bank import AdapterBank
from uora.spec import METHODS, AdapterSpec, parse_adapter
from uora.svd import BaseWeights

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`",
)
DTYPES = (torch.float32, torch.bfloat16)
ROWS = 3


@dataclass(frozen=True)
class Case:
    """One method on one model in one precision."""

    method: str
    toy_name: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.method}-{self.toy_name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def toy(self) -> Toy:
        return ALL_TOYS[self.toy_name]

    @cached_property
    def x(self) -> Tensor:
        """A batch of rows."""
        x = self.toy.inputs(ROWS)
        return x.to(self.dtype) if x.is_floating_point() else x

    def spec(self, r: int = 4) -> AdapterSpec:
        return parse_adapter({"method": self.method, "r": r, "targets": self.toy.targets})

    def base(self) -> nn.Module:
        return self.toy.build().to(self.dtype)

    def close(self, found: Tensor, expected: Tensor) -> None:
        """Equal to the rounding of the precision."""
        tolerance = 1e-5 if self.dtype is torch.float32 else 6e-2
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


CASES = [Case(*values) for values in product(METHODS, ALL_TOYS, DTYPES)]
EXACT_CASES = [case for case in CASES if case.dtype is torch.float32]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def run(model: nn.Module, x: Tensor, **kwargs: object) -> Tensor:
    """The model's main output."""
    found = model(x, **kwargs)
    return found if isinstance(found, Tensor) else found[0]


def answer(model: nn.Module, x: Tensor, **kwargs: object) -> Tensor:
    """The same in inference."""
    with torch.no_grad():
        return run(model.eval(), x, **kwargs)


def weights_of(model: nn.Module) -> BaseWeights:
    return BaseWeights.of_model(model)


def fit(model: PeftModel, case: Case, steps: int = 3) -> list[float]:
    """Train towards random outputs; returns the losses."""
    target = torch.randn(answer(model, case.x).shape, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=case.spec().base_learning_rate)
    losses = []
    for _ in range(steps):
        loss = (run(model.train(), case.x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def new(case: Case, *, r: int = 4, seed: int = 0) -> PeftModel:
    base = case.base()
    return attach(base, case.spec(r), base=weights_of(base), seed=seed)


@cache
def stored(case: Case, r: int = 4, steps: int = 3) -> Artifact:
    """A trained adapter."""
    model = new(case, r=r)
    fit(model, case, steps)
    return loads(export(model, case.spec(r)))


def load(case: Case, artifact: Artifact | None = None) -> PeftModel:
    base = case.base()
    return load_artifact(base, artifact or stored(case), base=weights_of(base)).eval()


@each_case
def test_starts_as_the_base_model(case: Case) -> None:
    case.close(answer(new(case), case.x), answer(case.base(), case.x))


@each_case
def test_training_lowers_the_loss_and_leaves_the_base_model(case: Case) -> None:
    model = new(case)
    losses = fit(model, case, steps=15)
    assert losses[-1] < losses[0]
    untouched = dict(case.base().named_parameters())
    for name, weight in model.get_base_model().named_parameters():
        if (original := untouched.get(name.replace(".base_layer", ""))) is not None:
            assert torch.equal(weight, original), name
    with model.disable_adapter():
        assert torch.equal(answer(model, case.x), answer(case.base(), case.x))


@each_case
def test_store_and_load_is_exact(case: Case) -> None:
    model = new(case)
    fit(model, case)
    artifact = loads(export(model, case.spec()))
    again = load(case, artifact)
    assert torch.equal(answer(again, case.x), answer(model, case.x))
    assert export(again, case.spec()) == export(model, case.spec())
    assert (answer(again, case.x) - answer(case.base(), case.x)).abs().max() > 1e-3  # it does something


@each_case
def test_training_goes_on_after_loading(case: Case) -> None:
    before = stored(case)
    model = load(case)
    fit(model, case)
    after = loads(export(model, case.spec()))
    for name, tensor in before.tensors.items():
        if name != "hits":
            assert (after.tensors[name] != tensor).any(), name
    if case.method == "olora":  # the second half is where it started
        for old, found in zip(before.parts(), after.parts(), strict=True):
            assert (old[1]["lora_a"][4:] == found[1]["lora_a"][4:]).all()
            assert (old[1]["lora_b"][:, 4:] == found[1]["lora_b"][:, 4:]).all()


@each_case
def test_save_pretrained_round_trip(case: Case, tmp_path: Path) -> None:
    """PEFT's own form. VeRA's matrices are ours, so that PEFT alone cannot rebuild them; its stored form is above."""
    if case.method == "vera":
        return
    model = load(case)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(case.base(), tmp_path), case.x), answer(model, case.x))


@each_case
def test_merge_and_unmerge(case: Case) -> None:
    model = load(case)
    expected = answer(model, case.x)
    model.merge_adapter(safe_merge=True)
    case.close(answer(model, case.x), expected)
    model.unmerge_adapter()
    case.close(answer(model, case.x), expected)
    case.close(answer(model.merge_and_unload(), case.x), expected)


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
@pytest.mark.parametrize("r", [4, 25])  # more than some of the sides
def test_export_is_a_lora_of_stock_peft(case: Case, r: int, tmp_path: Path) -> None:
    artifact = stored(case, r)
    write_lora(artifact, tmp_path, base=weights_of(case.base()))
    lora = PeftModel.from_pretrained(case.base(), tmp_path)
    case.close(answer(lora, case.x), answer(load(case, artifact), case.x))


@each_case
def test_second_adapter_switch_and_delete(case: Case) -> None:
    model = load(case)
    first = answer(model, case.x)
    other = stored(case, r=6, steps=2)
    load_artifact(model, other, base=weights_of(case.base()), adapter_name="two")
    assert torch.equal(answer(model, case.x), first)
    model.set_adapter("two")
    assert torch.equal(answer(model, case.x), answer(load(case, other), case.x))
    model.set_adapter("default")
    model.delete_adapter("two")
    assert list(model.peft_config) == ["default"]
    assert not [
        name for name in model.state_dict() if "two" in name.split(".") and "_A." not in name and "_B." not in name
    ]
    assert torch.equal(answer(model, case.x), first)


@each_case
def test_deepcopy_is_independent(case: Case) -> None:
    model = load(case)
    expected = answer(model, case.x)
    twin = copy.deepcopy(model)
    assert torch.equal(answer(twin, case.x), expected)
    fit(twin, case, steps=2)
    assert not torch.equal(answer(twin, case.x), expected)
    assert torch.equal(answer(model, case.x), expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.toy_name != "mlp"], ids=str)  # a plain module has none
def test_gradient_checkpointing_gives_the_same_gradients(case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(case).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)  # of dropout
        run(model, case.x).float().square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        # A bias before a norm has almost no gradient: what is left is rounding, of the size that others have.
        rounding = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradients[1][name], gradient, atol=4 * rounding, rtol=1e-5)


@each_case
def test_mixed_batch_is_row_by_row(case: Case) -> None:
    first, second = stored(case), stored(case, r=6)
    model = case.base()
    bank = AdapterBank(model, base_digest=PROVENANCE.base_digest)
    for artifact in (first, second):
        bank.check(artifact.manifest)
        bank.put(artifact)
    with bank.serving([first.manifest.digest, None, second.manifest.digest]):
        mixed = answer(model, case.x)
    for row, alone in enumerate((load(case), case.base(), load(case, second))):
        case.close(mixed[row : row + 1], answer(alone, case.x[row : row + 1]))


@pytest.mark.parametrize("toy_name", ALL_TOYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_methods_in_one_batch(toy_name: str, dtype: torch.dtype) -> None:
    cases = [Case(method, toy_name, dtype) for method in METHODS]
    x = cases[0].toy.inputs(2 * len(cases) + 2)
    x = x.to(dtype) if x.is_floating_point() else x
    owners: list[Case | None] = [*cases, None, *reversed(cases), None]
    model = cases[0].base()
    bank = AdapterBank(model, base_digest=PROVENANCE.base_digest)
    for case in cases:
        bank.put(stored(case))
    with bank.serving([case and stored(case).manifest.digest for case in owners]):
        mixed = answer(model, x)
    for row, case in enumerate(owners):
        alone = load(case) if case else cases[0].base()
        cases[0].close(mixed[row : row + 1], answer(alone, x[row : row + 1]))


@each_case
def test_unknown_names_and_failures_leave_nothing(case: Case) -> None:
    model = case.base()
    plain = answer(model, case.x)
    bank = AdapterBank(model, base_digest=PROVENANCE.base_digest)
    expected = answer(model, case.x)
    torch.testing.assert_close(expected, plain)  # the bank's products may round otherwise
    bank.put(stored(case))
    with pytest.raises(AdapterNotFoundError, match="not resident"), bank.serving(["0" * 64] * ROWS):
        pass
    with pytest.raises((IndexError, RuntimeError, ValueError)), bank.serving([stored(case).manifest.digest] * ROWS):
        answer(model, case.x + 10**6 if not case.x.is_floating_point() else case.x[..., :-1])
    assert bank.composition is None
    assert torch.equal(answer(model, case.x), expected)


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_another_base_model_is_refused(case: Case) -> None:
    manifest = stored(case).manifest
    wrong = manifest.modules[0].model_copy(update={"out_features": 7})
    with pytest.raises(ShapeError, match="trained on"):
        load(case, Artifact(manifest.model_copy(update={"modules": (wrong, *manifest.modules[1:])}), {}))
    if manifest.fingerprint:
        probes = {name: [value + 1 for value in values] for name, values in manifest.fingerprint.items()}
        with pytest.raises(FingerprintError, match="expected"):
            load(case, Artifact(manifest.model_copy(update={"fingerprint": probes}), {}))


@pytest.mark.parametrize("method", METHODS)
def test_no_method_ignores_names_of_adapters(method: str) -> None:
    """Stock PEFT's VeRA answers every row with the active adapter, whatever is asked for."""
    case = Case(method, "llama", torch.float32)
    model = copy.deepcopy(load(case))
    with pytest.raises((AdapterNotFoundError, ValueError)):
        answer(model, case.x, adapter_names=["nobody"] * ROWS)
    assert torch.equal(answer(model, case.x), answer(load(case), case.x))
