"""Chat templates, rendered as transformers renders them; and where the files of a model hold them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from saccade.chat.deepseek import DeepSeekFormat
from saccade.chat.find import find_chat_format
from saccade.chat.template import Form, TemplateFormat
from saccade.chat.types import CallDelta, ChatOptions, ReasoningDelta
from saccade.errors import ConfigError, RequestError

# In the manner of GLM: arguments are objects, the switch is enable_thinking, an effort, blocks for training.
OBJECTS = """{{ bos_token }}
{%- for tool in tools or [] %}[{{ tool.function | tojson }}]{% endfor %}
{% if reasoning_effort is defined %}Effort: {{ reasoning_effort }}
{% endif %}
{% for m in messages %}
    {% if m.role == 'skipped' %}{% continue %}{% endif %}
<|{{ m.role }}|>{% generation %}{{ m.content }}{% endgeneration %}
{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}
{% for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }}{% for k, v in call.function.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>{% endfor %}</tool_call>
{%- endfor %}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>' }}{% endif %}"""
# In the manner of DeepSeek-V3.1: arguments are text, the switch is thinking, no content is null.
TEXTS = """{{ bos_token }}{% set ns = namespace(last='') %}
{%- for m in messages %}
{%- if m['role'] == 'assistant' and m['content'] is none %}{% for call in m['tool_calls'] %}{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments'] + '<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>
{%- elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}
{%- else %}{{ '<｜' + m['role'] + '｜>' + m['content'] }}
{%- endif %}{% set ns.last = m['role'] %}{% endfor %}
{%- if add_generation_prompt and ns.last != 'assistant' %}<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {"type": "function", "function": {"name": "f", "description": "<é> 'q'", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}}  # fmt: skip
ARGUMENTS = {"n": 3, "text": 'a "b" é', "deep": {"k": [1, None]}}


def make_format(template: str) -> TemplateFormat:
    return TemplateFormat({"default": template}, TOKENS, "chat_template.jinja")


def make_chats(form: Form) -> list[list[dict[str, Any]]]:
    arguments = ARGUMENTS if form.has_objects else json.dumps(ARGUMENTS, ensure_ascii=False)
    calls = [{"type": "function", "id": "c", "function": {"name": "f", "arguments": arguments}}]
    user, answer = (
        {"role": "user", "content": "héllo"},
        {"role": "assistant", "content": "yes ", "reasoning_content": "hm"},
    )
    asks = {"role": "assistant", "content": form.empty, "tool_calls": calls}
    return [
        [user],
        [{"role": "system", "content": "S"}, user, answer, user],
        [user, asks, {"role": "tool", "content": "r"}],
    ]


@pytest.mark.parametrize(
    ("template", "form"), [(OBJECTS, Form(True, "")), (TEXTS, Form(False, None))], ids=["objects", "texts"]
)
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"thinking": True, "enable_thinking": True},
        {"thinking": False, "enable_thinking": False},
        {"reasoning_effort": "high"},
    ],
)
def test_prompts_are_those_of_transformers(template: str, form: Form, variables: dict[str, Any]) -> None:
    if template is TEXTS and "reasoning_effort" in variables:
        variables = {"thinking": True}  # what an effort means to a template that has none
    for chat in make_chats(form):
        for tools in ([], [TOOL]):
            asked = {"tools": tools or None, "chat_template": template, "add_generation_prompt": True}
            expected = render_jinja_template([json.loads(json.dumps(chat))], **asked, **TOKENS, **variables)[0][0]
            options = ChatOptions(variables=variables)
            assert make_format(template).render(chat, tools, options) == expected
            if "reasoning_effort" in variables:
                assert make_format(template).render(chat, tools, ChatOptions(reasoning_effort="high")) == expected
            if "thinking" in variables:
                for name in ("thinking", "enable_thinking"):
                    options = ChatOptions(variables={name: variables["thinking"]})
                    assert make_format(template).render(chat, tools, options) == expected
                assert (
                    make_format(template).render(chat, tools, ChatOptions(thinking=variables["thinking"])) == expected
                )
    # what clients send, arguments as text, makes the call that the template wants
    chat = make_chats(Form(False, None))[2]
    found = make_format(template).render(chat, [TOOL], ChatOptions(variables=variables))
    asked = {"tools": [TOOL], "chat_template": template, "add_generation_prompt": True}
    assert found == render_jinja_template([make_chats(form)[2]], **asked, **TOKENS, **variables)[0][0]


@pytest.mark.parametrize("template", [OBJECTS, TEXTS])
def test_an_answer_that_goes_on_is_cut_as_by_transformers(template: str) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer"}]
    expected = render_jinja_template([chat], chat_template=template, continue_final_message=True, **TOKENS)[0][0]
    assert make_format(template).render(chat, (), ChatOptions(continues=True)) == expected


def test_a_switch_that_a_template_does_not_have_is_refused() -> None:
    asked, always, never = [{"role": "user", "content": "q"}], make_format("<think>{# </think> #}"), make_format("a")
    for form, options, text in (
        (make_format(TEXTS), ChatOptions(variables={"reasoning_effort": "high"}), "has no variable 'reasoning_effort'"),
        (always, ChatOptions(thinking=False), "thinking: cannot be switched off"),
        (never, ChatOptions(thinking=True), "thinking: this model has none"),
        (never, ChatOptions(reasoning_effort="low"), "reasoning_effort: this model has no thinking"),
    ):
        with pytest.raises(RequestError, match=text):
            form.render(asked, (), options)
    effort = ChatOptions(reasoning_effort="low")
    assert make_format(TEXTS).render(asked, (), effort).endswith("<think>")
    assert always.render(asked, (), ChatOptions(thinking=True)) == "<think>" == always.render(asked, (), effort)
    assert never.render(asked, (), ChatOptions(thinking=False, variables={"x": None})) == "a"
    assert always.render(asked, (), ChatOptions(thinks_unasked=False)) == "<think>"


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    chat = [{"role": "developer", "content": "S"}, {"role": "user", "content": "q"}]
    assert "<|system|>S" in make_format(OBJECTS).render(chat)
    assert "<|developer|>S" in make_format(OBJECTS + "{# developer #}").render(chat)


def test_the_template_says_how_answers_are_read() -> None:
    chat = make_chats(Form(True, ""))[2]
    for template, opens in ((OBJECTS, True), (TEXTS, False)):
        written = make_format(template)
        prompt = written.render(chat[:1], [TOOL])
        text = written.render(chat[:2], [TOOL]).removeprefix(
            written.render(chat[:1], [TOOL]).rpartition("<|assistant|>" if opens else "<｜Assistant｜>")[0]
        )
        text = ("hm</think>" if opens else "") + text[text.index("<tool_call>" if opens else "<｜tool▁calls") :]
        parser = written.new_parser(prompt, [TOOL])
        deltas = [*parser.feed(text), *parser.finish()]
        assert [delta.text for delta in deltas if isinstance(delta, ReasoningDelta)] == ["hm"] * opens
        (found,) = [delta for delta in deltas if isinstance(delta, CallDelta)]
        assert (found.name, json.loads(found.arguments)) == ("f", ARGUMENTS)


ERRORS = {
    "raised": ("{{ raise_exception('roles must\nalternate') }}", RequestError, "the template chat_template.jinja refuses these messages: roles must alternate"),
    "undefined": ("{{ messages[0].a.b }}", RequestError, "the template chat_template.jinja refuses these messages: 'dict object' has no attribute 'a'"),
    "no template": ("{% if %}", ConfigError, "chat_template.jinja: no template that jinja2 reads: line 1: Expected an expression, got 'end of statement block'"),
    "out of the sandbox": ("{{ ''.__class__.__mro__ }}", RequestError, "the template chat_template.jinja refuses these messages: access to attribute '__class__' of 'str' object is unsafe."),
    "changes": ("{{ messages.append(1) }}", RequestError, "the template chat_template.jinja refuses these messages: access to attribute 'append' of 'list' object is unsafe."),
    "endless": ("{% for i in range(1000000000) %}{% endfor %}", RequestError, "the template chat_template.jinja refuses these messages: Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."),
    "python": ("{{ 1 / 0 }}", RequestError, "the template chat_template.jinja refuses these messages: division by zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_goes_wrong_in_a_template_is_one_line(name: str) -> None:
    template, kind, text = ERRORS[name]
    with pytest.raises(kind) as found:
        make_format(template).render([{"role": "user", "content": "q"}])
    assert str(found.value) == text


def write(folder: Path, config: object = None, **files: str) -> Path:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / f"{name}.jinja").write_text(text)
    return folder


def show(folder: Path, tools: Any = (), **options: Any) -> str:
    return find_chat_format(folder, "glm_moe_dsa").render(
        [{"role": "user", "content": "q"}], tools, ChatOptions(**options)
    )


def test_templates_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    plain = {"chat_template": "{{ bos_token }}config", "bos_token": {"content": "<s>"}, "eos_token": None}
    assert show(write(tmp_path, plain)) == "<s>config"
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two{{ eos_token }}"}, 3]
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    write(tmp_path, plain | {"chat_template": named})
    assert (show(tmp_path), show(tmp_path, [TOOL]), show(tmp_path, template="tool_use")) == (
        "one",
        "two</s>",
        "two</s>",
    )
    with pytest.raises(RequestError, match="has default, tool_use, found 'three'"):
        show(tmp_path, template="three")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/three.jinja").write_text("three")
    assert show(write(tmp_path, chat_template="{{ bos_token }}file")) == "<s>file"
    assert show(tmp_path, template="three") == "three"
    assert find_chat_format(tmp_path, "glm_moe_dsa", "given").render([{"role": "user", "content": "q"}]) == "given"


def test_a_model_without_a_template_has_its_encoding_or_none(tmp_path: Path) -> None:
    assert isinstance(find_chat_format(tmp_path, "deepseek_v32"), DeepSeekFormat)
    with pytest.raises(ConfigError, match="no chat template: no chat_template.jinja, none in tokenizer_config.json"):
        find_chat_format(tmp_path, "glm_moe_dsa")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="chat_template.jinja: byte 0 is no text in UTF-8"):
        find_chat_format(tmp_path, "deepseek_v32")
    (tmp_path / "chat_template.jinja").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than 1,048,576 bytes, so it is no chat template"):
        find_chat_format(tmp_path, "deepseek_v32")
