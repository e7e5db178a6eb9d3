"""Training files: read line by line, every bad line named."""

from services.trainer.dataset.faults import FaultList, LineError
from services.trainer.dataset.reader import DatasetReader, read_row
from services.trainer.dataset.rows import ConversationRow, InstructionRow, PromptRow, Row, TextRow
from services.trainer.dataset.schemas import Schema

__all__ = [
    "ConversationRow",
    "DatasetReader",
    "FaultList",
    "InstructionRow",
    "LineError",
    "PromptRow",
    "Row",
    "Schema",
    "TextRow",
    "read_row",
]
