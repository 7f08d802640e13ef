"""Errors of the core, without HTTP.

```
UoraError                     code, param: stable names a service can pass on
  ├── SpecError               a method, rank or hyperparameter that cannot be used
  │     ├── UnknownMethodError    none of the methods that there are
  │     ├── RankError             below 1, or more than memory allows
  │     ├── TargetError           targets that name no module of the base model
  │     └── UnsupportedLayerError a target, or a base model, whose layers are of another kind
  ├── SamplingError           options of an answer that cannot be used
  │     └── SchemaError           a JSON schema that answers cannot be kept to
  ├── GenerationError         an answer that cannot be gone on with
  │     └── DeadlineError         an answer that was not complete in time
  ├── DataError               a data set that cannot be trained on; names the place
  ├── BaseModelError          an unknown, unreachable or damaged base model
  ├── AdapterNotFoundError    a row asks for an adapter that is not loaded
  ├── StateError              the state of a run that cannot be gone on from
  ├── OutOfMemory             a training that needs more memory than there is
  ├── ExportError             an export that cannot be made, or not where it should go
  └── ArtifactError           a stored adapter that must not be served
        ├── FormatError           not an adapter
        │     └── NewerFormatError  an adapter of a newer format version
        ├── DigestError           a byte has changed since it was written
        ├── ShapeError            the tensors do not fit the manifest or the model
        ├── NonFiniteError        the tensors hold NaN or infinity
        └── FingerprintError      the frames built here are not those it was trained on
```
Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations


class UoraError(Exception):
    """Base of all errors raised on purpose by ``uora``."""

    code = "uora_error"
    #: What the error is about when its raiser does not say.
    default_param: str | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param or type(self).default_param


class SpecError(UoraError):
    """A method, rank, target or hyperparameter that cannot be used."""

    code = "invalid_hyperparameters"


class UnknownMethodError(SpecError):
    """A method that is none of those there are."""

    code = "unknown_method"
    default_param = "method"


class RankError(SpecError):
    """A rank below 1, or one that memory does not allow."""

    code = "invalid_rank"
    default_param = "r"


class TargetError(SpecError):
    """Targets that name no module of the base model."""

    code = "targets_not_found"
    default_param = "targets"


class UnsupportedLayerError(SpecError):
    """A target, or a base model, whose layers are of a kind that is not adapted."""

    code = "unsupported_layer"
    default_param = "targets"


class SamplingError(UoraError):
    """Options of an answer that cannot be used."""

    code = "invalid_sampling"


class SchemaError(SamplingError):
    """A JSON schema that answers cannot be kept to: invalid, too large, or of keywords that are not supported."""

    code = "invalid_json_schema"
    default_param = "response_format"


class GenerationError(UoraError):
    """An answer that cannot be gone on with. The others of its batch go on."""

    code = "generation_failed"


class DeadlineError(GenerationError):
    """An answer that was not complete in the time that its request gave it."""

    code = "deadline_exceeded"


class DataError(UoraError):
    """A data set that cannot be trained on.

    Attributes:
        line: the line, or the number of the row where the file has no lines, from 1; None for the whole file.
        location: the same in words, ``Line 3`` unless the file has other places, such as ``Row 3`` or ``File a.png``.
    """

    code = "invalid_training_file"

    def __init__(
        self,
        message: str,
        *,
        line: int | None = None,
        location: str | None = None,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        self.line = line
        self.location = location or (f"Line {line}" if line else None)
        super().__init__(f"{self.location}: {message}" if self.location else message, code=code, param=param)


class BaseModelError(UoraError):
    """An unknown, unreachable or damaged base model."""

    code = "base_model_unavailable"


class AdapterNotFoundError(UoraError):
    """A row asks for an adapter that is not loaded. It is never answered by the base model instead."""

    code = "adapter_not_found"


class StateError(UoraError):
    """The state of a run that cannot be gone on from: damaged, or of another run."""

    code = "invalid_training_state"


class OutOfMemory(UoraError):
    """A training that needs more memory than there is."""

    code = "out_of_memory"


class ExportError(UoraError):
    """An export that cannot be made, or not where it should go."""

    code = "export_failed"


class ArtifactError(UoraError):
    """A stored adapter that must not be served."""

    code = "invalid_adapter"


class FormatError(ArtifactError):
    """The bytes are no adapter."""

    code = "adapter_format"


class NewerFormatError(FormatError):
    """An adapter of a format version that this release does not read."""

    code = "adapter_format_newer"


class DigestError(ArtifactError):
    """The content is not what its digest says: a byte has changed since it was written."""

    code = "adapter_digest_mismatch"


class ShapeError(ArtifactError):
    """The tensors do not fit the manifest, or the manifest does not fit the model."""

    code = "adapter_shape_mismatch"


class NonFiniteError(ArtifactError):
    """The tensors hold NaN or infinity."""

    code = "adapter_not_finite"


class FingerprintError(ArtifactError):
    """The frames built on this machine are not those that the adapter was trained on."""

    code = "frame_fingerprint_mismatch"
