"""Chat templates: the text is the one that Transformers and llama.cpp's server make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("transformers")

from transformers.utils.chat_template_utils import render_jinja_template

from sparsek.engines.chat_template import chat_prompt, render
from sparsek.engines.llama import LlamaEngine
from sparsek.engines.model_file import embedded_model
from sparsek.engines.transformers import TransformersEngine
from sparsek.engines.transformers_text import Tokenizer

from .. import tiny_gguf
from ..cli.test_serve import Served
from ..tiny_gguf import BOS, CHATML

ENGINES: tuple[Callable[[str], Any], ...] = (partial(LlamaEngine, threads=1), TransformersEngine)
NAMES = ["llama", "transformers"]
BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
SHARED = {  # by the server too
    "chatml": CHATML,
    "own names for roles": BODY.replace("m.role", "'human' if m.role == 'user' else 'bot'"),
    "a system line": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.\n{% endif %}" + BODY,
    "no thinking": BODY + ANSWER,
    "bos": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content | trim }} [/INST]{% endfor %}",
    "eos": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{{ eos_token }}\n{% endfor %}",
    "parts": "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
}
ALONE = {
    "white space": "  {% for m in messages %}  \n  {{ m.content }}\n  {%- endfor %}\n",
    "loops": "{% for m in messages %}{% if loop.first %}{% break %}{% endif %}x{% endfor %}{{ messages[0] }}",
    "marked": "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "variables": "{% set ns = namespace() %}{% for m in messages %}{% set ns.n = 1 %}{% endfor %}{{ ns.n }}",
    "the day": "{{ strftime_now('%d %b %Y') }}",
    "what is given": "{{ tools is none }}{{ documents }}{{ unk_token is defined }}{{ x is defined }}",
}
TEXT = "Say <b>é</b> & 'this'"


@pytest.mark.parametrize("template", [*SHARED.values(), *ALONE.values()], ids=[*SHARED, *ALONE])
def test_the_text_is_that_of_transformers(template: str) -> None:
    content: Any = [{"type": "text", "text": TEXT}] if template == SHARED["parts"] else TEXT
    messages = [{"role": "user", "content": content}]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **tokens
    )
    assert render(template, messages, tokens) == expected


@pytest.mark.parametrize("template", SHARED.values(), ids=SHARED)
def test_the_tokens_are_the_same_in_both_engines_and_in_the_server(tmp_path: Path, template: str) -> None:
    model = tiny_gguf.llama()
    model.fields["tokenizer.chat_template"] = template
    file = str(model.write(tmp_path / "tiny.gguf"))
    ours, theirs = (make(file).encode_chat(TEXT) for make in ENGINES)
    assert ours == theirs
    assert ours.count(BOS) == 1  # once, be it in the template or not
    server = Served(tmp_path / "log", "-m", file, "-k", "0", "--threads", "1")
    try:
        asked = json.dumps({"messages": [{"role": "user", "content": TEXT}]}).encode()
        request = Request(f"{server.address}/apply-template", asked, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            prompt = json.load(answer)["prompt"]
        assert ours == ENGINES[0](file)._tokenizer.encode(prompt, special=True)
        assert server.chat(TEXT, 1)["usage"]["prompt_tokens"] == len(ours)
    finally:
        server.process.kill()
        server.process.wait()


def test_a_beginning_that_the_file_does_not_want(tmp_path: Path) -> None:
    model = tiny_gguf.llama()
    model.fields |= {"tokenizer.chat_template": SHARED["bos"], "tokenizer.ggml.add_bos_token": False}
    file = str(model.write(tmp_path / "tiny.gguf"))
    for make in ENGINES:
        assert make(file).encode_chat("x") == [BOS, *b"[INST] x [/INST]"]


@pytest.mark.model
def test_the_embedded_model_has_its_system_line() -> None:
    ours = LlamaEngine(None).encode_chat("Hi")
    assert ours == Tokenizer(embedded_model(), {}).encode_chat("Hi")
    assert len(ours) == 31


@pytest.mark.parametrize("make", ENGINES, ids=NAMES)
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% for x in %}", "TemplateSyntaxError: Expected an expression, got 'end of statement block'"),
        ("{{ messages | unheard_of }}", "TemplateAssertionError: No filter named 'unheard_of'"),
        ("{{ messages.x.y }}", "UndefinedError: 'list object' has no attribute 'x'"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{% set _ = messages.append(1) %}", "SecurityError: "),
    ],
)
def test_a_template_that_fails(
    tmp_path: Path, template: str, reason: str, make: Callable[[str], Any]
) -> None:
    model = tiny_gguf.llama()
    model.fields["tokenizer.chat_template"] = template
    engine = make(str(model.write(tmp_path / "tiny.gguf")))
    with pytest.raises(ValueError, match=r"^the chat template of .*tiny\.gguf fails, try --raw: ") as error:
        engine.encode_chat("Hi")
    assert reason in str(error.value)


def test_a_text_or_a_list_of_parts() -> None:
    def made(template: str, text: str = "Hi") -> str:
        return chat_prompt(lambda messages: render(template, messages, {}), text, Path("x"))

    parts = "{% for part in messages[0].content %}{{ part.text }}.{% endfor %}"
    assert made(parts) == "Hi."
    assert made("{{ messages[0].content[0]['text'] }}") == "Hi"
    assert made("{{ messages[0].content | upper }}") == "HI"
    assert made("{{ messages[0].content | tojson }}", "a\nb") == r'"a\nb"'
    assert made("no message") == "no message"
    assert made(parts, "") == ""
