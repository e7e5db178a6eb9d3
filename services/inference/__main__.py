"""`python -m services.inference`: settings from the environment, then serve."""

import asyncio
import sys

from services.common.config import load
from services.inference.service import run
from services.inference.settings import InferenceSettings

if __name__ == "__main__":
    sys.exit(asyncio.run(run(load(InferenceSettings))))
