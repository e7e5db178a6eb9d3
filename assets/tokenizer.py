"""Trains the bundled byte-level BPE tokenizer and writes it as a transformers folder.

A text is cut at every line break and at every digit before the byte-level split, so that a prompt that ends
with a line break has the same tokens whether or not a completion follows it, and numbers are read digit by
digit. Nothing is added on encoding: no token at the start, none at the end.

    python -m assets.tokenizer --corpus CORPUS --out assets/base
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from assets.corpus import read_parts
from assets.instructions import InstructionGenerator

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END_OF_TURN = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END_OF_TURN)
MAX_TOKENS = 1024

# The first k messages render to a prefix of the first k + 1, so that a cached conversation stays valid.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '<|system|>' + message['content'] + '<|end|>' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<|user|>' + message['content'] + '<|end|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] + eos_token -}}"
    "{%- else -%}{{- raise_exception('role must be system, user or assistant, not ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learns a byte-level BPE of `VOCAB_SIZE` tokens; ids 0..5 are `SPECIAL_TOKENS` in their order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` for `AutoTokenizer.from_pretrained(folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "bos_token": None,
        "unk_token": None,
        "extra_special_tokens": [SYSTEM, USER, ASSISTANT, END_OF_TURN],
        "model_max_length": MAX_TOKENS,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def training_texts(corpus: Path, seed: int) -> Iterator[str]:
    """Yields what the vocabulary is learnt from: children's texts, easy fiction and instructions."""
    yield from read_parts(corpus, ["children-00", "children-01", "fiction-00"])
    yield from islice(InstructionGenerator(seed).plain_documents(), 40_000)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled tokenizer.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write_tokenizer(train_tokenizer(training_texts(arguments.corpus, arguments.seed)), arguments.out)


if __name__ == "__main__":
    main()
