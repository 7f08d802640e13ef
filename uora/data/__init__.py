"""Training data: files to rows, rows to what a model takes.

Free of torch, so that a service can validate with it.
"""

from uora.data.completions import encode_completion, prompt_ids
from uora.data.encoding import check_length, encode_rows
from uora.data.formats import (
    ChatMessage,
    ChatRow,
    CompletionRow,
    Dataset,
    ImageRow,
    Problem,
    Row,
    TextRow,
)
from uora.data.images import from_data_url, open_image
from uora.data.labels import Labels, Scale
from uora.data.masking import IGNORED, Example, encode_chat
from uora.data.reading import read_file, scan_file
from uora.data.templates import render, template_sha256
from uora.data.validation import row_problems

__all__ = [
    "IGNORED",
    "ChatMessage",
    "ChatRow",
    "CompletionRow",
    "Dataset",
    "Example",
    "ImageRow",
    "Labels",
    "Problem",
    "Row",
    "Scale",
    "TextRow",
    "check_length",
    "encode_chat",
    "encode_completion",
    "encode_rows",
    "from_data_url",
    "open_image",
    "prompt_ids",
    "read_file",
    "render",
    "row_problems",
    "scan_file",
    "template_sha256",
]
