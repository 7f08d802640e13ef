"""Singular factors of base weights: exact, deterministic, cached without trust, recognised by their fingerprint."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from uora import svd
from uora.errors import BaseModelError, FingerprintError, TargetError, UnsupportedLayerError
from uora.frames import check_fingerprint, philox_uniforms
from uora.models import LocalModel
from uora.spec import Task
from uora.svd import BaseWeights, Factors, osora_pair, osora_update

Array = NDArray[np.float64]
sizes = st.integers(1, 90)


def matrix(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def linear(weight: Array) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(torch.from_numpy(weight.astype(np.float32)))
    return layer


def base(*weights: Array, digest: str = "", cache_dir: Path | None = None) -> BaseWeights:
    """Layers named "0", "1", ..."""
    return BaseWeights.of_model(nn.Sequential(*map(linear, weights)), digest, cache_dir)


def factors_of(weight: Array, r: int) -> Factors:
    return base(weight).factors("0", r)


def exact(factors: Factors) -> tuple[Array, Array, Array]:
    return factors.u.double().numpy(), factors.s.double().numpy(), factors.v.double().numpy()


def assert_same(found: Factors, expected: Factors) -> None:
    for name in ("u", "s", "v"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@settings(deadline=None)
@given(sizes, sizes, st.integers(1, 100))
def test_top_singular_triplets(rows: int, columns: int, r: int) -> None:
    weight = matrix(rows, columns).astype(np.float32).astype(np.float64)
    u, s, v = exact(factors_of(weight, r))
    assert (u.shape, s.shape, v.shape) == ((rows, r), (r,), (r, columns))
    k = min(r, rows, columns)
    expected = np.linalg.svd(weight, compute_uv=False)
    np.testing.assert_allclose(s, np.pad(expected[:k], (0, r - k)), rtol=1e-6)
    np.testing.assert_allclose(u.T @ u, np.diag(np.arange(r) < k), atol=1e-6)
    np.testing.assert_allclose(v @ v.T, np.diag(np.arange(r) < k), atol=1e-6)
    np.testing.assert_allclose(weight @ v.T, u * s, atol=1e-6 * expected[0])


@pytest.mark.parametrize("shape", [(200, 130), (130, 200), (150, 150)])
@pytest.mark.parametrize("decades", [0, 2, 5, 15])
def test_squaring_is_as_good_as_the_whole_decomposition(shape: tuple[int, int], decades: int) -> None:
    u, _, v = np.linalg.svd(matrix(*shape), full_matrices=False)
    weight = u * 10.0 ** np.linspace(0, -decades, min(shape)) @ v
    wide = weight if shape[0] <= shape[1] else weight.T
    assert (svd._by_squaring(wide, 40) is None) == (decades == 15)  # there it would not be exact
    found_u, found_s, found_v = svd._triplets(weight, 40)
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(found_s, s[:40], rtol=1e-9)
    same = np.abs(np.sum(found_u * u[:, :40], axis=0)) if decades else np.ones(40)  # equal values: any vectors
    np.testing.assert_allclose(same, 1.0, atol=1e-9)
    np.testing.assert_allclose(found_u * found_s @ found_v, weight @ found_v.T @ found_v, atol=1e-9)


def test_directions_that_are_not_there_are_zero() -> None:
    weight = matrix(30, 3) @ matrix(3, 20, seed=1)
    weight[:, 5:] = 0  # exactly: rounding to float32 gives a product of full rank
    weight[:, 3:5] = weight[:, :2]
    u, s, v = exact(factors_of(weight, 8))
    assert (s > 0).tolist() == [True] * 3 + [False] * 5
    assert not u[:, 3:].any()
    assert not v[3:].any()
    assert not any(part.any() for part in exact(factors_of(np.zeros((4, 6)), 2)))


def test_signs_are_fixed() -> None:
    weight = matrix(40, 30)
    found = factors_of(weight, 20)
    nearly = factors_of(weight + 1e-6 * matrix(40, 30, seed=1), 20)
    torch.testing.assert_close(nearly.u, found.u, atol=1e-3, rtol=0)
    torch.testing.assert_close(nearly.v, found.v, atol=1e-3, rtol=0)
    torch.testing.assert_close(factors_of(-weight, 20).u, found.u)
    torch.testing.assert_close(factors_of(-weight, 20).v, -found.v)


def test_smaller_ranks_are_the_first_of_larger_ones() -> None:
    weights = base(matrix(200, 180))
    large = weights.factors("0", 64)
    for r in (1, 8, 63):
        small = weights.factors("0", r)
        assert_same(small, Factors(large.u[:, :r], large.s[:r], large.v[:r]))
    other = weights.factors("0", 65)  # stored apart
    torch.testing.assert_close(other.u[:, :64], large.u, atol=1e-6, rtol=0)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_same_from_another_process_and_thread_count(threads: str, tmp_path: Path) -> None:
    weight = matrix(300, 200)
    np.save(tmp_path / "weight.npy", weight.astype(np.float32))
    code = (
        "import sys, numpy as np, torch; from torch import nn; from uora.svd import BaseWeights;"
        "layer = nn.Linear(200, 300, bias=False); layer.weight.data = torch.from_numpy(np.load(sys.argv[1]));"
        "found = BaseWeights.of_model(nn.Sequential(layer)).factors('0', 32);"
        "np.savez(sys.argv[2], u=found.u, s=found.s, v=found.v)"
    )
    env = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    files = [str(tmp_path / "weight.npy"), str(tmp_path / "found.npz")]
    subprocess.run([sys.executable, "-c", code, *files], env=env, check=True)
    found, expected = np.load(files[1]), factors_of(weight, 32)
    for name in ("u", "s", "v"):
        # One step of float32 where rounding in float64 tipped it over.
        np.testing.assert_allclose(found[name], getattr(expected, name), rtol=2e-7, atol=1e-12)


def test_weights_that_are_not_numbers_are_refused() -> None:
    weight = matrix(4, 4)
    weight[1, 2] = np.nan
    with pytest.raises(BaseModelError, match="weight of 0 holds NaN"):
        factors_of(weight, 2)


# The cache.


def unreadable() -> nn.Module:
    raise AssertionError("the weights were not to be read")


def test_cache_is_read_without_the_weights(tmp_path: Path) -> None:
    fresh = base(matrix(40, 30), digest="d", cache_dir=tmp_path).factors("0", 8)
    cached = BaseWeights("d", unreadable, tmp_path)
    assert_same(cached.factors("0", 8), fresh)
    assert cached.factors("0", 20).u.shape == (40, 20)  # of one file
    assert [path.suffix for path in (tmp_path / "svd" / "d").iterdir()] == [".safetensors"]
    with pytest.raises(AssertionError):
        BaseWeights("another", unreadable, tmp_path).factors("0", 8)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path) -> None:
    weight = matrix(40, 30)
    fresh = base(weight, digest="d", cache_dir=tmp_path).factors("0", 8)
    (path,) = (tmp_path / "svd" / "d").iterdir()
    sound = path.read_bytes()
    damaged = {"flip": sound[:-1] + bytes([sound[-1] ^ 1]), "cut": sound[:-100], "empty": b""}[damage]
    path.write_bytes(damaged)
    assert_same(base(weight, digest="d", cache_dir=tmp_path).factors("0", 8), fresh)
    assert path.read_bytes() == sound


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        base(matrix(4, 4), digest="d", cache_dir=tmp_path).factors("0", 2)
    assert not list((tmp_path / "svd" / "d").iterdir())


def test_only_exact_weights_with_a_digest_are_cached(tmp_path: Path) -> None:
    weight = matrix(40, 30)
    base(weight, cache_dir=tmp_path).factors("0", 8)
    rounded = nn.Sequential(linear(weight)).to(torch.bfloat16)
    own = BaseWeights.of_model(rounded, "d", tmp_path).factors("0", 8)
    assert not (tmp_path / "svd").exists()
    exact = base(weight, digest="d", cache_dir=tmp_path).factors("0", 8)
    assert_same(BaseWeights.of_model(rounded, "d", tmp_path).factors("0", 8), exact)
    assert not torch.equal(own.u, exact.u)


def test_factors_are_kept_in_memory() -> None:
    weights = base(*[matrix(6, 5, seed) for seed in range(2)])
    first = weights.factors("0", 2)
    assert weights.all_factors(["0", "1"], 2)["0"] is first
    assert weights.factors("0", 2) is first


# The fingerprint.


def test_fingerprint_tells_other_weights_apart() -> None:
    names = [f"{i}" for i in range(10)]
    weights = [matrix(30, 20, seed) for seed in range(10)]
    mine = base(*weights).fingerprint(names, 8)
    check_fingerprint(mine, base(*weights).fingerprint(names, 8))
    swapped = [weights[1], weights[0], *weights[2:]]
    scaled = [weights[0] * 1.01, *weights[1:]]
    rounded = [w if i else w.astype(np.float16) for i, w in enumerate(weights)]
    for other in (swapped, scaled, rounded):
        with pytest.raises(FingerprintError, match=r"svd:0: found probes .* expected"):
            check_fingerprint(mine, base(*other).fingerprint(names, 8))
    with pytest.raises(FingerprintError):
        check_fingerprint(mine, base(*weights).fingerprint(names, 9))


def test_fingerprint_adds_up_layers_of_one_kind() -> None:
    model = nn.ModuleDict({f"h{i}": nn.ModuleDict({"q": linear(matrix(9, 8, i))}) for i in range(3)})
    found = BaseWeights.of_model(model).fingerprint(["h0.q", "h1.q", "h2.q"], 4)
    assert list(found) == ["svd:q"]
    one_wrong = copy.deepcopy(model)
    one_wrong["h1"]["q"].weight.data += 1e-2
    with pytest.raises(FingerprintError):
        check_fingerprint(found, BaseWeights.of_model(one_wrong).fingerprint(["h0.q", "h1.q", "h2.q"], 4))


def test_fingerprint_sees_turned_vectors_of_equal_singular_values() -> None:
    def probe(turned: bool) -> Array:
        u = np.eye(4)[:, :2]
        if turned:
            u = u @ np.array([[0.6, -0.8], [0.8, 0.6]])
        parts = (torch.from_numpy(part.astype(np.float32)) for part in (u, np.ones(2), np.ascontiguousarray(u.T)))
        return svd._probe("layer", Factors(*parts))

    assert np.abs(probe(turned=True) - probe(turned=False)).max() > 1e-2


def test_pinned_fingerprint() -> None:
    # Written by the first release: a change here orphans every stored adapter of this method.
    weight = philox_uniforms("a weight", 300 * 200).reshape(300, 200) - 0.5
    check_fingerprint(
        {"svd:0": [-4.839773, -4.120657, -0.194445, -2.515622, 3.535822]}, base(weight).fingerprint(["0"], 16)
    )


# Where the weights come from.


def test_weights_are_out_by_in_whatever_the_layer() -> None:
    conv = Conv1D(5, 3)  # 3 inputs, 5 outputs
    weights = BaseWeights.of_model(nn.Sequential(conv, nn.Linear(4, 6).to(torch.bfloat16)))
    assert torch.equal(weights.weight("0"), conv.weight.T)
    assert weights.weight("1").shape == (6, 4)
    assert weights.weight("1").dtype is torch.float32


class _Banked(nn.Module):
    """A wrapper as serving puts around every layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def test_weights_of_wrapped_layers() -> None:
    layer = linear(matrix(6, 5))
    model = get_peft_model(nn.Sequential(_Banked(layer)), LoraConfig(target_modules=["0.base_layer"]))
    weights = BaseWeights.of_model(model)
    assert torch.equal(weights.weight("0"), layer.weight)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge first"):
        weights.weight("0")


