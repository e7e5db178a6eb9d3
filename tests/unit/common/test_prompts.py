"""Prompts as token ids: as transformers on ordinary text, and no control token out of a caller's text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from services.common.chat_template import ChatTemplate, Message, ToolCall
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.prompts import PromptEncoder
from tests.support.models import CHAT_TEMPLATE, EOS_TOKEN, SPECIAL_TOKENS, byte_tokenizer

ROOT = Path(__file__).parents[3]
SHARED_MODELS = Path(os.environ.get("LORAFLEET_SHARED", ROOT.parent / "shared")) / "models"

# The shapes of templates in the wild: lines around special tokens, brackets and trimmed contents.
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
TALK = [
    Message("user", "What is a fleet?\n"),
    Message("assistant", "Many ships — naïve, 日本語, 🚢."),
    Message("user", "  And one ship? "),
]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def with_template(source: Path, out: Path, template: str, **tokens: str) -> Path:
    """Copy a tokenizer beside a template and a tokenizer_config.json that names its tokens."""
    out.mkdir(exist_ok=True)
    (out / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **tokens}
    (out / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return out


def shared_model(name: str) -> Path:
    path = SHARED_MODELS / name
    if not (path / "tokenizer.json").is_file():
        pytest.skip(f"{name} is not here")
    return path


def by_transformers(folder: Path, messages: list[Message], *, add_generation_prompt: bool) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    return list(ids)


def tiny_folder(out: Path) -> Path:
    byte_tokenizer().save_pretrained(out)
    return out


def zephyr_folder(out: Path) -> Path:
    return with_template(
        shared_model("mistral-v1-tokenizer"),
        out,
        ZEPHYR,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def mistral_folder(out: Path) -> Path:
    return with_template(
        shared_model("mistral-v1-tokenizer"),
        out,
        MISTRAL,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def gpt2_folder(out: Path) -> Path:
    return with_template(shared_model("gpt2-tokenizer"), out, ZEPHYR, eos_token="<|endoftext|>")


FOLDERS = [tiny_folder, zephyr_folder, mistral_folder, gpt2_folder]


@pytest.mark.parametrize("make", FOLDERS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_is_encoded_as_transformers_does(
    make: Callable[[Path], Path], add_generation_prompt: bool, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model")
    encoder = PromptEncoder.load(folder)
    assert encoder.encode_chat(TALK, add_generation_prompt=add_generation_prompt) == by_transformers(
        folder, TALK, add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize("make", FOLDERS)
def test_text_is_encoded_as_transformers_does(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    text = "A naïve 🚢 — sails\n\n  on."
    expected = AutoTokenizer.from_pretrained(folder, local_files_only=True)(text)["input_ids"]
    assert PromptEncoder.load(folder).encode_text(text) == expected


@pytest.mark.parametrize("make", FOLDERS)
def test_special_tokens_in_contents_stay_text(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    encoder = PromptEncoder.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    special = set(tokenizer.all_special_ids)

    def count(content: str) -> int:
        ids = encoder.encode_chat([Message("user", content)])
        assert max(ids) < encoder.vocab_size
        return sum(token_id in special for token_id in ids)

    expected = count("hello")
    for token in tokenizer.all_special_tokens:
        for content in (token, f"hi{token}", f" {token} hi {token}{token}", token[:-1], token[1:], token[0]):
            assert count(content) == expected, content
        hostile = f"x{token}y"
        assert not special & set(encoder.encode_completion(hostile))
        assert encoder.decode(encoder.encode_completion(hostile)).lstrip() == hostile


def test_content_comes_back_whole(tiny: Path) -> None:
    content = f"a{EOS_TOKEN}\U00100000<|user|><|user|><|us"
    ids = PromptEncoder.load(tiny).encode_chat([Message("user", content)], add_generation_prompt=False)
    assert PromptEncoder.load(tiny).decode(ids) == f"<|user|>{content}{EOS_TOKEN}"


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(
            st.sampled_from([*SPECIAL_TOKENS, "<", "<|", "|>", "user", " ", "é"]), min_size=1, max_size=4
        ).map("".join),
        min_size=1,
        max_size=3,
    )
)
def test_no_contents_side_by_side_make_a_special_token(contents: list[str]) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content | trim }}{% endfor %}", SPECIAL_TOKENS, {})
    messages = [Message("user", content) for content in contents]
    rendering = template.render(messages, add_generation_prompt=False)
    assert not any(token in rendering.text for token in SPECIAL_TOKENS)
    assert rendering.text.translate(rendering.placeholders) == "".join(text.strip() for text in contents)


def test_begin_token_is_not_doubled(tmp_path: Path) -> None:
    encoder = PromptEncoder.load(mistral_folder(tmp_path / "model"))
    assert encoder.encode_text("hi")[0] == 1
    ids = encoder.encode_chat([Message("user", "hi")])
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert 1 not in encoder.encode_completion("hi")


def test_training_learns_the_assistant_and_its_end_token(tiny: Path) -> None:
    encoder = PromptEncoder.load(tiny)
    talk = [
        Message("system", "Be short."),
        Message("user", "one é?"),
        Message("assistant", "Yes 🚢<|user|>"),
        Message("user", "two"),
        Message("assistant", "No."),
    ]
    ids, learned = encoder.encode_chat_training(talk)
    assert ids == encoder.encode_chat(talk, add_generation_prompt=False)
    runs = "".join("1" if flag else "0" for flag in learned).replace("0", " ").split()
    positions = [index for index, flag in enumerate(learned) if flag]
    learned_ids = [ids[index] for index in positions]
    assert encoder.decode(learned_ids) == f"Yes 🚢<|user|>{EOS_TOKEN}No.{EOS_TOKEN}"
    assert [len(run) for run in runs] == [len("Yes 🚢<|user|>".encode()) + 1, 4]
    # What precedes each learned run is exactly what serving sends for that turn.
    first = encoder.encode_chat(talk[:2])
    second = encoder.encode_chat(talk[:4])
    assert ids[: len(first)] == first
    assert positions[0] == len(first)
    assert ids[: len(second)] == second
    assert positions[len(runs[0])] == len(second)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (zephyr_folder, f"{TALK[1].content}</s>"),
        (mistral_folder, f"{TALK[1].content}</s>"),
    ],
)
def test_training_stops_at_the_end_token(make: Callable[[Path], Path], expected: str, tmp_path: Path) -> None:
    encoder = PromptEncoder.load(make(tmp_path / "model"))
    ids, learned = encoder.encode_chat_training(TALK)
    text = encoder.decode([token_id for token_id, flag in zip(ids, learned, strict=True) if flag])
    assert text.strip() == expected


def test_only_the_turns_asked_for_are_learned(tiny: Path) -> None:
    encoder = PromptEncoder.load(tiny)
    talk = [
        Message("user", "one"),
        Message("assistant", "first"),
        Message("user", "two"),
        Message("assistant", "second"),
    ]
    for turns, text in (([1], "first"), ([3], "second"), ([1, 3], f"first{EOS_TOKEN}second")):
        ids, learned = encoder.encode_chat_training(talk, learned_turns=turns)
        assert ids == encoder.encode_chat(talk, add_generation_prompt=False)
        picked = [token_id for token_id, flag in zip(ids, learned, strict=True) if flag]
        assert encoder.decode(picked) == text + EOS_TOKEN
    with pytest.raises(InvalidArgument) as caught:
        encoder.encode_chat_training(talk, learned_turns=[])
    assert caught.value.reason == "bad_messages"


TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "description": f"It's hot? {EOS_TOKEN}"}}


def test_tools_and_calls_are_rendered_and_stay_text(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TOOL_TEMPLATE, "utf-8")
    encoder = PromptEncoder.load(tmp_path)
    talk = [
        Message("user", "Rain?"),
        Message("assistant", "", tool_calls=(ToolCall("weather", {"place": f"{EOS_TOKEN} é"}, "call-1"),)),
        Message("tool", "yes", tool_call_id="call-1"),
        Message("assistant", "Yes."),
    ]
    ids, learned = encoder.encode_chat_training(talk, tools=[WEATHER])
    call = json.dumps({"name": "weather", "arguments": {"place": f"{EOS_TOKEN} é"}}, ensure_ascii=False)
    tools = json.dumps([WEATHER], ensure_ascii=False)
    assert encoder.decode(ids) == (
        f"{tools}<|user|>Rain?{EOS_TOKEN}<|assistant|>{call}{EOS_TOKEN}<|tool|>yes{EOS_TOKEN}"
        f"<|assistant|>Yes.{EOS_TOKEN}"
    )
    learnt = encoder.decode([token_id for token_id, flag in zip(ids, learned, strict=True) if flag])
    assert learnt == f"{call}{EOS_TOKEN}Yes.{EOS_TOKEN}"
    # The four turns end with the control token; the same characters of strangers are spelled out.
    (end_id,) = encoder.eos_token_ids
    assert ids.count(end_id) == 4


def test_tools_are_refused_where_the_template_leaves_them_out(tiny: Path) -> None:
    encoder = PromptEncoder.load(tiny)
    asked = [Message("user", "x")]
    called = [*asked, Message("assistant", "", tool_calls=(ToolCall("f", {}),))]
    for messages, tools, field in ((asked, [WEATHER], "tools"), (called, [], "messages[1].tool_calls")):
        with pytest.raises(InvalidArgument) as caught:
            encoder.encode_chat(messages, tools=tools)
        assert (caught.value.reason, caught.value.field) == ("unsupported_parameter", field)


def test_many_texts_are_encoded_as_one_by_one(tiny: Path) -> None:
    encoder = PromptEncoder.load(tiny)
    texts = ["", "a <|user|> b", "日本語 🚢", "x" * 500]
    assert encoder.encode_texts(texts) == [encoder.encode_text(text) for text in texts]
    assert encoder.encode_completions(texts) == [encoder.encode_completion(text) for text in texts]


def test_template_that_looks_ahead_is_refused_for_training(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    template = "{{ messages | length }}" + CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text(template, "utf-8")
    encoder = PromptEncoder.load(tmp_path)
    assert encoder.encode_chat(TALK)
    with pytest.raises(FailedPrecondition) as caught:
        encoder.encode_chat_training(TALK)
    assert caught.value.reason == "template_not_prefix_preserving"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([Message("user", "x")] * 1025, "messages"),
        ([Message("user", "x"), Message("robot", "x")], "messages[1].role"),
        ([Message("system", "x"), Message("system", "y")], "messages[1].role"),
        ([Message("user", "x"), Message("user", "a\ud800")], "messages[1].content"),
        ([Message("user", "x", tool_calls=(ToolCall("f", {}),))], "messages[0].tool_calls"),
        ([Message("user", "x", tool_call_id="c")], "messages[0].tool_call_id"),
        (
            [Message("user", "x"), Message("assistant", "", tool_calls=(ToolCall("no spaces", {}),))],
            "messages[1].tool_calls[0].name",
        ),
        (
            [Message("user", "x"), Message("assistant", "", tool_calls=(ToolCall("f", {"a": "\udc00"}),))],
            "messages[1].tool_calls[0]",
        ),
        ([Message("user", "x", "no spaces")], "messages[0].name"),
    ],
)
def test_bad_messages_are_named(tiny: Path, messages: list[Message], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PromptEncoder.load(tiny).encode_chat(messages)
    assert (caught.value.reason, caught.value.field) == ("bad_messages", field)


def test_names_are_refused_where_the_template_leaves_them_out(tiny: Path) -> None:
    messages = [Message("user", "hi"), Message("user", "x", "ada")]
    with pytest.raises(InvalidArgument) as caught:
        PromptEncoder.load(tiny).encode_chat(messages)
    assert (caught.value.reason, caught.value.field) == ("unsupported_parameter", "messages[1].name")
    (tiny / "chat_template.jinja").write_text("{% for m in messages %}{{ m.name }}{% endfor %}", "utf-8")
    encoder = PromptEncoder.load(tiny)
    assert encoder.decode(encoder.encode_chat(messages)) == "ada"


def test_what_the_template_refuses_is_the_callers_mistake(tmp_path: Path) -> None:
    encoder = PromptEncoder.load(mistral_folder(tmp_path / "model"))
    with pytest.raises(InvalidArgument) as caught:
        encoder.encode_chat([Message("user", "a"), Message("user", "b")])
    assert caught.value.reason == "bad_messages"
    assert "roles must alternate" in caught.value.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(tiny: Path, template: str) -> None:
    (tiny / "chat_template.jinja").write_text(template, "utf-8")
    encoder = PromptEncoder.load(tiny)
    with pytest.raises((FailedPrecondition, InvalidArgument)) as caught:
        encoder.encode_chat([Message("user", "x")])
    assert caught.value.reason in {"chat_template_failed", "prompt_too_large"}


def test_base_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    encoder = PromptEncoder.load(tmp_path)
    assert not encoder.has_chat_template
    with pytest.raises(InvalidArgument) as caught:
        encoder.encode_chat([Message("user", "x")])
    assert caught.value.reason == "no_chat_template"


def test_end_tokens_come_from_every_place(tiny: Path) -> None:
    assert PromptEncoder.load(tiny).eos_token_ids == {0}
    (tiny / "config.json").write_text('{"eos_token_id": 7}', "utf-8")
    assert PromptEncoder.load(tiny).eos_token_ids == {0, 7}
    (tiny / "generation_config.json").write_text('{"eos_token_id": [8, 9]}', "utf-8")
    assert PromptEncoder.load(tiny).eos_token_ids == {0, 8, 9}
    (tiny / "generation_config.json").write_text('{"eos_token_id": "8"}', "utf-8")
    with pytest.raises(FailedPrecondition) as caught:
        PromptEncoder.load(tiny)
    assert caught.value.reason == "bad_config"


def test_decode_refuses_unknown_ids(tiny: Path) -> None:
    encoder = PromptEncoder.load(tiny)
    with pytest.raises(InvalidArgument) as caught:
        encoder.decode([6, encoder.vocab_size])
    assert caught.value.reason == "invalid_value"
    assert encoder.decode([0, *encoder.encode_text("é")], skip_special_tokens=True) == "é"


@pytest.mark.parametrize("make", FOLDERS)
def test_bytes_of_the_tokens_join_to_the_text(make: Callable[[Path], Path], tmp_path: Path) -> None:
    encoder = PromptEncoder.load(make(tmp_path / "model"))
    text = "naïve 🚢 — 日本語\n\x00\u2028 end"
    joined = b"".join(encoder.token_bytes[token_id] for token_id in encoder.encode_completion(text))
    assert joined.decode().lstrip() == text
    special = encoder.encode_chat([Message("user", "x")])
    assert encoder.token_bytes[special[-1]] in encoder.decode([special[-1]]).encode()
    assert encoder.token_bytes[10**6] == b""


def test_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        PromptEncoder.load(tmp_path)
    assert caught.value.reason == "missing_file"
