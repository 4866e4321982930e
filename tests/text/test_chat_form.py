"""Templates of every make, and templates that are wrong: the mask is exact in every turn, or refused."""

# ruff: noqa: E501  (templates are easier to read unbroken)
from __future__ import annotations

import re
from functools import cache

import pytest
import tiny_hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.text.chat import prompt_ids, render
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import ByteTokenizer

LOOP = "{% for m in messages %}"
CLOSE = "{% endfor %}"
ASKED = "{% if add_generation_prompt %}"


def chatml(answer: str = "{{ m.content }}<|im_end|>", asked: str = "<|im_start|>assistant\n") -> str:
    """ChatML whose answers are written otherwise."""
    return (
        LOOP
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content }}"
        "<|im_end|>{% endif %}{{ '\n' }}" + CLOSE + ASKED + asked + "{% endif %}"
    )


def marked(answer: str) -> str:
    return "{% generation %}" + answer + "{% endgeneration %}"


QWEN3 = (
    "{% set ns = namespace(last=0) %}" + LOOP + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    + CLOSE + LOOP + "{% set thought = '' %}{% set said = m.content %}"
    "{% if m.role == 'assistant' %}{% if m.reasoning_content %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{{ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + said + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endif %}" + CLOSE
    + ASKED + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% set opening = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set opening = '' %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turns!') }}"
    "{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (opening if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}" + CLOSE
)
PHI3 = (
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}" + CLOSE
    + ASKED + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)  # fmt: skip
ZEPHYR = (
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}" + CLOSE
)
GEMMA = (
    "{{ bos_token }}{% set opening = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set opening = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}{{ '<turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
    "{{ (opening if loop.first else '') + m.content | trim + '</turn>\n' }}" + CLOSE
    + ASKED + "{{ '<turn>model\n' }}{% endif %}"
)  # fmt: skip
VICUNA = (
    "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
    "{% else %}{{ m.content + ' ' }}{% endif %}" + CLOSE + ASKED + "{{ 'ASSISTANT:' }}{% endif %}"
)  # fmt: skip
HARMONY = (
    LOOP + "{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}" + CLOSE
    + ASKED + "{{ '<|start|>assistant' }}{% endif %}"
)  # fmt: skip
NEVER = LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + CLOSE
ALWAYS = NEVER + "{{ '<|im_start|>assistant\n' }}"

CHATML = tiny_hf.CHATML_SPECIAL
PHI = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PARTS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
LLAMA3 = {"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>"}


