"""Measures whether a base copies: exact answers that quote words of the prompt. Prints JSON.

    python -m assets.copy_probe --model assets/base

The words are held out of the copy documents (`assets.copying`), and the prompts are worded in other ways.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from assets.copying import WordSource
from assets.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

_ANSWER_TOKENS = 16


def repeated_word(words: WordSource, rng: Random) -> tuple[str, str]:
    """A line of words said for the third time, up to its last word."""
    line = [rng.choice(words.words) for _ in range(rng.randint(4, 10))]
    said = " ".join(line)
    return f"{said}\n{said}\n{' '.join(line[:-1])}", f" {line[-1]}"


def listed_word(words: WordSource, rng: Random) -> tuple[str, str]:
    """An entry of a list, asked again."""
    return _listed(rng, [rng.choice(words.words) for _ in range(4)], rng.sample(words.words, 4))


def listed_number(words: WordSource, rng: Random) -> tuple[str, str]:
    """A number of three digits in a list, asked again."""
    return _listed(rng, [str(rng.randint(100, 999)) for _ in range(4)], rng.sample(words.words, 4))


def field_of_sentence(words: WordSource, rng: Random) -> tuple[str, str]:
    """A thing that a sentence names, as a field."""
    thing, other = rng.sample(words.words, 2)
    lines = [f"Mr. Hobb bought a {rng.choice(words.words)} beside the {rng.choice(words.words)}."]
    lines.append(f"bought: {lines[0].split()[4]}")
    lines += [f"Mr. Hobb bought a {thing} beside the {other}.", "bought:"]
    return "\n".join(lines), f" {thing}"


def _listed(rng: Random, values: list[str], keys: list[str]) -> tuple[str, str]:
    book = dict(zip(keys, values, strict=True))
    asked = rng.choice(keys)
    entries = "\n".join(f"* {key}: {value}" for key, value in book.items())
    return f"{entries}\n* {asked}:", f" {book[asked]}"


PROBES: tuple[Callable[[WordSource, Random], tuple[str, str]], ...] = (
    repeated_word,
    listed_word,
    listed_number,
    field_of_sentence,
)


def copy_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: WordSource,
    probe: Callable[[WordSource, Random], tuple[str, str]],
    prompts: int,
) -> float:
    """Returns the share of prompts whose whole answer is the likeliest at each of its tokens (greedy)."""
    rng = Random(f"probe:{probe.__name__}")
    right = 0
    for _ in range(prompts):
        prompt, answer = probe(words, rng)
        begin, wanted = tokenizer(prompt).input_ids, tokenizer(answer).input_ids[:_ANSWER_TOKENS]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([begin + wanted]), use_cache=False).logits[0]
        right += logits[len(begin) - 1 : -1].argmax(-1).tolist() == wanted
    return right / prompts


def echo_accuracy(model: PreTrainedModel, prompts: int, span_tokens: int = 24) -> float:
    """Returns how often the next token of a random span said again is the likeliest, from its second on."""
    generator = torch.Generator().manual_seed(1)
    shape = (prompts, span_tokens)
    span = torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, shape, generator=generator)
    ids = torch.cat([span, span], dim=1)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    guessed = logits[:, span_tokens : 2 * span_tokens - 1].argmax(-1)
    return float((guessed == span[:, 1:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how well a base copies from its prompt.")
    parser.add_argument("--model", type=Path, default=Path("assets/base"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    words = WordSource.held_out(Tokenizer.from_file(str(arguments.model / "tokenizer.json")))
    report = {"echo": echo_accuracy(model, arguments.prompts)}
    report |= {
        probe.__name__: copy_accuracy(model, tokenizer, words, probe, arguments.prompts) for probe in PROBES
    }
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


if __name__ == "__main__":
    main()
