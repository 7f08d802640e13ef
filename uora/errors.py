"""Errors of the core, without HTTP.

```
UoraError                     code, param: stable names a service can pass on
  ├── SpecError               a method, rank or hyperparameter that cannot be used
  ├── DataError               a data set that cannot be trained on; names its line
  ├── BaseModelError          an unknown, unreachable or damaged base model
  ├── AdapterNotFoundError    a row asks for an adapter that is not loaded
  └── ArtifactError           a stored adapter that must not be served
        ├── FormatError           not an adapter, or of a newer format
        ├── DigestError           a byte has changed since it was written
        ├── ShapeError            the tensors do not fit the manifest or the model
        └── FingerprintError      the frames built here are not those it was trained on
```
Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations


class UoraError(Exception):
    """Base of all errors raised on purpose by ``uora``."""

    code = "uora_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param


class SpecError(UoraError):
    """A method, rank, target or hyperparameter that cannot be used."""

    code = "invalid_hyperparameters"


class DataError(UoraError):
    """A data set that cannot be trained on. ``line`` counts from 1; None if it concerns the whole file."""

    code = "invalid_training_file"

    def __init__(
        self, message: str, *, line: int | None = None, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(f"Line {line}: {message}" if line else message, code=code, param=param)
        self.line = line


class BaseModelError(UoraError):
    """An unknown, unreachable or damaged base model."""

    code = "base_model_unavailable"


class AdapterNotFoundError(UoraError):
    """A row asks for an adapter that is not loaded. It is never answered by the base model instead."""

    code = "adapter_not_found"


class ArtifactError(UoraError):
    """A stored adapter that must not be served."""

    code = "invalid_adapter"


class FormatError(ArtifactError):
    """The bytes are no adapter, or one of a newer format version."""

    code = "adapter_format"


class DigestError(ArtifactError):
    """The content is not what its digest says: a byte has changed since it was written."""

    code = "adapter_digest_mismatch"


class ShapeError(ArtifactError):
    """The tensors do not fit the manifest, or the manifest does not fit the model."""

    code = "adapter_shape_mismatch"


class FingerprintError(ArtifactError):
    """The frames built on this machine are not those that the adapter was trained on."""

    code = "frame_fingerprint_mismatch"
