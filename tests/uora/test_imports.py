"""A module that is put off is there for whoever asks, and is imported for whoever uses it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from uora.imports import PutOff, put_off


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package, which says when it is imported."""
    package = tmp_path / "uora_test_heavy"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\nsys.uora_test_heavy_imported += 1\nfrom . import part\nanswer = 42\n"
    )
    (package / "part.py").write_text("piece = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "uora_test_heavy_imported", 0, raising=False)
    for name in (package.name, f"{package.name}.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return package.name


def imported() -> int:
    return sys.uora_test_heavy_imported  # type: ignore[attr-defined, no-any-return]


def test_asking_whether_it_is_installed_imports_nothing(heavy: str) -> None:
    put_off(heavy)
    assert find_spec(heavy) is not None
    import_module(heavy)
    assert imported() == 0


def test_it_is_imported_once_when_it_is_used(heavy: str) -> None:
    put_off(heavy)
    module = import_module(heavy)
    assert (module.answer, module.part.piece) == (42, 1)
    assert imported() == 1
    assert not isinstance(sys.modules[heavy], PutOff)
    assert import_module(heavy).answer == 42
    assert imported() == 1


def test_a_module_of_the_package_can_be_imported_first(heavy: str) -> None:
    put_off(heavy)
    assert import_module(f"{heavy}.part").piece == 1
    assert imported() == 1


def test_what_it_does_not_have_is_an_attribute_error(heavy: str) -> None:
    put_off(heavy)
    with pytest.raises(AttributeError, match="nothing_like_that"):
        import_module(heavy).nothing_like_that  # noqa: B018


def test_one_that_was_imported_stays(heavy: str) -> None:
    before = import_module(heavy)
    put_off(heavy)
    assert sys.modules[heavy] is before


def test_one_that_is_not_installed_is_still_missing() -> None:
    put_off("uora_test_missing")
    with pytest.raises(ModuleNotFoundError):
        import_module("uora_test_missing")


def test_looking_through_all_modules_imports_nothing(heavy: str) -> None:
    """``inspect.getmodule`` does, while torch is imported."""
    put_off(heavy)
    for module in list(sys.modules.values()):
        hasattr(module, "__file__")
    assert imported() == 0
