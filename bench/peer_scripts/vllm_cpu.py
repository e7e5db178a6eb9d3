"""Run by `bench.peers` in an environment of its own: vLLM on a CPU, one batch for each line read.

    python vllm_cpu.py BASE THREADS ADAPTER...

Each line of standard input is JSON: prompts (token ids), tokens, adapters (an index or null for each prompt).
Each answer is a line of JSON with the seconds it took.
"""

import json
import os
import sys
import time

base, threads, *adapters = sys.argv[1:]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["OMP_NUM_THREADS"] = threads
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm import LLM, SamplingParams  # noqa: E402 - the environment comes first
from vllm.lora.request import LoRARequest  # noqa: E402


def main() -> None:
    """Load the model once, with LoRA only where adapters are named, and answer."""
    lora = {}
    if adapters:
        lora = {
            "enable_lora": True,
            "max_loras": len(adapters),
            "max_cpu_loras": len(adapters),
            "max_lora_rank": 16,
        }
    model = LLM(
        base,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        enable_prefix_caching=False,
        **lora,
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        sampling = SamplingParams(
            temperature=0.0, max_tokens=order["tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
        loras = [
            None if index is None else LoRARequest(f"a{index}", index + 1, adapters[index])
            for index in order["adapters"]
        ]
        started = time.perf_counter()
        outputs = model.generate(prompts, sampling, lora_request=loras if adapters else None, use_tqdm=False)
        spent = time.perf_counter() - started
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": spent, "tokens": made}), flush=True)


if __name__ == "__main__":
    main()
