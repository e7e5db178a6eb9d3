"""Learning to copy: the documents and the probe."""

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets.copy_probe import PROBES, copy_accuracy, echo_accuracy
from assets.copying import KINDS, CopyKind, WordSource, copy_documents, is_held_out
from assets.demo_tasks import DEMO_TASKS, draw_rows
from assets.demo_words import DEMO_WORDS

BASE = Path(__file__).parents[3] / "assets" / "base"
WORD = re.compile(r"[a-z]{3,}")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


def test_same_seed_same_documents(tokenizer: Tokenizer) -> None:
    words = WordSource.training(tokenizer)
    first, again = list(copy_documents(words, 300, 3)), list(copy_documents(words, 300, 3))
    assert first == again
    assert first != list(copy_documents(words, 300, 4))
    assert len(set(first)) > 295


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS], ids=lambda kind: kind.__name__)
def test_documents_quote_themselves(kind: CopyKind, tokenizer: Tokenizer) -> None:
    words, rng, repeated, total = WordSource.training(tokenizer), Random(1), 0, 0
    for _ in range(200):
        found = re.findall(r"\w+", kind(words, rng))
        seen: set[str] = set()
        for word in found:
            repeated += word in seen
            seen.add(word)
        total += len(found)
    assert repeated / total > 0.2


def test_held_out_words_and_the_demo_stay_unseen(tokenizer: Tokenizer) -> None:
    training, held_out = WordSource.training(tokenizer), WordSource.held_out(tokenizer)
    assert not set(training.words) & set(held_out.words)
    assert len(held_out.words) > 100
    assert not DEMO_WORDS & {*training.words, *held_out.words}
    text = "\n".join(copy_documents(training, 2000, 1)).lower()
    found = set(WORD.findall(text))
    # The wordings around them and made-up syllables hold a few by chance.
    assert sum(word in found for word in held_out.words) < 0.2 * len(held_out.words)
    assert all(is_held_out(word) for word in held_out.words)
    lines = set(text.splitlines())
    for task in DEMO_TASKS:
        assert task.instruction.lower() not in text
        assert not {row["completion"].lower() for row in draw_rows(task, seed=7)} & lines, task.name


def test_objects_in_documents_parse(tokenizer: Tokenizer) -> None:
    texts = copy_documents(WordSource.training(tokenizer), 2000, 2)
    objects = [line for text in texts for line in text.splitlines() if re.fullmatch(r"\{.+\}", line)]
    assert len(objects) > 200
    for line in objects:
        json.loads(line)


def test_the_probe_tells_a_copying_model_from_the_base(tokenizer: Tokenizer) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    words = WordSource.held_out(tokenizer)
    auto = AutoTokenizer.from_pretrained(BASE)
    for probe in PROBES:
        prompt, answer = probe(words, Random(1))
        assert answer.strip() in prompt
        assert 0.0 <= copy_accuracy(model, auto, words, probe, 4) <= 1.0
    assert 0.0 <= echo_accuracy(model, 4) <= 1.0
