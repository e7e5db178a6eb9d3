"""What the lm-evaluation-harness measures by `local-completions`; runs in an environment of its own.

The tasks are those of a folder, over local rows: one of choices (by log-likelihoods, that is echo with
log-probabilities) and one of answers that are generated.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import lm_eval  # type: ignore[import-not-found]
from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]


def main() -> None:
    """Evaluate and print figures and answers."""
    place = json.loads(sys.argv[1])
    os.environ["OPENAI_API_KEY"] = place["key"]
    arguments = {
        "model": place["adapter"],
        "base_url": f"{place['base_url']}/completions",
        "tokenizer": place["base_path"],
        "num_concurrent": 2,
        "max_length": 256,
    }
    done = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["pairs_choice", "pairs_generated"],
        task_manager=TaskManager(include_path=place["tasks"], include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert done is not None
    json.dump({"results": done["results"], "samples": shown(done["samples"])}, sys.stdout, default=str)


def shown(samples: dict[str, Any]) -> dict[str, Any]:
    """Return the answers by task and row."""
    return {
        task: [{"doc": sample["doc"], "answers": sample["filtered_resps"]} for sample in of_task]
        for task, of_task in samples.items()
    }


if __name__ == "__main__":
    main()
