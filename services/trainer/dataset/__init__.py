"""Training files: read line by line, every bad line named."""

from services.trainer.dataset.faults import FaultList, LineError
from services.trainer.dataset.reader import Dataset, read_dataset
from services.trainer.dataset.rows import ConversationRow, PromptRow, Row, Schema

__all__ = [
    "ConversationRow",
    "Dataset",
    "FaultList",
    "LineError",
    "PromptRow",
    "Row",
    "Schema",
    "read_dataset",
]
