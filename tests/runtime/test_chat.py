"""Chat templates: what transformers' environment offers, and what a hostile template may not do."""

from __future__ import annotations

import time
from typing import cast

import pytest

from megalith.format.errors import RequestError
from megalith.runtime.chat import render_chat
from megalith.runtime.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hi é"}]


class FakeTokenizer:
    """Only what rendering reads."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template
        self.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}


def render(template: str | None) -> str:
    return render_chat(cast(Tokenizer, FakeTokenizer(template)), MESSAGES)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}", "<s>[user]Hi é"),
        ("{% if add_generation_prompt %}go{% endif %}\n", "go"),
        ("{% if true %}\n  {% if true %}\nx{% endif %}\n{% endif %}", "x"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi é"}]'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "Hi é"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ tools is none }}", "True"),
    ],
)
def test_templates_have_what_transformers_offers(template: str, text: str) -> None:
    assert render(template) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError|unsafe"),
        ("{{ messages.append(1) }}", "SecurityError|unsafe"),
        ("{{ 'a' * 3000000000 }}", "memory"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time|longer than it may"),
        ("{{ 'a' * 20000000 }}", "16 Mi characters"),
        ("{{ (1).__class__ }}{{ 1 / 0 }}", "ZeroDivisionError|SecurityError|unsafe"),
    ],
)
def test_hostile_templates_end_in_an_error(template: str | None, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(RequestError, match=message):
        render(template)
    assert time.monotonic() - begun < 30, "the limit is 10; the rest is for a busy machine"
