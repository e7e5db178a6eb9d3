"""Documents that say the same thing again, so that a small model learns to copy from its context early.

Copying is what most answers of small tasks need, and it is learnt late from stories alone; repeated spans
give the attention pattern behind it (Olsson et al. 2022, In-context Learning and Induction Heads) a strong
signal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assets.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

Tokens = npt.NDArray[np.uint16]

_SPAN_TOKENS = (4, 40)
_TIMES = (2, 5)
_PAIRS = (2, 8)
_RECALLS = 12


def echo_documents(source: Tokens, newline_id: int, document_count: int, seed: int) -> Tokens:
    """Returns `document_count` packed documents, each ended by the end-of-text token (id 0).

    Two in three are a span of 4 to 40 tokens said 2 to 5 times. Half of the spans are cut from `source`, half
    are tokens drawn at random (no special ones); in half of the documents a line break parts the repetitions.
    The third are pairs of random tokens, said again in any order (associative recall).
    """
    rng = np.random.default_rng(seed)
    documents: list[Tokens] = []
    for _ in range(document_count):
        if rng.random() < 1 / 3:
            documents.append(np.append(_recalled_pairs(rng), np.uint16(0)))
            continue
        length = int(rng.integers(*_SPAN_TOKENS, endpoint=True))
        if rng.random() < 0.5:
            start = int(rng.integers(len(source) - length))
            span = source[start : start + length]
            span = span[span >= len(SPECIAL_TOKENS)]
        else:
            span = rng.integers(len(SPECIAL_TOKENS), VOCAB_SIZE, size=length).astype(np.uint16)
        if rng.random() < 0.5:
            span = np.append(span, np.uint16(newline_id))
        repeated = np.tile(span, int(rng.integers(*_TIMES, endpoint=True)))
        documents.append(np.append(repeated, np.uint16(0)))
    return np.concatenate(documents).astype(np.uint16)


def _recalled_pairs(rng: np.random.Generator) -> Tokens:
    """Some pairs of random tokens, each once, and then `_RECALLS` of them again in any order."""
    count = int(rng.integers(*_PAIRS, endpoint=True))
    pairs = rng.integers(len(SPECIAL_TOKENS), VOCAB_SIZE, size=(count, 2)).astype(np.uint16)
    return np.concatenate([pairs, pairs[rng.integers(0, count, _RECALLS)]]).reshape(-1)
