"""Measures the bundled base: bits per byte on held-out text, and sample continuations. Prints JSON.

python -m assets.evaluate --corpus CORPUS --model assets/base
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from assets.corpus import read_texts
from assets.tokenizer import MAX_TOKENS

STORY_OPENINGS = (
    "Once upon a time there was a little girl who",
    "The old man looked out of the window and saw",
    '"Where is my hat?" asked the bear.',
)
INSTRUCTIONS = (
    "Write the words in reverse order.\n\nWords: silver wagon tall\n\nReversed:\n",
    "Text: Oscar, aged 31, sells bread in Tollgate.\n\nWrite name and age as JSON.\n",
    "In the forest, Nora found a very golden ring.\nWho found the ring?\n",
    "Which number is larger?\n\nNumbers: 17 and 71\n\nAnswer:\n",
)


@dataclass(frozen=True, slots=True)
class TextScore:
    """How well a model predicts some text: `bits` over `text_bytes` bytes in `tokens` tokens."""

    bits: float
    text_bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.text_bytes


def score_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> TextScore:
    """Sums -log2 p(token) over whole texts, in windows of the model's context that do not overlap.

    As in pretraining, a text begins after the end-of-text token, which itself is not counted.
    """
    bits, text_bytes, tokens = 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text, split_special_tokens=True).input_ids])
        for start in range(0, len(ids) - 1, MAX_TOKENS - 1):
            window = ids[start : start + MAX_TOKENS]
            with torch.inference_mode():
                logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
            nats = torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum")
            bits += float(nats) / math.log(2)
        text_bytes += len(text.encode())
        tokens += len(ids) - 1
    return TextScore(bits, text_bytes, tokens)


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
) -> str:
    """Returns what the model writes after `prompt`; greedy at `temperature` 0, else seeded top-p 0.95."""
    inputs = tokenizer(prompt, return_tensors="pt")
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 0.95}
        if temperature
        else {"do_sample": False}
    )
    torch.manual_seed(1)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    written: str = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the bundled base model.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("assets/base"))
    parser.add_argument(
        "--documents", type=int, default=None, help="held-out documents to score; all by default"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    held_out = read_texts(arguments.corpus / "valid.jsonl.xz")
    score = score_texts(model, tokenizer, islice(held_out, arguments.documents))
    report = {
        "bits_per_byte": round(score.bits_per_byte, 4),
        "loss_nats_per_token": round(score.bits * math.log(2) / score.tokens, 4),
        "tokens": score.tokens,
        "text_bytes": score.text_bytes,
        "stories": {prompt: continue_text(model, tokenizer, prompt, 60, 0.7) for prompt in STORY_OPENINGS},
        "instructions": {prompt: continue_text(model, tokenizer, prompt, 30, 0.0) for prompt in INSTRUCTIONS},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