level = tiny_hf.byte_level
HEADER = "<|im_start|>assistant\n"
WRITES = "{{ m.content }}<|im_end|>"
TOGETHER = (
    LOOP + "{% if m.role == 'assistant' %}" + marked(HEADER + WRITES) + "{% else %}<|im_start|>{{ m.role }}\n"
    + WRITES + "{% endif %}{{ '\n' }}" + CLOSE + ASKED + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
# Name -> the files, and how the answers "cat" and " the end " are written, the latter being the last.
TRAINED = {
    "chatml": (level(CHATML, tiny_hf.CHATML), "cat<|im_end|>", " the end <|im_end|>"),
    "qwen 2.5": (level(CHATML, tiny_hf.DEFAULT_SYSTEM), "cat<|im_end|>", " the end <|im_end|>"),
    "qwen 3": (level(CHATML, QWEN3), "cat<|im_end|>", "<think>\n\n</think>\n\n the end <|im_end|>"),
    "llama 2": (tiny_hf.metaspace(LLAMA2), " cat </s>", " the end </s>"),
    "llama 3": (level(tiny_hf.LLAMA3_SPECIAL, tiny_hf.LLAMA3, **LLAMA3), "cat<|eot|>", "the end<|eot|>"),
    "mistral": (tiny_hf.metaspace(tiny_hf.MISTRAL), " cat</s>", "  the end </s>"),
    "gemma": (tiny_hf.metaspace(GEMMA, tiny_hf.GEMMA_SPECIAL), "cat</turn>", "the end</turn>"),
    "phi 3": (level(PHI, PHI3, eos_token="<|endoftext|>"), "cat<|end|>", " the end <|end|>"),
    "zephyr": (tiny_hf.metaspace(ZEPHYR), "cat</s>", " the end </s>"),
    "vicuna": (tiny_hf.metaspace(VICUNA), " cat</s>", "  the end </s>"),
    "harmony": (
        level(PARTS, HARMONY), "<|channel|>final<|message|>cat<|end|>",
        "<|channel|>final<|message|> the end <|return|>",
    ),
    "always opens": (level(CHATML, ALWAYS), "cat<|im_end|>", " the end <|im_end|>"),
    "always opens, its own system": (level(CHATML, tiny_hf.DEFAULT_SYSTEM.split("{% if add")[0] + "{{ '<|im_start|>assistant\n' }}"), "cat<|im_end|>", " the end <|im_end|>"),
    "never opens": (level(CHATML, NEVER), "cat<|im_end|>", " the end <|im_end|>"),
    "never opens, a space": (tiny_hf.metaspace(VICUNA.split(ASKED)[0]), " cat</s>", "  the end </s>"),
    "marked": (level(CHATML, chatml(marked(WRITES))), "cat<|im_end|>", " the end <|im_end|>"),
    "marked, no end": (
        level(CHATML, chatml(marked("{{ m.content }}") + "<|im_end|>")), "cat<|im_end|>", " the end <|im_end|>"
    ),
    "marked with the header": (level(CHATML, TOGETHER), "cat<|im_end|>", " the end <|im_end|>"),
    "marked with a line": (level(CHATML, chatml(marked(WRITES + "{{ '\n' }}"))), "cat<|im_end|>", " the end <|im_end|>"),
    "marked with two ends": (
        level(CHATML, chatml(marked(WRITES + "{% if loop.last %}{{ '\n' + pad_token }}{% endif %}"))),
        "cat<|im_end|>", " the end <|im_end|>",
    ),
    "marked with a thought of the prompt": (
        level(CHATML, chatml(marked("<think>" + WRITES), asked=HEADER + "<think>")), "cat<|im_end|>", " the end <|im_end|>"
    ),
    "marked with half the header": (
        level(CHATML, TOGETHER.replace(marked(HEADER + WRITES), HEADER[:-1] + marked("{{ '\n' }}" + WRITES))),
        "cat<|im_end|>", " the end <|im_end|>",
    ),
    "two ends": (
        level(CHATML, chatml("{{ m.content }}<|im_end|><|endoftext|>")),
        "cat<|im_end|><|endoftext|>", " the end <|im_end|><|endoftext|>",
    ),
    "marked, trimmed": (
        level(CHATML, chatml(marked("{{ m.content | trim }}<|im_end|>"))), "cat<|im_end|>", "the end<|im_end|>"
    ),
    "marked, never opens": (
        level(CHATML, chatml(marked(WRITES)).split(ASKED)[0]), "cat<|im_end|>", " the end <|im_end|>"
    ),
}  # fmt: skip


@cache
def make(name: str) -> HFTokenizer:
    return HFTokenizer(TRAINED[name][0], name)


def written(template: str) -> HFTokenizer:
    return HFTokenizer(level(CHATML, template))


def turns(*contents: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def shown(tokenizer: HFTokenizer, ids: list[int]) -> str:
    return b"".join(tokenizer.names.get(i, "").encode() or tokenizer.piece_bytes(i) for i in ids).decode()


def trained(tokenizer: HFTokenizer, messages: list[dict]) -> list[str]:
    """The stretches that are trained, as text."""
    example = render(messages, tokenizer)
    ids = [i if w else -1 for i, w in zip(example.tokens, example.weights, strict=True)]
    parts = re.findall(r"(?:\d+,)+", "".join(f"{i}," if i >= 0 else " " for i in ids))
    return [shown(tokenizer, [int(i) for i in part.split(",")[:-1]]) for part in parts]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("system", [None, "hello"])
def test_every_answer_and_its_end_are_trained_and_nothing_else(name: str, system: str | None) -> None:
    tokenizer, (_, first, last) = make(name), TRAINED[name]
    whole = turns("hello", "cat", "world", " the end ", system=system)
    assert trained(tokenizer, whole) == [first, last]
    assert trained(tokenizer, [*whole, *turns("sat")])[0] == first
    for ending in ("<|im_end|>", "</s>", "<|eot|>", "</turn>", "<|end|>", "<|return|>"):
        if last.endswith(ending):
            assert tokenizer.special[ending] in tokenizer.stop_ids or ending == "<|return|>"


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_follows_the_prompt(name: str) -> None:
    tokenizer, last = make(name), TRAINED[name][-1]
    question, whole = turns("hello"), turns("hello", " the end ")
    prompt, example = prompt_ids(question, tokenizer), render(whole, tokenizer)
    assert example.tokens[: len(prompt)] == prompt
    assert example.weights[: len(prompt) + 1] == [0.0] * len(prompt) + [1.0]
    assert trained(tokenizer, whole) == [last]


@pytest.mark.parametrize("name", TRAINED)
def test_an_answer_that_is_not_to_be_learned_has_no_weight_at_all(name: str) -> None:
    tokenizer, (_, first, last) = make(name), TRAINED[name]
    whole = turns("hello", "cat", "world", " the end ")
    assert trained(tokenizer, [*whole[:1], whole[1] | {"learn": False}, *whole[2:]]) == [last]
    assert trained(tokenizer, [*whole[:3], whole[3] | {"learn": False}]) == [first]
    assert render(whole, tokenizer).tokens == render([m | {"learn": False} for m in whole], tokenizer).tokens


def test_a_long_dialogue_is_rendered_in_parts() -> None:
    words = [word for i in range(60) for word in (f"{i} " + "the cat sat " * 3500, str(i))]
    assert trained(make("llama 3"), turns(*words)) == [f"{i}<|eot|>" for i in range(60)]


def test_thoughts_are_trained_where_they_are_written() -> None:
    tokenizer = make("qwen 3")
    said = turns("hello", "<think>\nsat\n</think>\n\ncat", "world", "<think>\nthe\n</think>\n\nend")
    after = ["cat<|im_end|>", "<think>\nthe\n</think>\n\nend<|im_end|>"]
    assert trained(tokenizer, said) == after
    apart = turns("hello", "cat", "world", "end")
    apart[1]["reasoning_content"], apart[3]["reasoning_content"] = "sat", "the"
    assert trained(tokenizer, apart) == after


REFUSED = {
    "no end of turn": (LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}" + CLOSE
                       + ASKED + "{{ '<|im_start|>assistant\n' }}{% endif %}", "after an answer, where no control token"),
    "no end, always opens": (LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}" + CLOSE
                             + "{{ '<|im_start|>assistant\n' }}", "after an answer, where its end and the opening"),
    "an end in letters": (chatml("{{ m.content }}[END]"), r"writes '\[END\]\\n' after an answer"),
    "another prompt": (chatml(asked="<|im_start|>model\n"), "ends a prompt with"),
    "a thought in the prompt alone": (chatml(asked="<|im_start|>assistant\n<think>\n"), "answer without it before"),
    "no content": (chatml("yes<|im_end|>"), "leaves out the text of turns"),
    "no content, marked": (chatml(marked("yes<|im_end|>")), "leaves out the text of turns"),
    "content twice": (chatml("{{ m.content + m.content }}<|im_end|>"), "exactly once"),
    "marks nothing": (chatml("{% if 0 %}" + marked("") + "{% endif %}{{ m.content }}<|im_end|>"), "marks none"),
    "knows no answers": (LOOP + "{% if m.role == 'assistant' %}{{ raise_exception('mute') }}{% endif %}" + CLOSE, "mute"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_whose_answers_cannot_be_told_is_refused_by_what_it_does(name: str) -> None:
    template, why = REFUSED[name]
    with pytest.raises(UserError, match=why) as caught:
        render(turns("hello", "cat"), written(template))
    assert str(caught.value).startswith("the chat template of the tokenizer ")


def test_an_end_after_the_last_answer_alone_is_refused_where_another_has_none() -> None:
    once = (
        LOOP
        + "{{ m.role + ': ' + m.content + '\n' }}"
        + CLOSE
        + ASKED
        + "assistant:{% else %}<|im_end|>{% endif %}"
    )
    assert trained(written(once), turns("hello", "cat")) == [" cat\n<|im_end|>"]
    with pytest.raises(UserError, match="where no control token ends it"):
        render(turns("hello", "cat", "hello", "cat"), written(once))


def test_thoughts_in_the_prompt_are_given_and_not_trained() -> None:
    tokenizer = written(chatml(asked="<|im_start|>assistant\n<think>\n"))
    assert trained(tokenizer, turns("hello", "<think>\nthe\n</think>\ncat")) == [
        "the\n</think>\ncat<|im_end|>"
    ]


# ------------------------------------------------------------------------------------------- tools

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "sat"}}}
TEXTUAL = {**CALL, "function": {"name": "look", "arguments": '{"at": "sat"}'}}


