"""Rows 105 and 106, many times: the right adapter answers under churn, and a wrong one would be seen."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from bench.right_adapter import Name, Timeline, _problem, run
from bench.spelling_model import NUMBERS, PLACES, QUESTION, adapter_files, digits_of, make_base, number_of
from services.inference.engine.prefix import Chain
from tests.support.engines import FolderFetcher, make_engine, request, run_all, tokens_of
from tests.support.models import byte_tokenizer, load_peft_adapters


def write(folder: Path, number: int, rank: int) -> Path:
    folder.mkdir()
    for name, data in adapter_files(number, rank).items():
        (folder / name).write_bytes(data)
    return folder


def test_adapters_spell_their_numbers_in_peft_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    numbers = {f"n{number}": number for number in (0, 1, 4321, NUMBERS - 1)}
    folders = {name: write(tmp_path / name, number, 4) for name, number in numbers.items()}
    prompt = byte_tokenizer().encode("Who is it" + QUESTION, return_tensors="pt")
    model = load_peft_adapters(AutoModelForCausalLM.from_pretrained(base, local_files_only=True), folders)
    for name, number in numbers.items():
        model.set_adapter(name)
        output = model.generate(input_ids=prompt, max_new_tokens=PLACES, do_sample=False)
        assert number_of(output[0, prompt.shape[1] :].tolist()) == number
    assert digits_of(NUMBERS - 1) == [11] * PLACES


def test_a_foreign_prefix_would_be_seen(tmp_path: Path) -> None:
    """Keys and values of another version change the number, so the bench's prompts test the prefix cache."""
    base = make_base(tmp_path / "base")
    folders = {"one": write(tmp_path / "one", 1000, 2), "two": write(tmp_path / "two", 20000, 2)}
    engine = make_engine(base, tmp_path / "cache", FolderFetcher(folders))
    prompt = byte_tokenizer().encode("Which version are you" + QUESTION)
    found = {}
    for name in folders:
        engine.add(request(name, prompt, name, max_tokens=PLACES))
        found[name] = number_of(tokens_of(run_all(engine)[name]))
    assert found == {"one": 1000, "two": 20000}
    # As if the digest were not in the cache's key: two finds what one computed.
    engine = make_engine(base, tmp_path / "cache", FolderFetcher(folders))
    with pytest.MonkeyPatch.context() as patch:
        at_root = Chain.at_root
        patch.setattr(Chain, "at_root", lambda scope: at_root((scope[0], None)))
        for name in folders:
            engine.add(request(name, prompt, name, max_tokens=PLACES))
            found[name] = number_of(tokens_of(run_all(engine)[name]))
    assert found["one"] == 1000
    assert found["two"] != 20000


def test_what_is_wrong_is_called_wrong() -> None:
    name = Name("a", numbers={1: 11, 2: 22})
    assert _problem(name, "a:2", {2}, 22) is None
    assert _problem(name, "a:2", {2}, 11) is not None
    assert _problem(name, "a:1", {2}, 11) is not None
    line = Timeline(values=[(1.0, 1), (5.0, 2)], settled=[2.0, 6.0])
    assert line.possible(3.0, 4.0) == {1}
    assert line.possible(5.5, 5.7) == {1, 2}
    assert line.possible(7.0, 8.0) == {2}


def test_rows_105_and_106_two_thousand_requests_under_churn(tmp_path: Path) -> None:
    options = argparse.Namespace(requests=2000, concurrency=48, names=40, pause_seconds=0.02)
    result = asyncio.run(run(options))
    assert (result["right"], result["wrong"], result["refused"]) == (2000, 0, {}), result
    churn = result["churn"]
    assert isinstance(churn, dict)
    assert {"publish", "move_alias", "evict"} <= set(churn)
