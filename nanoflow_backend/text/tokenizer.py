"""Tokenizer turns text into token ids and back for a Hugging Face model folder, by the `tokenizers` library alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import TemplateSyntaxError
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from nanoflow_backend.config.file import read_file
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.chat_messages import Message
from nanoflow_backend.text.chat_template import ChatTemplate
from nanoflow_backend.text.framing import Framing
from nanoflow_backend.text.special_tokens import InvalidTokenizer, SpecialTokens, Token, read_optional_json
from nanoflow_backend.text.token_bytes import Decoding, TokenBytes, UnsupportedDecoder

OLDER_FILES = ("tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")  # each of another kind of tokenizer


class Tokenizer:
    """Encodes prompts, decodes outputs, renders chats. Immutable after construction; any thread may use it.

    Attributes:
        special_tokens: the text of each named special token: "bos_token", "eos_token", "pad_token", ...
        special_ids: every id that `skip_special_tokens` leaves out.
        bos_id, eos_id: None where the checkpoint names none.
    """

    def __init__(
        self,
        backend: Backend,
        decoding: Decoding,
        config: _Config,
        tokens: SpecialTokens,
        framing: Framing | None,
        templates: Mapping[str, ChatTemplate],
    ) -> None:
        backend.no_truncation()  # a tokenizer.json may carry its training's
        backend.no_padding()
        _add_tokens(backend, config, tokens)
        self._backend = backend
        self.special_tokens = tokens.named
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        if framing is not None:
            framing.apply(backend)
        self._adds_bos = self.bos_id is not None and backend.encode("").ids[:1] == [self.bos_id]
        self._bytes = TokenBytes(backend, decoding, self.vocab_size)
        self._bytes_without_special = TokenBytes(backend, decoding, self.vocab_size, hidden=self.special_ids)
        self._templates = dict(templates)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json and chat templates.

        Raises:
            InvalidTokenizer: naming the broken file, or what to do without tokenizer.json.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InvalidTokenizer(_without_file(folder))
        try:
            return cls._read(folder, file, read_file(file))
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the library's, which is no Exception
                raise
            raise InvalidTokenizer(f"{file}: not a valid tokenizer: it contradicts itself ({error})") from error

    @classmethod
    def _read(cls, folder: Path, file: Path, content: bytes) -> Tokenizer:
        try:
            decoding = Decoding.of(msgspec.json.decode(content, type=_File).decoder)
            backend = Backend.from_buffer(content)
        except UnsupportedDecoder as error:
            raise InvalidTokenizer(f"{file}: {error}") from error
        except Exception as error:  # the library raises bare Exceptions
            raise InvalidTokenizer(f"{file}: not a valid tokenizer: {error}") from error
        config = read_optional_json(folder / "tokenizer_config.json", _Config) or _Config()
        tokens = SpecialTokens.read(folder)
        if config.added_tokens_decoder is None:
            _add_older_tokens(folder, backend, tokens)
        framing = Framing.read(folder, tokens.named)
        sources = _chat_templates(folder, config).items()
        templates = {name: _compiled(folder, name, source, tokens.named) for name, source in sources}
        return cls(backend, decoding, config, tokens, framing, templates)

    @classmethod
    def find(cls, folder: str | Path) -> Tokenizer | None:
        """The folder's tokenizer; None where it has no file of one. Raises: InvalidTokenizer, as `from_pretrained`."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file() and not _older_files(folder):
            return None
        return cls.from_pretrained(folder)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id. A model's own vocabulary may be padded beyond it."""
        return max(self._backend.get_vocab_size(), 1 + max(self._backend.get_added_tokens_decoder(), default=-1))

    @property
    def longest_token_bytes(self) -> int:
        """No token stands for more bytes of text; it may be less, for vocabularies spell some bytes with several."""
        return max(len(token.encode()) for token in self._backend.get_vocab())

    @property
    def longest_token_json_bytes(self) -> int:
        """No token's own text (`token_text`) takes more bytes as a JSON string, its quotes and escapes included."""
        texts = (self._bytes.decoding.to_bytes(token).decode(errors="replace") for token in self._backend.get_vocab())
        return max(len(msgspec.json.encode(text)) for text in texts)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        With special tokens a text gets exactly one BOS, where the tokenizer has one to add, even when it begins
        with the BOS text already. Rendered chats have theirs: encode those without.

        Raises:
            InvalidRequest: the text is not valid Unicode (a lone surrogate).
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise InvalidRequest(f"prompt: expected valid Unicode text: {error}") from error
        twice = add_special_tokens and self._adds_bos and ids[:2] == [self.bos_id, self.bos_id]
        return ids[1:] if twice else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that no token has add nothing."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, skip_special_tokens: bool = False) -> TokenBytes:
        """The bytes that each token adds to the text, by id; none for special tokens that are skipped."""
        return self._bytes_without_special if skip_special_tokens else self._bytes

    def token_text(self, token_id: int) -> str:
        """One token's own text, leading space included: what logprobs show. Part of a character is U+FFFD."""
        return self._bytes[token_id].decode(errors="replace")

    def to_json(self) -> str:
        """As a tokenizer.json, with the tokens that only tokenizer_config.json names."""
        text: str = self._backend.to_str()
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation. Encode it with `add_special_tokens=False`: templates write their BOS.

        Of several templates, "tool_use" is taken when there are tools, else "default", as in transformers.

        Raises:
            InvalidRequest: the model has no such template, or the template refuses the messages.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequest(f"messages: the model has no default chat template; it has {sorted(self._templates)}")
        return self._templates[name].render(messages, tools, add_generation_prompt, variables)

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


