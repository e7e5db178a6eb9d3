"""`python -m services.inference`: settings from the environment, then serve."""

import asyncio
import sys

from services.common.config import load
from services.inference.settings import InferenceSettings

if __name__ == "__main__":
    settings = load(InferenceSettings)
    # Imported here: it brings torch and transformers, for which bad settings need not wait.
    from services.inference.service import run

    sys.exit(asyncio.run(run(settings)))