def called(call: dict) -> list[dict]:
    return [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "the <|im_end|>", "tool_call_id": "c1", "name": "look"},
        {"role": "assistant", "content": "cat"},
    ]


SAID = '<tool_call>\n{"name": "look", "arguments": {"at": "sat"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("call", [CALL, TEXTUAL])
def test_calls_are_trained_and_what_tools_answer_is_not(call: dict) -> None:
    tokenizer = make("qwen 3")
    assert trained(tokenizer, called(call)) == ["\n" + SAID, "<think>\n\n</think>\n\ncat<|im_end|>"]
    whole = render(called(call), tokenizer).tokens
    assert "<|im_start|>user\n<tool_response>\nthe <|im_end|>\n</tool_response><|im_end|>" in shown(
        tokenizer, whole
    )
    assert whole.count(tokenizer.special["<|im_end|>"]) == 4  # that of the tool's text is text
    prompt = prompt_ids(called(call)[:-1], tokenizer)
    assert whole[: len(prompt)] == prompt
    silent = [m | {"learn": False} if m.get("tool_calls") else m for m in called(call)]
    assert trained(tokenizer, silent) == ["<think>\n\n</think>\n\ncat<|im_end|>"]


def test_a_call_is_trained_where_no_other_answer_can_stand() -> None:
    template = (  # as Mistral's and that of gpt-oss
        "{% set ns = namespace(called=false) %}"
        + LOOP
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.tool_calls %}{% set ns.called = true %}[CALLS]{{ m.tool_calls[0].function | tojson }}</s>"
        "{% elif m.role == 'tool' %}{% if not ns.called %}{{ raise_exception('no call') }}{% endif %}"
        "[RESULTS]{{ m.content }}[/RESULTS]{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}" + CLOSE
    )
    special = ["<s>", "</s>", "[INST]", "[/INST]", "[CALLS]", "[RESULTS]", "[/RESULTS]"]
    tokenizer = HFTokenizer(level(special, template, eos_token="</s>"))
    messages = [*turns("hello", "cat"), *called(TEXTUAL)]
    calls = '[CALLS]{"name": "look", "arguments": {"at": "sat"}}</s>'
    assert trained(tokenizer, messages) == [" cat</s>", calls, " cat</s>"]
    assert prompt_ids(messages[:-1], tokenizer)[-1] == tokenizer.special["[/RESULTS]"]