def test_modules_that_have_no_weight_to_factorise() -> None:
    weights = BaseWeights.of_model(nn.Sequential(nn.Embedding(3, 3)))
    with pytest.raises(UnsupportedLayerError, match="0 is a Embedding"):
        weights.factors("0", 1)
    with pytest.raises(TargetError, match="no module 7"):
        weights.factors("7", 1)


def test_a_source_is_opened_once_for_many_and_freed() -> None:
    opened: list[weakref.ref[nn.Module]] = []

    def load() -> nn.Module:
        model = nn.Sequential(*[linear(matrix(4, 4, seed)) for seed in range(3)])
        opened.append(weakref.ref(model))
        return model

    weights = BaseWeights("", load)
    weights.all_factors(["0", "1", "2"], 2)
    assert [name for name, _ in weights.weights(["0", "2"])] == ["0", "2"]
    gc.collect()
    assert [model() for model in opened] == [None, None]


@pytest.mark.parametrize("task", ["chat", "classification"])
def test_a_local_model_is_read_exactly_and_only_once(task: Task, tiny_base: LocalModel, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    weights = BaseWeights.of_local(tiny_base, task, tmp_path)
    with safe_open(tiny_base.directory / "model.safetensors", framework="pt") as stored:
        assert torch.equal(weights.weight(name), stored.get_tensor(f"{name}.weight").float())
    fresh = weights.factors(name, 4)
    gone = replace(tiny_base, directory=tmp_path / "gone")
    assert_same(BaseWeights.of_local(gone, task, tmp_path).factors(name, 4), fresh)
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        BaseWeights.of_local(gone, task, tmp_path).factors("model.layers.1.mlp.down_proj", 4)


def test_a_copied_model_reads_its_own_weights() -> None:
    model = nn.Sequential(linear(matrix(4, 4)))
    weights = BaseWeights.of_model(model)
    both: dict[str, object] = {"model": model, "weights": weights}
    twin = copy.deepcopy(both)
    model[0].weight.data.zero_()
    assert twin["weights"].weight("0").any()  # type: ignore[attr-defined]
    assert copy.deepcopy(weights) is weights


# The update.


def vectors(out: int, r: int, rows: int | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = () if rows is None else (rows,)
    return 1 + torch.randn(*shape, out, generator=generator) / 3, 5 + torch.randn(*shape, r, generator=generator)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 25))
