"""Token streams for pretraining: packed documents, tokenised once and kept in a cache of uint16 arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from assets.copying import WordSource, copy_documents
from assets.corpus import read_parts
from assets.echoes import Tokens, echo_documents
from assets.instructions import InstructionGenerator, Turn
from assets.tokenizer import ASSISTANT, END_OF_TEXT, END_OF_TURN, SYSTEM, USER

CHILDREN = ["children-00", "children-01"]
FICTION = ["fiction-00", "fiction-01", "fiction-02", "fiction-03"]
_BATCH_DOCUMENTS = 2000
_PLAIN_ROWS_PER_CHAT = 4
_ECHOES = 12_000
_COPY_DOCUMENTS = 60_000


def render_chat(turns: Iterable[Turn]) -> str:
    """Renders a conversation as the bundled chat template does."""
    marks = {
        "system": (SYSTEM, END_OF_TURN),
        "user": (USER, END_OF_TURN),
        "assistant": (ASSISTANT, END_OF_TEXT),
    }
    return "".join(f"{marks[turn.role][0]}{turn.content}{marks[turn.role][1]}" for turn in turns)


def story_documents(corpus: Path, parts: list[str], seed: int) -> Iterator[str]:
    """Yields the texts of the parts in a seeded order, each ended by the end-of-text token."""
    texts = list(read_parts(corpus, parts))
    Random(seed).shuffle(texts)
    return (text + END_OF_TEXT for text in texts)


def instruction_documents(chat_count: int, seed: int) -> Iterator[str]:
    """Yields `chat_count` conversations, each after `_PLAIN_ROWS_PER_CHAT` plain rows."""
    plain = InstructionGenerator(seed).plain_documents()
    chats = InstructionGenerator(seed + 1).chats()
    for _ in range(chat_count):
        yield from (text + END_OF_TEXT for text in islice(plain, _PLAIN_ROWS_PER_CHAT))
        yield render_chat(next(chats))


def load_streams(
    corpus: Path, tokenizer_file: Path, cache: Path, instruction_chats: int, seed: int
) -> dict[str, Tokens]:
    """Returns the streams by name: `children`, `fiction`, `instructions`, `copies` and `echoes`.

    They are tokenised only once.

    The cache is keyed by the tokenizer, the number of conversations and the seed, so a new tokenizer never
    reads old tokens.
    """
    key = hashlib.sha256(tokenizer_file.read_bytes() + f"{instruction_chats} {seed}".encode()).hexdigest()[
        :16
    ]
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    sources: dict[str, Callable[[], Iterator[str]]] = {
        "children": lambda: story_documents(corpus, CHILDREN, seed),
        "fiction": lambda: story_documents(corpus, FICTION, seed),
        "instructions": lambda: instruction_documents(instruction_chats, seed),
        "copies": lambda: (
            text + END_OF_TEXT
            for text in copy_documents(WordSource.training(tokenizer), _COPY_DOCUMENTS, seed)
        ),
    }
    cache.mkdir(parents=True, exist_ok=True)
    streams: dict[str, Tokens] = {}
    for name, documents in sources.items():
        file = cache / f"{name}-{key}.npy"
        if not file.exists():
            partial = file.with_suffix(".partial.npy")
            np.save(partial, _tokenise(tokenizer, documents()))
            partial.rename(file)
        streams[name] = np.load(file, mmap_mode="r")
    newline_id = tokenizer.encode("\n").ids[0]
    streams["echoes"] = echo_documents(streams["children"], newline_id, _ECHOES, seed)
    return streams


def _tokenise(tokenizer: Tokenizer, documents: Iterator[str]) -> Tokens:
    pieces: list[Tokens] = []
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        pieces.extend(np.array(encoding.ids, dtype=np.uint16) for encoding in tokenizer.encode_batch(batch))
    return np.concatenate(pieces)


class BatchReader:
    """Cuts batches of rows out of the streams; where a stream ends it begins again.

    `cursors` (tokens read so far, per stream) is all the state, so a run resumes where it stopped.
    """

    def __init__(self, streams: dict[str, Tokens], seed: int) -> None:
        self._streams = streams
        self._seed = seed
        self.cursors = dict.fromkeys(streams, 0)

    def read(self, step: int, rows: int, row_tokens: int, weights: dict[str, float]) -> npt.NDArray[np.int64]:
        """Returns token ids of shape (rows, row_tokens); `weights` are the streams' chances for each row."""
        rng = np.random.default_rng((self._seed, step))
        names = rng.choice(list(weights), size=rows, p=list(weights.values()))
        return np.stack([self._next(str(name), row_tokens) for name in names])

    def _next(self, name: str, count: int) -> npt.NDArray[np.int64]:
        stream = self._streams[name]
        start = self.cursors[name] % (len(stream) - count)
        self.cursors[name] += count
        return stream[start : start + count].astype(np.int64)
