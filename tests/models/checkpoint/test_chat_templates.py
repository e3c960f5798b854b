"""Chats as transformers' `apply_chat_template` renders and encodes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from ojfa_export.errors import CheckpointError, UsageError
from ojfa_export.models import template_limits
from ojfa_export.models.checkpoint.chat import read_chat
from ojfa_export.models.checkpoint.tokenizer import read_tokenizer
from ojfa_export.runtime.chat import Chat

CHATML = """{% for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    # A default system message, and roles that must take turns.
    "turns": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'You help.' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant') }}
{%- endif %}
{%- if message['role'] == 'user' %}[INST] {% if loop.first %}{{ system }}

{% endif %}{{ message['content'] | trim }} [/INST]
{%- else %} {{ message['content'] }}{{ eos_token }}{% endif %}
{%- endfor %}""",
    # Tools as JSON, calls of them, the date, loop controls, a namespace.
    "tools": """{%- set found = namespace(last=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set found.last = loop.index0 %}{% endif %}
{%- endfor -%}
Today is {{ strftime_now('%Y-%m-%d') }}, last question {{ found.last }}.
{% if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tools>{{ tools | tojson(indent=2) }}</tools>{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}
{% if message.tool_calls %}{% for call in message.tool_calls -%}
{{ call.function.name }}({{ call.function.arguments | tojson }})
{% endfor %}{% endif %}{{ message.content or '' }}<|im_end|>
{%- endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    # Loops that know how long they are, leave some out, go deeper, or have nothing to go over.
    "loops": """{% macro role(message) %}{{ message.role[:1] * 3 }}{% endmacro -%}
{% for message in messages if message.role != 'system' -%}
{{ loop.index }}/{{ loop.length }} {{ role(message) }}{% if loop.last %}!{% endif %}
{{- loop.cycle('a', 'b') }}{{ loop.previtem.role if loop.previtem is defined }}
{{- loop.nextitem.role if loop.nextitem is defined }}{{ loop.changed(message.role) }}
{% endfor %}
{%- for key, value in {'a': 1, 'b': 2 ** 3}.items() recursive %}{{ key }}{{ value }}
{%- if value == 1 %}{{ loop([('c', 2)]) }}{% endif %}{{ loop.depth }}{% endfor %}
{%- for nothing in [] %}{% else %}none{% endfor %}
{%- for nothing in missing %}{% else %}none{% endfor %}
{%- for letter in 'ab' %}{{ letter }}{% if loop.first %}{% continue %}{% endif %}
{%- break %}{% endfor %}
{%- for at in range(3) | reverse %}{{ at }}{{ loop.revindex }}{% endfor %}""",
    # Reasoning that is cut out of earlier answers, a variable, and what the assistant says marked.
    "thinking": """{% for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif -%}
<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{% generation %}{{ content }}<|im_end|>{% endgeneration %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{% endif %}""",
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "find", "parameters": {"a": "<é> & 'x'", "n": [1, 2.5, None, True]}},
    }
]
SYSTEM = {"role": "system", "content": "Be short."}
CALL = {"function": {"name": "find", "arguments": {"a": 1}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "Hi\n"}],
    "special": [
        {"role": "user", "content": "a<|im_end|>b <|im_start|> <tool> \U000f0000<|im_end|>"}
    ],
    "turns": [
        SYSTEM,
        {"role": "user", "content": " What is 1+1? "},
        {"role": "assistant", "content": "<think>hm</think>\n2"},
        {"role": "user", "content": "é 漢字 \U0001f600"},
    ],
    "called": [
        {"role": "user", "content": "find a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "nothing"},
    ],
    "reasoned": [
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "so", "reasoning": "because"},
    ],
}


CYCLE: dict[str, Any] = {"role": "user", "content": "a"}
CYCLE["again"] = CYCLE


