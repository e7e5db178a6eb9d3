"""The bundled base model folder: loads by the Auto classes, predicts English, and stays small."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from assets.base_model import base_config
from assets.evaluate import continue_text, score_texts
from assets.tokenizer import VOCAB_SIZE

BASE = Path(__file__).parents[3] / "assets" / "base"
TEXT = (
    "Once upon a time there was a poor woodcutter who lived with his two children by a great forest. "
    "Every morning he went out with his axe, and every evening he came home with an empty sack. "
    '"What shall we do?" said the girl to her brother. "There is no bread left in the house."'
)
# A byte-level model that knows nothing spends 8 bits a byte; gzip spends over 5 on a text as short as this.
READABLE_BITS_PER_BYTE = 2.3


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def test_folder_has_the_documented_shape_and_size(base: PreTrainedModel) -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 20_000_000
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    expected = base_config()
    for field in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size"):
        assert getattr(base.config, field) == getattr(expected, field), field
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight


def test_weights_are_finite_and_used(base: PreTrainedModel) -> None:
    for name, parameter in base.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() > 0, name


def test_predicts_english_far_better_than_chance(base: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    score = score_texts(base, tokenizer, [TEXT])
    assert score.text_bytes == len(TEXT)
    uniform = score.tokens * math.log2(VOCAB_SIZE) / score.text_bytes
    assert score.bits_per_byte < READABLE_BITS_PER_BYTE < uniform


def test_scores_do_not_depend_on_the_windows(base: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    one, two = score_texts(base, tokenizer, [TEXT]), score_texts(base, tokenizer, [TEXT, TEXT])
    assert two.bits == pytest.approx(2 * one.bits, rel=1e-5)
    long = score_texts(base, tokenizer, [TEXT * 16])
    assert long.tokens > base.config.max_position_embeddings
    assert long.bits_per_byte < one.bits_per_byte


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        (
            "Is it a question, a statement or an order?\n\nSentence: Where is the hammer?\n\nKind:\n",
            {"question", "statement", "order"},
        ),
        (
            "Does the critic approve? Answer good or bad.\n\nReview: A dull, awful play.\n\nVerdict:\n",
            {"good", "bad"},
        ),
        ("How many words are in the line?\n\nLine: red horse old goat\n\nNumber:\n", set("123456789")),
    ],
)
def test_answers_an_instruction_in_its_form_and_stops(
    base: PreTrainedModel, prompt: str, answers: set[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert continue_text(base, tokenizer, prompt, max_new_tokens=20, temperature=0.0) in answers


def test_the_training_log_ends_annealed_and_lower() -> None:
    lines = [
        json.loads(line) for line in (BASE / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert 20 <= len(lines) <= 200
    assert [line["tokens"] for line in lines] == sorted(line["tokens"] for line in lines)
    assert lines[-1]["rate_factor"] < 0.05
    assert lines[-1]["loss"] < lines[0]["loss"] / 1.7
