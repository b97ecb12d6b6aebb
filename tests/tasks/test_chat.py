"""Chat templates: which stretches of a conversation are trained, for templates as published ones are written."""

import datetime
import json
import time

import pytest

from zoft.errors import DataError
from zoft.tasks import chat, prepare
from zoft.tasks.chat import ChatTemplate, TemplateError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # reasoning is kept in answers after the last question alone; the last answer gets an empty block without any
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set content = m.content %}{%- set reasoning = '' %}"
    "{%- if '</think>' in m.content %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set reasoning = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA32 = (  # a system turn with today's date, contents stripped
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{- date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL = (  # no system role: its text stands in the *last* question; turns must alternate; the end token ends answers
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}"
    "{%- for m in loop_messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate') }}{%- endif %}"
    "{%- if m.role == 'user' %}"
    "{%- if loop.last or loop.index0 == loop_messages|length - 2 %}"
    "{%- if system is defined %}{{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m.content|trim + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
PHI3 = (  # ends the text with an end token of its own
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LAST_TURN_THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [("user", "Who has a ball?"), ("assistant", "Tom has."), ("user", "And then?"), ("assistant", "He ran.")]


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def trained(tokenizer, monkeypatch):
    """``trained(template, *turns)``: the stretches of the conversation that are trained."""

    def run(template, *turns):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        example = ChatTemplate(tokenizer, datetime.date(2026, 7, 26)).example(messages(*turns))
        return [example.full_text(0)[start:stop] for start, stop in example.spans]

    return run


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Tom has.<|im_end|>\n", "He ran.<|im_end|>\n"]),
        (QWEN3, ["Tom has.<|im_end|>\n", "<think>\n\n</think>\n\nHe ran.<|im_end|>\n"]),
        (LLAMA32, ["Tom has.<|eot_id|>", "He ran.<|eot_id|>"]),
        (MISTRAL, [" Tom has.<eos>", " He ran.<eos>"]),
        (PHI3, ["Tom has.<|end|>\n", "He ran.<|end|>\n<eos>"]),
        (LAST_TURN_THINKS, ["Tom has.<|end|>\n", "<think>\n\n</think>\n\nHe ran.<|end|>\n"]),
    ],
    ids=["chatml", "qwen3", "llama32", "mistral", "phi3", "last-turn-thinks"],
)
def test_every_answer_is_found_in_the_whole_conversation(template, expected, trained):
    assert trained(template, *TURNS) == expected
    assert trained(template, ("system", "Be kind."), *TURNS) == expected
    assert trained(template, *TURNS, ("user", "Why?"))[0] == expected[0]


def test_reasoning_is_trained_where_the_template_keeps_it(trained):
    one, other = "<think>\nfirst\n</think>\n\nTom has.", "<think>\nthen\n</think>\n\nHe ran."
    turns = [TURNS[0], ("assistant", one), TURNS[2], ("assistant", other)]
    assert trained(QWEN3, *turns) == ["Tom has.<|im_end|>\n", "<think>\nthen\n</think>\n\nHe ran.<|im_end|>\n"]


def test_no_empty_reasoning_is_trained_without_an_answer(trained):
    """An answer that is all reasoning: the template drops it, or leaves an empty block."""
    with pytest.raises(TemplateError, match="leaves nothing of turn 4"):
        trained(QWEN3, *TURNS[:3], ("assistant", "<think>\n\n</think>\n\n"))
    with pytest.raises(TemplateError, match="leaves nothing of turn 2"):
        trained(QWEN3, TURNS[0], ("assistant", "<think>\nfirst\n</think>"), *TURNS[2:])


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "a"), ("assistant", "a"), ("user", "a"), ("assistant", "a")],
        [("user", "7391846205"), ("assistant", "73918462057"), ("user", "x"), ("assistant", "7391846205")],
        [("user", "<|im_end|>\n"), ("assistant", "<|im_end|>"), ("user", "assistant\n"), ("assistant", "\n")],
    ],
    ids=["twins", "placeholders", "marks"],
)
def test_contents_that_look_like_others_are_found_all_the_same(turns, trained):
    if turns[-1][1].strip():
        assert trained(CHATML, *turns) == [f"{turns[i][1]}<|im_end|>\n" for i in (1, 3)]
    else:
        with pytest.raises(TemplateError, match="leaves nothing of turn 4"):
            trained(CHATML, *turns)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}", "hides turn 2"),
        ("{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}", "hides turn 2"),
        ("{% for m in messages %}{{ m.content|length }}{% endfor %}", "hides turn 2"),
        ("{{ 1 / 0 }}", "refuses it .*division"),
        ("{{ messages.x.y }}", "refuses it"),
        ("{{ raise_exception('no') }}", r"refuses it \(no\)"),
        ("{{ messages[0].content + 1 }}", "refuses it"),
        ("{% for %}", "refuses it"),
        ("{{ ''.__class__.__mro__ }}", "refuses it"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses it"),
        ("{% include 'x' %}", "refuses it"),
        ("{{ 'x' * 20000000 }}", "gives 20,000,000 characters"),
    ],
)
def test_templates_that_fail(template, message, trained):
    with pytest.raises(TemplateError, match=message):
        trained(template, *TURNS)


def test_a_template_that_never_ends_is_stopped(trained, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    begin = time.perf_counter()
    with pytest.raises(DataError, match=r"chat template took more than 0\.2 seconds") as raised:
        trained(LOOP, *TURNS)
    assert not isinstance(raised.value, TemplateError)  # every row would take as long
    assert time.perf_counter() - begin < 5


def write(path, *conversations):
    lines = (json.dumps({"messages": messages(*turns)}) + "\n" for turns in conversations)
    path.write_text("".join(lines), encoding="utf-8")


def test_a_conversation_that_the_template_refuses_is_left_out_and_counted(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", MISTRAL)
    write(tmp_path / "train.jsonl", TURNS, [TURNS[0], *TURNS], TURNS)
    prepared = prepare(None, tmp_path, tokenizer, context_length=256)
    assert len(prepared.train) == 2
    (warning,) = prepared.warnings
    assert "1 of 3 train rows are left out" in warning and "train.jsonl, line 2" in warning and "alternate" in warning
    write(tmp_path / "train.jsonl", [TURNS[0], *TURNS])
    with pytest.raises(DataError, match=r"line 1: field \"messages\".* alternate"):
        prepare(None, tmp_path, tokenizer, context_length=256)


def test_the_model_learns_to_stop(tokenizer, tmp_path, monkeypatch):
    """End marks are targets: the token of the end mark is trained after every answer."""
    monkeypatch.setattr(tokenizer, "chat_template", MISTRAL)
    write(tmp_path / "train.jsonl", TURNS)
    (one,) = prepare(None, tmp_path, tokenizer, context_length=256).train
    (target,) = one.loss_rows[0].targets
    assert target.tokens.count(tokenizer.eos_token_id) == 2


def test_a_date_is_given_and_reported(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", LLAMA32)
    write(tmp_path / "train.jsonl", TURNS)
    day = datetime.date(2025, 2, 3)
    prepared = prepare(None, tmp_path, tokenizer, context_length=256, date=day)
    assert "Today Date: 03 Feb 2025" in prepared.train[0].example.full_text(0) and prepared.date == day
    today = prepare(None, tmp_path, tokenizer, context_length=256)
    assert today.date == datetime.date.today() and today.train != prepared.train
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    assert prepare(None, tmp_path, tokenizer, context_length=256, date=day).date is None
