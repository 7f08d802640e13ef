"""Training data: files to rows, rows to token ids with labels.

Free of torch, so that a service can validate with it.
"""

from uora.data.formats import ChatDataset, ChatMessage, ChatRow, Problem
from uora.data.masking import IGNORED, Example, check_lengths, encode, encode_dataset
from uora.data.reading import read_chat_file, scan_chat_file
from uora.data.templates import render, template_sha256
from uora.data.validation import row_problems

__all__ = [
    "IGNORED",
    "ChatDataset",
    "ChatMessage",
    "ChatRow",
    "Example",
    "Problem",
    "check_lengths",
    "encode",
    "encode_dataset",
    "read_chat_file",
    "render",
    "row_problems",
    "scan_chat_file",
    "template_sha256",
]