def test_arguments_are_texts_for_a_template_that_takes_them_so() -> None:
    joins = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '[' + c.function.arguments + ']' }}{% endfor %}<|im_end|>"
    prints = joins.replace("'[' + c.function.arguments + ']'", "c.function.arguments")
    assert trained(written(chatml(joins)), called(TEXTUAL))[0] == '[{"at": "sat"}]<|im_end|>'
    assert trained(written(chatml(prints)), called(TEXTUAL))[0] == '{"at": "sat"}<|im_end|>'
    assert trained(written(chatml(prints)), called(CALL))[0] == "{'at': 'sat'}<|im_end|>"  # it is asked to


NO_TOOLS = (
    LOOP + "{% if m.role == 'assistant' %}" + HEADER + WRITES + "{% elif m.role in ('user', 'system') %}"
)
AS_USER = (
    LOOP
    + "{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    + WRITES
    + "{% else %}<|im_start|>user\n"
    + WRITES
)
AS_ANSWER = (
    LOOP
    + "{% if m.role == 'user' %}<|im_start|>user\n"
    + WRITES
    + "{% else %}<|im_start|>assistant\n"
    + WRITES
)
REST = "{% endif %}{{ '\n' }}" + CLOSE + ASKED + "{{ '<|im_start|>assistant\n' }}{% endif %}"
TOOL = [*turns("hello"), {"role": "tool", "content": "world"}, {"role": "assistant", "content": "cat"}]
LEFT_OUT = {
    "no tools": (NO_TOOLS + "<|im_start|>{{ m.role }}\n" + WRITES + REST, TOOL, "leaves out turns of the role 'tool'"),
    "tools as users": (AS_USER + REST, TOOL, "turns of the role 'tool' as those of 'user'"),
    "tools as answers": (AS_ANSWER + REST, TOOL, "turns of the role 'tool' as those of 'assistant'"),
    "no system": (NO_TOOLS.replace("system", "nobody") + "<|im_start|>user\n" + WRITES + REST,
                  turns("hello", "cat", system="the"), "leaves out turns of the role 'system'"),
    "system as answer": (AS_ANSWER + REST, turns("hello", "cat", system="the"), "'system' as those of 'assistant'"),
    "no calls": (tiny_hf.CHATML, called(CALL), "leaves out 'tool_calls' of a turn of the role 'assistant'"),
    "no thoughts": (tiny_hf.CHATML, [*turns("hello"), {"role": "assistant", "content": "cat", "reasoning_content": "sat"}],
                    "leaves out 'reasoning_content' of a turn of the role 'assistant'"),
    "no text beside a call": (
        chatml("{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>"),
        [*called(CALL)[:1], called(CALL)[1] | {"content": "cat"}, *called(CALL)[2:]], "leaves out the content of a turn that has 'tool_calls'",
    ),
    "no later system": (
        LOOP + "{% if m.role != 'system' or loop.first %}" + chatml().removeprefix(LOOP).replace(CLOSE, "{% endif %}" + CLOSE),
        [*turns("hello", "cat", system="the"), *turns("hello", "cat", system="end")], "leaves out turns of the role 'system'",
    ),
    "refused": (LOOP + "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CLOSE, TOOL, "no tools"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_nothing_is_left_out_without_a_word(name: str) -> None:
    template, messages, why = LEFT_OUT[name]
    tokenizer = written(template)
    for _ in range(2):
        with pytest.raises(UserError, match=why):
            render(messages, tokenizer)
    asked = messages if messages[-1]["role"] != "assistant" or len(messages[-1]) > 2 else messages[:-1]
    with pytest.raises(UserError, match=why):
        prompt_ids(asked, tokenizer)


def test_parts_that_are_empty_and_names_are_no_loss() -> None:
    messages = turns("hello", "cat")
    more = [messages[0] | {"name": "sat"}, messages[1] | {"tool_calls": [], "reasoning_content": None}]
    for tokenizer in (make("chatml"), ByteTokenizer()):
        assert render(more, tokenizer) == render(messages, tokenizer)


def test_jaxgpts_own_template_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UserError, match="jaxgpt's own has no turns of tools"):
        render(TOOL, ByteTokenizer())
    with pytest.raises(UserError, match="jaxgpt's own writes no tool_calls"):
        render(called(CALL)[:2], ByteTokenizer())
    quiet = [m | {"learn": False} for m in turns("hello", "cat")]
    assert not any(render(quiet, ByteTokenizer()).weights)


# ------------------------------------------------------------------------- templates of any make

MARKS = [*CHATML, "<s>", "</s>", "<|user|>", "<|assistant|>"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    start=st.sampled_from(["", "<s>", "<|im_start|>system\nthe<|im_end|>\n"]),
    user=st.sampled_from([("<|user|>", ""), ("<|im_start|>user\n", "<|im_end|>\n"), ("USER: ", "\n"), ("[INST] ", " [/INST]")]),
    header=st.sampled_from(["", "<|assistant|>", "<|assistant|>\n", "<|im_start|>assistant\n", "ASSISTANT:", "\n### Answer:\n"]),
    lead=st.sampled_from(["", " "]),
    end=st.sampled_from(["</s>", "<|im_end|>", " </s>", "</s><|endoftext|>", "", "\n"]),
    after=st.sampled_from(["", "\n"]),
    asked=st.sampled_from(["if asked", "always", "never"]),
    last=st.sampled_from(["", "<|endoftext|>"]),
    trim=st.booleans(),
    mark=st.booleans(),
)  # fmt: skip
def test_the_mask_of_any_template_is_exact_or_it_is_refused(
    start, user, header, lead, end, after, asked, last, trim, mark
) -> None:
    def text(written: str) -> str:
        return f"{{{{ {written!r} }}}}" if written else ""

    answer = text(lead) + ("{{ m.content | trim }}" if trim else "{{ m.content }}") + text(end)
    opens = {
        "if asked": ASKED + text(header) + "{% else %}" + text(last) + "{% endif %}",
        "always": text(header),
    }
    template = (
        text(start) + LOOP + "{% if m.role == 'user' %}" + text(user[0]) + "{{ m.content }}" + text(user[1])
        + "{% else %}" + text(header) + (marked(answer) if mark else answer) + text(after) + "{% endif %}" + CLOSE
        + opens.get(asked, text(last))
    )  # fmt: skip
    tokenizer = HFTokenizer(level(MARKS, template, eos_token="</s>"))
    expected = [lead + (c.strip() if trim else c) + end for c in ("cat", "the end ")]
    messages = turns("hello", "cat", "world", "the end ")
    ends = end not in ("", "\n")
    if asked == "never":  # a prompt must not end as a text does
        ordinary = ends and (mark or not last)
    else:  # a turn of its own, that may end as an answer does, hides where an opening begins that is always there
        ordinary = ends and (mark or asked == "if asked" or not header or not start.endswith("<|im_end|>\n"))
    try:
        found = trained(tokenizer, messages)
    except UserError as error:
        assert not ordinary, error
        assert "what to train cannot be told" in str(error)
        return
    if not ends:  # marks are taken at their word; else the last end of the text is the answer's
        assert mark or last, found
        return
    assert found == expected
