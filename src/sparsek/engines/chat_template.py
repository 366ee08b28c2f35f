"""A model's chat template: a program in Jinja that came with the model, rendered in a sandbox.

What templates may use (names, filters, tags, how white space is cut) is what Transformers gives them, for
which they are written.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .text import first_line

Message = dict[str, Any]

_PART_IN_PYTHON: Final = "'type': 'text'"  # what a template for texts makes of parts


def render(template: str, messages: Sequence[Message], special_tokens: Mapping[str, str]) -> str:
    """The text up to where the model's answer begins.

    Args:
        special_tokens: their texts by the names that templates have for them, as "bos_token".

    Raises:
        Exception: of any kind, from the template.
    """
    given = {"tools": None, "documents": None, "add_generation_prompt": True, **special_tokens}
    return _compiled(template).render(messages=list(messages), **given)


def chat_prompt(render_messages: Callable[[list[Message]], str], text: str, model: Path) -> str:
    """`text` as a user's only message. Some templates take the content of a message as a text, others as a
    list of parts; which shows in where the text arrives.

    Raises:
        ValueError: the template fails with both; the message names the `model`.
    """
    failed: Exception | None = None
    try:
        prompt = render_messages([_message(text)])
    except Exception as error:  # a program that came with the model
        prompt, failed = "", error
    if failed is None and text.strip() in prompt:
        return prompt
    with contextlib.suppress(Exception):  # the template is one for texts
        in_parts = render_messages([_message([{"type": "text", "text": text}])])
        if text.strip() in in_parts and _PART_IN_PYTHON not in in_parts:
            return in_parts
    if failed is not None:
        raise ValueError(f"the chat template of {model} fails, try --raw: {first_line(failed)}") from failed
    return prompt


def _message(content: str | list[dict[str, str]]) -> Message:
    return {"role": "user", "content": content}


class _Generation(Extension):
    """The tags that mark a model's own words, for training: here they say nothing."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _now}
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own writes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
