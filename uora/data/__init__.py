"""Training data: files to rows, rows to what a model takes.

Free of torch, so that a service can validate with it.
"""

from uora.data.completions import encode_completion, prompt_ids
from uora.data.encoding import check_length, encode_rows
from uora.data.fitting import Overlong, fit, fit_length
from uora.data.formats import (
    ChatMessage,
    ChatRow,
    CompletionRow,
    Container,
    Dataset,
    ImageRow,
    Problem,
    Row,
    RowFormat,
    TextRow,
)
from uora.data.images import from_data_url, open_image
from uora.data.labels import Labels, Scale
from uora.data.masking import IGNORED, Example, encode_chat
from uora.data.reading import read_file, scan_file
from uora.data.recognising import detect_task
from uora.data.report import DatasetReport
from uora.data.reporting import MAX_PREVIEWS, Decode, Encode, build_report, check_rows, unreadable_report
from uora.data.templates import render, template_sha256
from uora.data.validation import row_problems

__all__ = [
    "IGNORED",
    "MAX_PREVIEWS",
    "ChatMessage",
    "ChatRow",
    "CompletionRow",
    "Container",
    "Dataset",
    "DatasetReport",
    "Decode",
    "Encode",
    "Example",
    "ImageRow",
    "Labels",
    "Overlong",
    "Problem",
    "Row",
    "RowFormat",
    "Scale",
    "TextRow",
    "build_report",
    "check_length",
    "check_rows",
    "detect_task",
    "encode_chat",
    "encode_completion",
    "encode_rows",
    "fit",
    "fit_length",
    "from_data_url",
    "open_image",
    "prompt_ids",
    "read_file",
    "render",
    "row_problems",
    "scan_file",
    "template_sha256",
    "unreadable_report",
]