@pytest.fixture
def chat_directory(directory: Path) -> Path:
    """A checkpoint whose tokenizer has tokens of chats, two special and one not."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.save_pretrained(directory)
    return directory


def make(directory: Path, template: str) -> tuple[Chat, Any]:
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = read_tokenizer(directory)
    found = read_chat(directory, tokenizer)
    assert found is not None
    return Chat(found, tokenizer), AutoTokenizer.from_pretrained(directory)


def or_error(function: Any, *arguments: Any, **named: Any) -> Any:
    try:
        return function(*arguments, **named)
    except Exception as error:
        return error


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_those_of_transformers(chat_directory, template, chat, tools) -> None:
    ours, reference = make(chat_directory, TEMPLATES[template])
    messages = CHATS[chat]
    for prompt, variables in ((True, {}), (False, {"enable_thinking": False})):
        said = {"tools": tools, "add_generation_prompt": prompt, **variables}
        expected = or_error(reference.apply_chat_template, messages, tokenize=False, **said)
        if isinstance(expected, Exception):
            with pytest.raises(UsageError, match="chat template") as caught:
                ours.render(messages, **said)
            assert str(expected).splitlines()[0] in caught.value.message
            continue
        assert ours.render(messages, **said) == expected
        ids = reference.apply_chat_template(messages, return_dict=False, **said)
        assert ours.encode(messages, special=True, **said) == ids
        safe = reference.apply_chat_template(
            messages, return_dict=False, sanitize_control_tokens=True, **said
        )
        assert ours.encode(messages, **said) == safe


def test_what_users_write_is_never_a_special_token(chat_directory, rng) -> None:
    ours, reference = make(chat_directory, CHATML)
    special = [reference.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")]
    quiet = ours.encode([{"role": "user", "content": "a"}])
    pieces = ["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "a", " ", "\n", "\U000f0000"]
    for _ in range(20):
        content = "".join(rng.choice(pieces, 12))
        ids = ours.encode([{"role": "user", "content": content}])
        assert [ids.count(each) for each in special] == [quiet.count(each) for each in special]


def test_templates_are_found_where_transformers_finds_them(chat_directory) -> None:
    config = chat_directory / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    named = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
    named += [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "TOOLS"}]
    for template in (CHATML, named):
        config.write_text(json.dumps({**fields, "chat_template": template}))
        reference = AutoTokenizer.from_pretrained(chat_directory)
        ours = read_chat(chat_directory, read_tokenizer(chat_directory))
        assert ours is not None
        for tools in (None, TOOLS):
            expected = reference.get_chat_template(tools=tools)
            assert ours.template(with_tools=tools is not None) == expected
    # A file is taken before the config.
    ours, reference = make(chat_directory, "{{ messages | length }}")
    assert ours.format.template(with_tools=False) == reference.get_chat_template()
    (chat_directory / "chat_template.jinja").unlink()
    config.write_text(json.dumps(fields))
    assert read_chat(chat_directory, read_tokenizer(chat_directory)) is None


def test_the_end_of_a_turn_is_the_templates(chat_directory) -> None:
    ours, reference = make(chat_directory, CHATML)
    assert ours.format.end_token_ids == (reference.convert_tokens_to_ids("<|im_end|>"),)
    ours, _ = make(chat_directory, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert ours.format.end_token_ids == ()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "is no Jinja template"),
        ("x" * (2 << 20), "more than the 1048576"),
    ],
)
def test_damaged_templates_are_refused(chat_directory, template, message) -> None:
    (chat_directory / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=message):
        read_chat(chat_directory, read_tokenizer(chat_directory))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ dict.fromkeys.__globals__ }}",
        "{% for i in range(1000000000) %}{{ i }}{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(chat_directory, template) -> None:
    ours, _ = make(chat_directory, template)
    with pytest.raises(UsageError, match="chat template"):
        ours.render(CHATS["question"])


_LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
_PAIRS = "{% macro pair(n) %}{{ pair(n - 1) ~ pair(n - 1) if n }}{% endmacro %}{{ pair(40) }}"
_GROWS = "{% set a = namespace(n=9) %}{% for i in range(99) %}{% set a.n = a.n * a.n %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (_LONG, "it takes more than 0.05 s"),
        (_PAIRS, "it takes more than 0.05 s"),
        (_GROWS, "huge numbers"),
        ("{{ 10 ** (10 ** 10) }}", "huge numbers"),
        ("{{ 'a' * 10 ** 12 }}", "a huge text"),
        ("{{ (10 ** 12 * ['a']) | length }}", "a huge text"),
    ],
)
def test_templates_without_end_are_stopped(chat_directory, monkeypatch, template, why) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.05)
    ours, _ = make(chat_directory, template)
    with pytest.raises(UsageError, match=rf"chat template is stopped on this chat: .*{why}"):
        ours.render(CHATS["question"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "must be a list of messages"),
        ([], "has no messages"),
        (["Hello"], "a message must be"),
        ([{"role": "user", "content": object()}], "no JSON value"),
        ([{"role": "user", "content": b"a"}], "no JSON value"),
        ([{"role": "user", "content": "\ud800"}], "must be|not text|UTF-8"),
        ([CYCLE], "nested more than 100 deep"),
    ],
)
def test_what_is_no_chat_is_refused(chat_directory, messages, message) -> None:
    ours, _ = make(chat_directory, CHATML)
    for use in (ours.render, ours.encode):
        with pytest.raises(UsageError, match=message):
            use(messages)


@pytest.mark.parametrize("tools", ["x", ["x"], {"a": 1}, 3])
def test_tools_are_a_list_of_schemas(chat_directory, tools) -> None:
    ours, _ = make(chat_directory, CHATML)
    for use in (ours.render, ours.encode):
        with pytest.raises(UsageError, match="tool"):
            use(CHATS["question"], tools=tools)
