"""Constraints: what is refused and why, and that what comes out fits, for every kind of tokenizer."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLTokenizer

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.token_bytes import TokenBytes
from services.inference.constraints.checks import check
from services.inference.constraints.compiler import ConstraintCompiler
from services.inference.constraints.grammar import ConstraintKind, matcher
from services.inference.constraints.rehearsal import Rehearsal
from services.inference.constraints.vocabulary import Vocabulary
from services.inference.engine.constraint import Constraint
from tests.support.models import byte_tokenizer
from tests.unit.inference.test_text import sentencepiece_tokenizer

SCHEMA = ConstraintKind.JSON_SCHEMA
REGEX = ConstraintKind.REGEX
GRAMMAR = ConstraintKind.GRAMMAR


def byte_vocabulary() -> Vocabulary:
    tokenizer = byte_tokenizer().backend_tokenizer
    words = TokenBytes(tokenizer)
    return Vocabulary(tuple(words[token_id] for token_id in range(264)), tuple(range(6)), (0,))


def fallback_vocabulary() -> Vocabulary:
    """Words with leading spaces, and one token for each byte; the last id ends."""
    words = TokenBytes(sentencepiece_tokenizer().backend_tokenizer)
    tokens = [b"", *(words[token_id] for token_id in range(1, 259)), b"</s>"]
    return Vocabulary(tuple(tokens), (0, 259), (259,))


VOCABULARIES = {"byte level": byte_vocabulary(), "byte fallback": fallback_vocabulary()}


@pytest.fixture
async def compiler() -> AsyncIterator[ConstraintCompiler]:
    compiler = ConstraintCompiler(byte_vocabulary(), limit_seconds=20)
    yield compiler
    await compiler.close()


def compiled(kind: ConstraintKind, text: str, vocabulary: Vocabulary) -> Constraint:
    check(kind, text)
    tokenizer: LLTokenizer = vocabulary.compiled()
    return Constraint(matcher(kind, text, tokenizer), f"sampling.{kind.value}", kind.reason)


def an_output(constraint: Constraint, vocabulary: Vocabulary, seed: int, max_tokens: int = 400) -> str | None:
    """Choose tokens at random among those allowed; return the text, or None where it did not end."""
    state = constraint.start()
    generator = torch.Generator().manual_seed(seed)
    out = b""
    for _ in range(max_tokens):
        logits = torch.randn(len(vocabulary.tokens), generator=generator)
        state.mask(logits)
        # Ends are made likely, so that most outputs are short.
        logits[list(vocabulary.eos_token_ids)] += 1.0
        token_id = int(logits.argmax())
        state.accept(token_id)
        if token_id in vocabulary.eos_token_ids:
            return out.decode()
        out += vocabulary.tokens[token_id]
        if state.is_complete:
            return out.decode()
    return None


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "name": {"type": "string", "maxLength": 5}},
    "required": ["x", "name"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"value": {"enum": [1, 2]}, "left": {"$ref": "#"}},
    "required": ["value"],
    "additionalProperties": False,
}


def is_point(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"x", "name"} and isinstance(value["x"], int) and len(value["name"]) <= 5


def is_tree(text: str) -> bool:
    value = json.loads(text)
    while value is not None:
        assert value["value"] in (1, 2)
        value = value.get("left")
    return True


def is_sum(text: str) -> bool:
    return re.fullmatch(r"\d(\+\d)*", text) is not None


FITTING: dict[str, tuple[ConstraintKind, str, Any]] = {
    "object": (SCHEMA, json.dumps(POINT), is_point),
    "recursive schema": (SCHEMA, json.dumps(TREE), is_tree),
    "enum": (SCHEMA, '{"enum": ["a", "\\u00e9"]}', lambda text: json.loads(text) in ("a", "é")),
    "regex": (REGEX, r"(ab|cd){2,3}!?", lambda text: re.fullmatch(r"(ab|cd){2,3}!?", text)),
    "regex of wide characters": (REGEX, "[é-ü🚢]{1,3}", lambda text: re.fullmatch("[é-ü🚢]{1,3}", text)),
    "anchored": (REGEX, "^x{1,3}$", lambda text: re.fullmatch("x{1,3}", text)),
    "grammar": (GRAMMAR, 'start: DIGIT ("+" DIGIT)*\nDIGIT: /[0-9]/', is_sum),
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize(("kind", "text", "fits"), FITTING.values(), ids=FITTING)
def test_whatever_is_drawn_fits(kind: ConstraintKind, text: str, fits: Any, vocabulary: Vocabulary) -> None:
    constraint = compiled(kind, text, vocabulary)
    outputs = [an_output(constraint, vocabulary, seed) for seed in range(20)]
    ended = [output for output in outputs if output is not None]
    assert len(ended) >= 10
    assert all(fits(output) for output in ended)
    assert len(set(ended)) > 1


def test_an_end_is_possible_only_where_the_output_is_complete() -> None:
    vocabulary = byte_vocabulary()
    state = compiled(REGEX, "ab?", vocabulary).start()
    tokens = {letter: vocabulary.tokens.index(letter) for letter in (b"a", b"b")}
    allowed = []
    for token_id in (tokens[b"a"], tokens[b"b"]):
        logits = torch.zeros(264)
        state.mask(logits)
        allowed.append(logits.isfinite().nonzero()[:, 0].tolist())
        assert not state.is_complete
        state.accept(token_id)
    assert allowed == [[tokens[b"a"]], [0, tokens[b"b"]]]
    assert state.is_complete


def test_control_tokens_and_ids_without_text_are_never_allowed() -> None:
    logits = torch.zeros(264)
    compiled(REGEX, r"(.|\n)*", byte_vocabulary()).start().mask(logits)
    possible = set(logits.isfinite().nonzero()[:, 0].tolist())
    assert not possible & {1, 2, 3, 4, 5, 262, 263}
    assert {0, 70} <= possible


def test_sequences_go_their_own_ways() -> None:
    vocabulary = byte_vocabulary()
    constraint = compiled(REGEX, "ab|cd", vocabulary)
    first, second = constraint.start(), constraint.start()
    first.accept(vocabulary.tokens.index(b"a"))
    second.accept(vocabulary.tokens.index(b"c"))
    logits = torch.zeros(264)
    first.mask(logits)
    assert logits.isfinite().nonzero()[:, 0].tolist() == [vocabulary.tokens.index(b"b")]


def test_a_token_that_does_not_fit_is_an_error_of_the_request() -> None:
    constraint = compiled(REGEX, "ab", byte_vocabulary())
    with pytest.raises(InvalidArgument) as caught:
        constraint.start().accept(70 + 25)
    assert (caught.value.reason, caught.value.field) == ("unsupported_regex", "sampling.regex")
    assert constraint.is_spoiled


def deep(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


# Rows 81 to 83 of the table of faults: kind, text, reason, and where the fault is.
REFUSED: dict[str, tuple[ConstraintKind, str, str]] = {
    "81 refers to itself": (SCHEMA, '{"$ref": "#"}', "sampling.json_schema.$ref"),
    "81 refers in circles": (
        SCHEMA,
        '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "items": {"$ref": "#/$defs/a"}}',
        "sampling.json_schema.$defs.a.$ref",
    ),
    "81 remote": (SCHEMA, '{"$ref": "http://127.0.0.1:9/x"}', "sampling.json_schema.$ref"),
    "81 file": (SCHEMA, '{"items": {"$ref": "file:///etc/passwd"}}', "sampling.json_schema.items.$ref"),
    "81 depth": (SCHEMA, deep(10_000), "sampling.json_schema"),
    "81 depth 65": (SCHEMA, deep(65), "sampling.json_schema"),
    "81 enum": (SCHEMA, json.dumps({"enum": list(range(10**5))}), "sampling.json_schema"),
    "81 enum of 1001": (SCHEMA, json.dumps({"enum": list(range(1001))}), "sampling.json_schema.enum"),
    "81 minItems": (SCHEMA, '{"type": "array", "minItems": 1000000000}', "sampling.json_schema.minItems"),
    "81 maxLength": (
        SCHEMA,
        '{"properties": {"a": {"maxLength": 1e300}}}',
        "sampling.json_schema.properties.a.maxLength",
    ),
    "81 no JSON": (SCHEMA, "{", "sampling.json_schema"),
    "81 no object": (SCHEMA, "[]", "sampling.json_schema"),
    "81 empty": (SCHEMA, "", "sampling.json_schema"),
    "82 nested repetition": (REGEX, "(a+)+$", "sampling.regex"),
    "82 nested deeper": (REGEX, "x((?:a*))*", "sampling.regex"),
    "82 count": (REGEX, ".{100000}", "sampling.regex"),
    "82 counts that multiply": (REGEX, "((a{100}){100}){2}", "sampling.regex"),
    "82 look-behind": (REGEX, "(?<=a)b", "sampling.regex"),
    "82 look-ahead": (REGEX, "(?!a)b", "sampling.regex"),
    "82 groups": (REGEX, "(" * 100 + "a" + ")" * 100, "sampling.regex"),
    "82 length": (REGEX, "a" * 8193, "sampling.regex"),
    "82 in a schema": (SCHEMA, '{"pattern": "(a+)+$"}', "sampling.json_schema.pattern"),
    "82 in names": (
        SCHEMA,
        '{"patternProperties": {".{100000}": {}}}',
        "sampling.json_schema.patternProperties",
    ),
    "83 length": (GRAMMAR, "start: x\n" * 10_000, "sampling.grammar"),
}


@pytest.mark.parametrize(("kind", "text", "field"), REFUSED.values(), ids=REFUSED)
def test_what_is_too_much_is_refused_before_anything_is_compiled(
    kind: ConstraintKind, text: str, field: str
) -> None:
    started = time.process_time()
    with pytest.raises(InvalidArgument) as caught:
        check(kind, text)
    assert time.process_time() - started < 0.5
    error = caught.value
    assert error.reason == (REGEX.reason if ".pattern" in field else kind.reason)
    assert error.field == field
    assert error.value is not None
    assert error.limit


FINE_FORMS = [r"([a-z]+ )+", r"(a|b)*", r"[(+*]+", r"\(a+\)+", r"a{2,}?b", r"(ab+c){1,5}", "[]a]+", "a{,3}"]


@pytest.mark.parametrize("pattern", FINE_FORMS)
def test_ordinary_forms_are_let_through(pattern: str) -> None:
    check(REGEX, pattern)


# What only the compiler finds.
UNCOMPILABLE: dict[str, tuple[ConstraintKind, str]] = {
    "no such type": (SCHEMA, '{"type": "nonsense"}'),
    "not offered": (SCHEMA, '{"not": {"type": "string"}}'),
    "nothing fits": (SCHEMA, '{"type": "integer", "minimum": 3, "maximum": 2}'),
    "blow-up": (
        SCHEMA,
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(10)]}
                    for i in range(6)
                ]
            }
        ),
    ),
    "bracket": (REGEX, "[a"),
    "word boundary": (REGEX, r"\bfoo\b"),
    "back reference": (REGEX, r"(a)\1"),
    "no rule": (GRAMMAR, "start: nothing"),
    "too deep": (GRAMMAR, "start: " + "(" * 5000 + '"a"' + ")" * 5000),
}


async def test_what_does_not_compile_is_refused_with_its_reason(compiler: ConstraintCompiler) -> None:
    for name, (kind, text) in UNCOMPILABLE.items():
        with pytest.raises(InvalidArgument) as caught:
            await compiler.compile(kind, text)
        assert caught.value.reason == kind.reason, name
        assert caught.value.field == f"sampling.{kind.value}"
    # The refusals did no harm.
    assert await compiler.compile(REGEX, "a+") is await compiler.compile(REGEX, "a+")


async def test_equal_texts_are_compiled_once_and_few_are_kept() -> None:
    compiler = ConstraintCompiler(byte_vocabulary(), limit_seconds=20, max_kept=2)
    try:
        one, same = await asyncio.gather(compiler.compile(REGEX, "a"), compiler.compile(REGEX, "a"))
        assert one is same
        await compiler.compile(REGEX, "b")
        assert await compiler.compile(REGEX, "a") is one
        await compiler.compile(REGEX, "c")
        assert await compiler.compile(REGEX, "a") is one
        one.is_spoiled = True
        assert await compiler.compile(REGEX, "a") is not one
    finally:
        await compiler.close()


async def test_a_base_without_an_end_token_is_told() -> None:
    vocabulary = Vocabulary((b"a", b"b"), (), ())
    compiler = ConstraintCompiler(vocabulary)
    with pytest.raises(FailedPrecondition, match="no_eos_token"):
        await compiler.compile(REGEX, "a")
    await compiler.close()


async def test_row_83_a_compiler_that_dies_or_hangs_costs_only_that_constraint(tmp_path: Path) -> None:
    rehearsal = Rehearsal(byte_vocabulary(), limit_seconds=20, memory_bytes=4 << 30)
    try:
        assert await rehearsal.refusal(REGEX, "a") is None
        process = rehearsal._process
        assert process is not None
        os.kill(process.pid, 9)
        died = await rehearsal.refusal(REGEX, "a")
        assert died is not None
        assert await rehearsal.refusal(REGEX, "a") is None
        process = rehearsal._process
        assert process is not None
        os.kill(process.pid, 19)
        rehearsal._limit_seconds = 0.3
        started = time.monotonic()
        hung = await rehearsal.refusal(REGEX, "a")
        assert hung is not None
        assert "0.3 s" in hung
        assert time.monotonic() - started < 5
        await process.wait()
        rehearsal._limit_seconds = 20
        assert await rehearsal.refusal(REGEX, "a") is None
    finally:
        await rehearsal.close()
    assert rehearsal._process is None


async def test_a_caller_that_leaves_does_not_shift_the_answers() -> None:
    rehearsal = Rehearsal(byte_vocabulary(), limit_seconds=20, memory_bytes=4 << 30)
    try:
        assert await rehearsal.refusal(REGEX, "a") is None
        task = asyncio.create_task(rehearsal.refusal(REGEX, "[a"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await rehearsal.refusal(REGEX, "a") is None
        assert await rehearsal.refusal(REGEX, "[a") is not None
    finally:
        await rehearsal.close()
