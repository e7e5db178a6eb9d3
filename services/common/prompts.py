"""From text and messages to token ids, the same for training and serving.

Special tokens are recognised only where the base's chat template wrote them. The same characters in a
caller's text are encoded as ordinary text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from services.common.adapter_format.strict_json import StrictJsonError, parse_object
from services.common.chat_template import ChatTemplate, Message, Rendering, check_messages, is_text
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.token_bytes import TokenBytes

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_JSON_DEPTH = 64


class PromptEncoder:
    """The tokenizer and the chat template of one base. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: str | None,
        named_tokens: dict[str, str],
        eos_token_ids: frozenset[int],
    ) -> None:
        """Wrap a tokenizer, which is changed: it must not be used elsewhere."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.token_bytes = TokenBytes(tokenizer)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = eos_token_ids
        self._aliases: dict[str, str] = {}
        self._special_ids: dict[int, int] = {}
        self._add_aliases()
        self._specials = re.compile(
            "|".join(re.escape(token) for token in sorted(self._aliases, key=len, reverse=True)) or r"(?!)"
        )
        self._template = (
            None if chat_template is None else ChatTemplate(chat_template, list(self._aliases), named_tokens)
        )

    @classmethod
    def load(cls, model_dir: Path) -> PromptEncoder:
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

        Raises:
            FailedPrecondition: `missing_file` without tokenizer.json, `bad_config` where a file is not
                what it should be, `chat_template_failed` where the template is not valid Jinja.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise FailedPrecondition(
                "missing_file", f"{model_dir.name} holds no tokenizer.json.", field=path.name
            )
        tokenizer = Tokenizer.from_file(str(path))
        config = _read_json(model_dir / "tokenizer_config.json")
        named = {name: text for name in _NAMED_TOKENS if (text := _token_text(config, name)) is not None}
        return cls(
            tokenizer,
            chat_template=_chat_template(model_dir, config),
            named_tokens=named,
            eos_token_ids=_eos_token_ids(model_dir, tokenizer, named.get("eos_token")),
        )

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """The ids of the control tokens, which stand for no text of a caller's."""
        return tuple(self._special_ids.values())

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded at all."""
        return self._template is not None

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text that begins a prompt, with what the tokenizer itself puts around it."""
        return self._tokenizer.encode(_checked(text)).ids

    def encode_completion(self, text: str) -> list[int]:
        """Return the ids of a text that follows a prompt: nothing is added to it."""
        return self._tokenizer.encode(_checked(text), add_special_tokens=False).ids

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode_text` returns for each text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast([_checked(text) for text in texts])
        return [encoding.ids for encoding in encodings]

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode_completion` returns for each text, on all cores."""
        checked = [_checked(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(checked, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Return the ids of a conversation; the template alone decides about a begin token.

        Raises:
            InvalidArgument: `bad_messages` naming the index, `no_chat_template`, `unsupported_parameter` for
                a `name`, `tools` or `tool_calls` that the template would leave out.
            FailedPrecondition: `chat_template_failed`.
        """
        template = self._require_template()
        check_messages(messages)
        rendering = template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return self._plain_ids(self._encode_rendering(rendering))

    def encode_chat_training(
        self,
        messages: Sequence[Message],
        *,
        learned_turns: Collection[int] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a whole conversation and, for each, whether it is to be learned.

        Learned are the assistant's contents and the special tokens that close them.

        Args:
            messages: the turns.
            learned_turns: indices of the assistant turns that are learned; all of them when None.
            tools: JSON descriptions of the tools that the assistant may call.

        Raises:
            InvalidArgument: as `encode_chat`, and `bad_messages` where no turn is the assistant's.
            FailedPrecondition: `template_not_prefix_preserving` where what the template writes for a turn
                depends on later ones, so that training and serving would see different prompts.
        """
        template = self._require_template()
        check_messages(messages)
        whole = template.render(messages, add_generation_prompt=False, tools=tools)
        regions: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message.role != "assistant" or (learned_turns is not None and index not in learned_turns):
                continue
            before = template.render(
                messages[:index], add_generation_prompt=True, placeholders_for=messages, tools=tools
            ).text
            after = template.render(
                messages[: index + 1], add_generation_prompt=False, placeholders_for=messages, tools=tools
            ).text
            if not (after.startswith(before) and whole.text.startswith(after)):
                raise FailedPrecondition(
                    "template_not_prefix_preserving",
                    f"What the chat template writes for message {index} changes with what comes after it.",
                    field=f"messages[{index}]",
                )
            regions.append((len(before), self._turn_end(after, len(before))))
        if not regions:
            text = "No message is the assistant's, or none that is to be learned."
            raise InvalidArgument("bad_messages", text, field="messages")
        encoding = self._encode_rendering(whole)
        origins = self._origins(whole.text)
        learned = [False] * len(encoding.ids)
        left = iter(regions)
        low, high = next(left)
        for position, (start, end) in enumerate(encoding.offsets):
            while origins[start] >= high and (region := next(left, None)) is not None:
                low, high = region
            learned[position] = low <= origins[start] < origins[end] <= high
        return self._plain_ids(encoding), learned

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids.

        Raises:
            InvalidArgument: `invalid_value` for an id outside the vocabulary.
        """
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidArgument(
                    "invalid_value",
                    f"Token id {token_id} is outside the vocabulary, 0 to {self.vocab_size - 1}.",
                    field="token_ids",
                    value=token_id,
                    limit=f"0 to {self.vocab_size - 1}",
                )
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise InvalidArgument(
                "no_chat_template", "The base has no chat template; send a text prompt.", field="messages"
            )
        return self._template

    def _add_aliases(self) -> None:
        """Give every special token a second spelling that no caller can guess, and that is recognised."""
        secret = secrets.token_hex(16)
        specials = [
            (token_id, token)
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content
        ]
        aliases = [
            AddedToken(
                f"\ue000{secret}-{token_id}\ue001",
                single_word=False,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
                special=False,
            )
            for token_id, token in specials
        ]
        self._tokenizer.add_tokens(aliases)
        for (token_id, token), alias in zip(specials, aliases, strict=True):
            alias_id = self._tokenizer.token_to_id(alias.content)
            assert alias_id is not None, "an alias that was just added has an id"
            self._aliases[token.content] = alias.content
            self._special_ids[alias_id] = token_id

    def _encode_rendering(self, rendering: Rendering) -> Encoding:
        text = self._specials.sub(lambda match: self._aliases[match[0]], rendering.text)
        if rendering.has_placeholders:
            # A placeholder and its character are one code point each, so offsets stay true.
            text = text.translate(rendering.placeholders)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _plain_ids(self, encoding: Encoding) -> list[int]:
        return [self._special_ids.get(token_id, token_id) for token_id in encoding.ids]

    def _origins(self, text: str) -> list[int]:
        """Return for each position of the text with aliases the position in `text` it comes from."""
        origins: list[int] = []
        position = 0
        for match in self._specials.finditer(text):
            origins += range(position, match.start())
            origins += [match.start()] * len(self._aliases[match[0]])
            position = match.end()
        origins += range(position, len(text) + 1)
        return origins

    def _turn_end(self, text: str, start: int) -> int:
        """Return where the turn that begins at `start` and ends the text ends for learning.

        That is behind its last special token: what a template puts after that (a line break) is written by
        nobody. Without a special token it is the end of the text.
        """
        ends = [match.end() for match in self._specials.finditer(text, start)]
        return ends[-1] if ends else len(text)


def _checked(text: str) -> str:
    if not is_text(text):
        raise InvalidArgument(
            "invalid_value", "The text holds half a surrogate pair, which is not text.", field="text"
        )
    return text


def _chat_template(model_dir: Path, tokenizer_config: dict[str, Any]) -> str | None:
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise _bad_config("chat_template", "tokenizer_config.json must hold one chat template as text.")
    return template


def _token_text(tokenizer_config: dict[str, Any], name: str) -> str | None:
    """Return a token that tokenizer_config.json gives as text or as an object."""
    token = tokenizer_config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise _bad_config(name, f"{name} in tokenizer_config.json must be text.")
    return token


def _eos_token_ids(model_dir: Path, tokenizer: Tokenizer, eos_token: str | None) -> frozenset[int]:
    """Return the end tokens: of generation_config.json, else of config.json, and the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(model_dir / name).get("eos_token_id")
        if value is not None:
            break
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in listed):
        raise _bad_config("eos_token_id", "eos_token_id must be a token id or a list of them.")
    own = None if eos_token is None else tokenizer.token_to_id(eos_token)
    return frozenset([*listed, *([] if own is None else [own])])


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        return parse_object(path.read_bytes(), max_depth=_JSON_DEPTH)
    except StrictJsonError as error:
        raise _bad_config(path.name, f"{path.name}: {error}.") from error


def _bad_config(field: str, message: str) -> FailedPrecondition:
    return FailedPrecondition("bad_config", message, field=field)
