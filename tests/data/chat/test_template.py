"""Rendering of conversations: the same text as transformers', in its sandbox."""

import pytest
from chat_templates import template_source
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hqqtrain.common.errors import UserError
from hqqtrain.data.chat.template import ChatTemplate, RenderError
from hqqtrain.models.source import TINY_FOLDER

MESSAGES = ({"role": "user", "content": "Q", "name": None}, {"role": "assistant", "content": "A"})
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}{{ m.name is defined }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    tokenizer.bos_token = "<s>"
    return tokenizer


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(tokenizer, tools, prompt: bool):
    ours = ChatTemplate(tokenizer, TEMPLATE).render(MESSAGES, tools, add_generation_prompt=prompt)
    assert ours == tokenizer.apply_chat_template(
        list(MESSAGES), tools=tools and list(tools), chat_template=TEMPLATE,
        add_generation_prompt=prompt, tokenize=False,
    )  # fmt: skip


def test_the_template_of_the_tokenizer_is_the_default(tokenizer):
    with pytest.raises(UserError, match=r"data.chat_template=auto: .* no chat template.*chatml"):
        ChatTemplate(tokenizer)
    tokenizer.chat_template = TEMPLATE
    text = ChatTemplate(tokenizer).render(MESSAGES)
    assert text == "<s>[userFalse]Q[assistantFalse]A"


def test_one_of_several_templates_is_for_tools(tokenizer):
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    assert ChatTemplate(tokenizer).render(MESSAGES) == "plain"
    assert ChatTemplate(tokenizer).render(MESSAGES, TOOLS) == "tools"


def test_marks_are_the_spans_of_what_is_generated(tokenizer):
    template = ChatTemplate(tokenizer, TEMPLATE)
    text, marks = template.render_with_marks(MESSAGES)
    assert [text[begin:end] for begin, end in marks] == ["A"]
    assert template.has_marks()
    assert not ChatTemplate(tokenizer, "{# generation #}").has_marks()


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[9].content }}",
        "{% for",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_fails_or_leaves_its_sandbox_is_refused(tokenizer, source: str):
    with pytest.raises(RenderError):
        ChatTemplate(tokenizer, source).render(MESSAGES)


def test_a_multimodal_template_gets_content_in_parts(tokenizer):
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}|{% endfor %}"
    assert ChatTemplate(tokenizer, source).render(MESSAGES) == "Q|A|"


def test_special_tokens_of_a_text(tokenizer):
    template = ChatTemplate(tokenizer, TEMPLATE)
    assert template.first_special("<s>[INST]") == "<s>"
    assert template.first_special("<|im_end|>\n") == "<|im_end|>"
    assert template.first_special("text<s>") == ""
    assert template.end_of_last_special("a<s>b<|x|>c") == len("a<s>b<|x|>")
    assert template.end_of_last_special("a < b > c") == 0


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Malmö"}}}
CALLED = '{"city": "Malmö"}'


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("yujiepan-deepseek-v3-tiny-random", f"weather\n```json\n{CALLED}\n```"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", f"weather\n```json\n{CALLED}\n```"),
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", f"weather\n```json\n{CALLED}\n```"),  # tojson
        ("tencent-DeepSeek-V3.1-Terminus-W4AFP8", f"weather<\uff5ctool\u2581sep\uff5c>{CALLED}"),
        ("deepseek-ai-DeepSeek-V3.1", f"weather<\uff5ctool\u2581sep\uff5c>{CALLED}"),  # tojson
        ("trl/qwen3", CALLED),
    ],
)
@pytest.mark.parametrize("content", ["", None])
def test_arguments_are_given_in_the_form_that_the_template_reads(name, shown, content):
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    template = ChatTemplate(tokenizer, template_source(name))
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    text = template.render([{"role": "user", "content": "Rain?"}, call])
    assert text.count(shown) == 1
    assert CALL["function"]["arguments"] == {"city": "Malmö"}  # the message stays as it was
