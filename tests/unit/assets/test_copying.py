"""Learning to copy: the documents, the guidance of attention, and the probe."""

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from assets.copy_probe import PROBES, copy_accuracy, echo_accuracy
from assets.copying import KINDS, CopyKind, WordSource, copy_documents, is_held_out
from assets.demo_tasks import DEMO_TASKS, draw_rows
from assets.demo_words import DEMO_WORDS
from assets.guidance import followers_of_same, guidance_loss, induction_loss, previous_loss

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


def test_followers_are_what_came_after_the_same_token() -> None:
    followers = followers_of_same(torch.tensor([[5, 6, 5, 7, 5, 6]]))[0]
    assert followers.nonzero().tolist() == [[2, 1], [4, 1], [4, 3], [5, 2]]


def test_guidance_is_lowest_where_the_heads_look_right() -> None:
    ids = torch.tensor([[5, 6, 7, 5, 6, 7]])
    right = torch.zeros(1, 8, 6, 6)
    right[:, :, torch.arange(1, 6), torch.arange(5)] = 1.0
    assert previous_loss(right) == pytest.approx(0.0, abs=1e-4)
    followers = followers_of_same(ids).float()
    assert induction_loss(ids, followers[:, None].expand(1, 8, 6, 6)) == pytest.approx(0.0, abs=1e-4)
    uniform = torch.full((1, 8, 6, 6), 1 / 6)
    assert previous_loss(uniform) > 1
    assert induction_loss(ids, uniform) > 1
    assert induction_loss(torch.tensor([[5, 6, 7, 8, 9, 10]]), uniform) == 0


def test_guidance_turns_attention_within_a_few_steps() -> None:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(40):
        span = torch.randint(6, 32, (16, 8), generator=generator)
        ids = torch.cat([span, span], dim=1)
        loss = guidance_loss(ids, model(input_ids=ids, output_attentions=True).attentions)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


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
