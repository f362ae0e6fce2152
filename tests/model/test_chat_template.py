from __future__ import annotations

import time

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from pagestream.model.chat_template import ChatTemplate, TemplateError
from pagestream.model.errors import ModelError

LLAMA3 = """{%- set date = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if tools is not none %}{{- "Environment: ipython" }}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- macro block(role, content) %}{{ '<|im_start|>' ~ role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}{% endmacro %}
{%- set ns = namespace(users=0) %}
{%- if tools %}{{ raise_exception("no tools") }}{% endif %}
{%- for message in messages recursive %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}{% set ns.users = ns.users + 1 %}{% endif %}
    {{- block(message.role, message.content) }}
    {%- if loop.last %}{{- {'users': ns.users, 'é': '<&>'} | tojson }}{{ loop.length }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- generation %}{{ '<think>' }}{% endgeneration %}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ message['content'] + eos_token }}
    {% else %}
        {{ raise_exception('Only user and assistant roles are supported!') }}
    {% endif %}
{% endfor %}
"""
CHATS = [
    [{"role": "user", "content": "Hello, <b>world</b>! "}],
    [
        {"role": "user", "content": "1\n2"},
        {"role": "assistant", "content": "naïve 👍🏽"},
        {"role": "user", "content": ""},
    ],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "{{ bos_token }}{% raw %}"}],
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def oracle(byte_level_backend: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_backend, **SPECIAL)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("source", [LLAMA3, QWEN, MISTRAL], ids=["llama3", "qwen", "mistral"])
def test_renders_as_transformers(
    oracle: PreTrainedTokenizerFast, source: str, chat: list[dict[str, str]], prompt: bool
) -> None:
    template = ChatTemplate(source, SPECIAL)
    if source is MISTRAL and chat[0]["role"] == "system":
        with pytest.raises(TemplateError, match=r"^Conversation roles must alternate"):
            template.render(chat, add_generation_prompt=prompt)
        return
    expected = oracle.apply_chat_template(chat, chat_template=source, add_generation_prompt=prompt, tokenize=False)
    assert template.render(chat, add_generation_prompt=prompt) == expected


def test_a_syntax_error_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"cannot be compiled: line 2: .*endfor"):
        ChatTemplate("\n{% for m in messages %}{% endif %}", {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only one message, please') }}", "^only one message, please$"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 // 0 }}", "by zero"),
    ],
)
def test_an_error_while_rendering_keeps_the_templates_words(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source, {}).render(CHATS[0], add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include 'file' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(CHATS[0], add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
        "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    ],
)
def test_a_runaway_template_ends(source: str) -> None:
    started = time.process_time()
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(CHATS[0], add_generation_prompt=True)
    assert time.process_time() - started < 30