class _File(msgspec.Struct):
    decoder: dict[str, Any] | None = None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _Config(msgspec.Struct):
    """What matters here of tokenizer_config.json, beside the tokens that it names."""

    added_tokens_decoder: dict[int, Token] | None = None
    chat_template: str | list[_NamedTemplate] | None = None


def _add_tokens(backend: Backend, config: _Config, tokens: SpecialTokens) -> None:
    """Make the tokens of the config known, and those with a name special, where tokenizer.json says less."""
    for _, token in sorted((config.added_tokens_decoder or {}).items()):
        backend.add_tokens([AddedToken(**msgspec.structs.asdict(token))])
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    unknown = [content for content in tokens.unnamed if content not in known]
    for content in [*tokens.named.values(), *unknown]:
        backend.add_special_tokens([known.get(content) or AddedToken(content, normalized=False)])


def _add_older_tokens(folder: Path, backend: Backend, tokens: SpecialTokens) -> None:
    """Make the tokens of added_tokens.json known, which was written before there was an `added_tokens_decoder`."""
    file = folder / "added_tokens.json"
    special = {*tokens.named.values(), *tokens.unnamed}
    for text, token_id in sorted((read_optional_json(file, dict[str, int]) or {}).items(), key=lambda item: item[1]):
        if backend.token_to_id(text) is None:
            backend.add_tokens([AddedToken(text, normalized=text not in special, special=text in special)])
        if backend.token_to_id(text) != token_id:
            raise InvalidTokenizer(
                f"{file}: expected id {backend.token_to_id(text)} for {text!r}, the tokenizer.json's or the one after "
                f"its last, got {token_id}"
            )


def _older_files(folder: Path) -> list[str]:
    return [name for name in OLDER_FILES if (folder / name).is_file()]


def _without_file(folder: Path) -> str:
    found = _older_files(folder)
    if not found:
        return f"{folder}: expected a tokenizer.json"
    load = f"AutoTokenizer.from_pretrained({str(folder)!r})"
    command = f'python -c "from transformers import AutoTokenizer; {load}.save_pretrained({str(folder)!r})"'
    return (
        f"{folder}: expected a tokenizer.json, found {', '.join(found)} only; to make one, in a Python with "
        f"transformers 4.57, sentencepiece, protobuf and tiktoken: {command}"
    )


def _chat_templates(folder: Path, config: _Config) -> dict[str, str]:
    """Template sources by name. Files of their own go before those in tokenizer_config.json."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _text(path) for name, path in files.items()}
    if isinstance(config.chat_template, str):
        return {"default": config.chat_template}
    return {named.name: named.template for named in config.chat_template or []}


def _text(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise InvalidTokenizer(f"{path}: expected UTF-8: {error}") from error


def _compiled(folder: Path, name: str, source: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    where = f"{folder}: chat template" + ("" if name == "default" else f" {name!r}")
    try:
        return ChatTemplate(source, special_tokens)
    except TemplateSyntaxError as error:
        raise InvalidTokenizer(f"{where}, line {error.lineno}: {error.message}") from error
    except Exception as error:  # what Python says of the code that the template becomes
        raise InvalidTokenizer(f"{where}: cannot be compiled: {error}") from error
