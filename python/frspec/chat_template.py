"""A model's chat template: Jinja in a sandbox, with the helpers Hugging Face templates expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from .errors import ModelError, RequestError


class ChatTemplate:
    """A compiled chat template. `source` names where it came from, for messages."""

    def __init__(self, text: str, source: str):
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateError as error:
            raise ModelError(f"{source}: chat template does not compile: {error}") from None
        self._source = source

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of a folder (the .jinja file first, as newer releases write it), or None.

        `settings` is tokenizer_config.json, whose chat_template is a string or a list of named
        ones, of which "default" is taken.
        """
        path = folder / "chat_template.jinja"
        if path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"), str(path))
            except (OSError, ValueError) as error:
                raise ModelError(f"{path}: cannot be read: {error}") from None
        text = settings.get("chat_template")
        if isinstance(text, list):
            named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
            text = named.get("default")
        if text is None:
            return None
        source = str(folder / "tokenizer_config.json")
        if not isinstance(text, str):
            raise ModelError(f"{source}: chat_template: expected a string, found {type(text)}")
        return cls(text, source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        special_tokens: Mapping[str, str],
    ) -> str:
        """The conversation as text. RequestError when the messages do not suit the template."""
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(
                    f"message {index}: expected an object with role and content, found {message!r}"
                )
            if "content" not in message:
                raise RequestError(f"message {index}: no content, found {sorted(message)}")
        if not messages:
            raise RequestError("chat: expected at least one message, found none")
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **special_tokens,
            )
        # Templates run code of the model's author: what it raises says nothing about this program.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise RequestError(f"{self._source}: chat template refused: {reason}") from None


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks the model's own words for training: kept."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes HTML characters, which a prompt must not contain.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern):
    return datetime.datetime.now().strftime(pattern)
