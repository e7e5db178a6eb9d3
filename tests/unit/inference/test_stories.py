"""A real pretrained Llama, where its folder is at hand: the same greedy text as transformers gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.engines import FolderFetcher, Reference, make_engine, request, run_all, text_of, tokens_of
from tests.support.models import ALL_LINEAR_TARGETS, make_peft_adapter

ROOT = Path(__file__).parents[3]
STORIES = Path(os.environ.get("LORAFLEET_SHARED", ROOT.parent / "shared")) / "models" / "stories260K"
PROMPTS = ("Once upon a time", "The little dog", "Lily and Tom went to the park. They")
MAX_TOKENS = 60

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K folder is not here")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_pretrained_model_tells_the_same_stories(quantization: str, tmp_path: Path) -> None:
    adapters = {
        "a": make_peft_adapter(STORIES, tmp_path / "a", r=4, targets=ALL_LINEAR_TARGETS, lora_alpha=1)
    }
    reference = Reference(STORIES, adapters, nf4=quantization == "nf4")
    tokenizer = AutoTokenizer.from_pretrained(STORIES, local_files_only=True)
    engine = make_engine(STORIES, tmp_path / "cache", FolderFetcher(adapters), quantization=quantization)
    work = [
        (f"{i}-{adapter}", prompt, adapter) for i, prompt in enumerate(PROMPTS) for adapter in (None, "a")
    ]
    for name, prompt, adapter in work:
        engine.add(request(name, tokenizer(prompt)["input_ids"], adapter, max_tokens=MAX_TOKENS))
    events = run_all(engine)
    stories = {}
    for name, prompt, adapter in work:
        ids = tokenizer(prompt)["input_ids"]
        expected = reference.generate(ids, adapter, MAX_TOKENS)
        assert tokens_of(events[name]) == expected
        whole = tokenizer.decode(ids + expected, skip_special_tokens=True)
        assert text_of(events[name]) == whole[len(tokenizer.decode(ids, skip_special_tokens=True)) :]
        stories[name] = text_of(events[name])
    assert stories["0-None"] != stories["0-a"]
    assert "there was" in stories["0-None"]
    engine.adapters.close()