def test_the_pair_is_the_update(out: int, size_in: int, r: int) -> None:
    factors = factors_of(matrix(out, size_in), r)
    o, s = vectors(out, r)
    a, b = osora_pair(factors, o.numpy(), s.numpy())
    assert (a.shape, b.shape) == ((2 * r, size_in), (out, 2 * r))
    assert a.dtype == b.dtype == np.float32
    u, start, v = exact(factors)
    expected = o.double().numpy()[:, None] * u * s.double().numpy() @ v - u * start @ v
    np.testing.assert_allclose(b.astype(np.float64) @ a, expected, atol=1e-5)
    x = torch.from_numpy(matrix(3, size_in).astype(np.float32))
    np.testing.assert_allclose(osora_update(x, factors, o, s), x.double().numpy() @ expected.T, atol=1e-4)


@pytest.mark.parametrize("middle", [(), (7,), (2, 3)])
def test_rows_of_their_own_vectors(middle: tuple[int, ...]) -> None:
    factors = factors_of(matrix(9, 8), 4)
    o, s = vectors(9, 4, rows=3)
    x = torch.randn(3, *middle, 8, generator=torch.Generator().manual_seed(0))
    mixed = osora_update(x, factors, o, s)
    assert mixed.shape == (3, *middle, 9)
    for row in range(3):
        torch.testing.assert_close(mixed[row], osora_update(x[row], factors, o[row], s[row]))


def test_no_update_at_the_start_not_even_by_rounding() -> None:
    factors = factors_of(matrix(9, 8), 4)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert not osora_update(x, factors, torch.ones(9), factors.s).any()


def test_gradients() -> None:
    factors = factors_of(matrix(5, 4), 3)
    o, s = (vector.double().requires_grad_() for vector in vectors(5, 3))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, o, s: osora_update(x, factors, o, s), (x, o, s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_made_while_serving_can_be_trained_on(dtype: torch.dtype) -> None:
    weights = base(matrix(5, 4))
    o, s = vectors(5, 3)
    x = torch.randn(2, 4).to(dtype)
    with torch.inference_mode():
        osora_update(x, weights.factors("0", 3), o, s)
    x.requires_grad_()
    osora_update(x, weights.factors("0", 3), o.requires_grad_(), s.requires_grad_()).sum().backward()
    assert all(tensor.grad is not None for tensor in (x, o, s))
