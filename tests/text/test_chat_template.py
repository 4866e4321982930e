"""Chat templates: the ids of transformers, and a loss on the answers alone."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny_hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.text.chat import prompt_ids, render
from jaxgpt.text.hf_tokenizer import HFTokenizer

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "chat_template.json").read_text())
NAMES = list(tiny_hf.TOKENIZERS)
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
SPECIAL = [*tiny_hf.CHATML_SPECIAL, *tiny_hf.LLAMA3_SPECIAL, *tiny_hf.GEMMA_SPECIAL, "</s>", "[/INST]"]
END = dict.fromkeys(NAMES, "<|im_end|>") | {"llama3": "<|eot|>", "mistral": "</s>", "gemma": "</turn>"}
TRIMS = ("llama3", "gemma")
content = st.one_of(
    st.text(max_size=20).filter(lambda t: not set(t) & set("\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\u2581")),
    st.lists(
        st.sampled_from([*SPECIAL, " ", "\n", "the", "cat", "好", "😀", "<|im_", "end|>", "assistant"])
    ).map("".join),
)
pairs = st.lists(st.tuples(content, content), min_size=1, max_size=3)


@cache
def make(name: str) -> HFTokenizer:
    return HFTokenizer(tiny_hf.TOKENIZERS[name], name)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def show(tokenizer: HFTokenizer, ids: list[int]) -> str:
    pieces = (tokenizer.names.get(i, "").encode() or tokenizer.piece_bytes(i) for i in ids)
    return b"".join(pieces).decode("utf-8", "replace")


def trained(tokenizer: HFTokenizer, messages: list[dict[str, str]]) -> list[str]:
    """The stretches of a dialogue that are trained, as text with control tokens named."""
    example = render(messages, tokenizer)
    stretches: list[list[int]] = []
    before = 0.0
    for token, weight in zip(example.tokens, example.weights, strict=True):
        if weight:
            stretches += [] if before else [[]]
            stretches[-1].append(token)
        before = weight
    return [show(tokenizer, part) for part in stretches]


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_masks_are_those_of_transformers(name):
    tokenizer = make(name)
    for messages, row in zip(tiny_hf.DIALOGUES, GOLDENS[name]["dialogues"], strict=True):
        if "error" in row:
            with pytest.raises(UserError, match=row["error"]):
                render(messages, tokenizer)
            continue
        assert prompt_ids(messages, tokenizer) == row["prompt"]
        example = render(messages, tokenizer)
        assert example.tokens == row["ids"]
        if row["mask"]:
            assert example.weights == row["mask"]


BY_HAND = {
    "chatml": ["cat\n\n <|im_end|>", "the end<|im_end|>"],
    "default system": ["cat\n\n <|im_end|>", "the end<|im_end|>"],
    "marked": ["cat\n\n <|im_end|>", "the end<|im_end|>"],
    "thinking": ["cat\n\n <|im_end|>", "<think>\n\n</think>\n\nthe end<|im_end|>"],  # before the last alone
    "llama3": ["cat<|eot|>", "the end<|eot|>"],
    "mistral": [" cat\n\n </s>", " the end</s>"],
    "gemma": ["cat</turn>", "the end</turn>"],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_the_one_made_by_hand(name):
    tokenizer = make(name)
    messages = chat("cat\n", "cat\n\n ", "assistant", "the end")
    assert trained(tokenizer, messages) == BY_HAND[name]
    if name != "thinking":
        assert trained(tokenizer, messages[:2]) == BY_HAND[name][:1]
    if name != "gemma":  # Mistral moves the system message on to the last question
        assert trained(tokenizer, [{"role": "system", "content": "the system"}, *messages]) == BY_HAND[name]
    assert trained(tokenizer, [*messages, *chat("sat")])[0] == BY_HAND[name][0]


def test_an_answer_is_trained_as_the_template_writes_it_without_the_thoughts_of_earlier_turns(caplog):
    tokenizer = HFTokenizer(tiny_hf.TOKENIZERS["thinking"])
    messages = chat("cat", "<think>\nsat\n</think>\n\nhello", "world", "<think>\nthe\n</think>\n\nend")
    for _ in range(2):
        assert trained(tokenizer, messages) == ["hello<|im_end|>", "<think>\nthe\n</think>\n\nend<|im_end|>"]
    assert caplog.text.count("the thoughts of earlier turns") == 1


@quick
@given(turns=pairs, system=st.one_of(st.none(), content))
def test_masks_with_and_without_marks_agree(turns, system):
    messages = chat(*(part for pair in turns for part in pair), system=system)
    assert render(messages, make("chatml")) == render(messages, make("marked"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "thinking"])
@quick
@given(turns=pairs)
def test_exactly_the_answers_are_trained_whatever_anyone_types(name, turns):
    tokenizer, contents = make(name), [part for pair in turns for part in pair]
    example = render(chat(*contents), tokenizer)
    space = " " * (name == "mistral")
    parts = [c.strip() if name in TRIMS else c for c in contents[1::2]]
    assert trained(tokenizer, chat(*contents)) == [space + c + END[name] for c in parts]
    plain = render(chat(*["cat"] * len(contents)), tokenizer)
    controls = [[i for i in e.tokens if i in tokenizer.names] for e in (example, plain)]
    assert controls[0] == controls[1]  # only those that the template writes


@pytest.mark.parametrize("name", NAMES)
@quick
@given(turns=pairs)
def test_prompt_answer_and_end_are_the_whole(name, turns):
    tokenizer, messages = make(name), chat(*(part for pair in turns for part in pair))
    prompt, whole = prompt_ids(messages[:-1], tokenizer), render(messages, tokenizer)
    if name == "thinking" and any("</think>" in m["content"] for m in messages):
        return
    assert whole.tokens[: len(prompt)] == prompt
    rest = whole.weights[len(prompt) :]
    assert rest == sorted(rest, reverse=True)
    assert any(rest)
    after = [i for i, w in zip(whole.tokens[len(prompt) :], rest, strict=True) if not w]
    assert not show(tokenizer, after).strip()
    assert whole.tokens[len(prompt) :][int(sum(rest)) - 1] in tokenizer.stop_ids


def test_typed_control_tokens_are_the_pieces_of_their_text():
    tokenizer = make("chatml")
    typed = "a<|im_end|>\n<|im_start|>assistant\nb"
    example = render(chat(typed, typed), tokenizer)
    assert example.tokens.count(tokenizer.special["<|im_end|>"]) == 2
    assert show(tokenizer, example.tokens).count(typed) == 2
    inner = tokenizer.encode(typed)
    assert str(inner)[1:-1] in str(example.tokens)


@quick
@given(contents=st.lists(st.text("<>ab ", max_size=6), min_size=2, max_size=2))
def test_names_that_overlap_or_join_with_the_template_are_broken_too(contents):
    tokenizer = odd_names()
    example = render(chat(*contents), tokenizer)
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    assert [i for i in example.tokens if i in tokenizer.names] == [start, end, start, end]
    assert trained(tokenizer, chat(*contents)) == [contents[1] + "<|im_end|>"]


@cache
def odd_names() -> HFTokenizer:
    names = ["<a>", "><", "<b>", "b<|", "<|im_start|>", "<|im_end|>"]
    return HFTokenizer(tiny_hf.byte_level(names, tiny_hf.CHATML.replace("\\n<|", "<|")))


def with_template(source: str) -> HFTokenizer:
    return HFTokenizer(tiny_hf.byte_level(template=source))


def test_a_template_that_acts_on_a_typed_control_token_is_refused_then_only():
    tokenizer = with_template(
        tiny_hf.CHATML.replace("turn.content", "turn.content.replace('<|im_end|>', '!')")
    )
    assert trained(tokenizer, chat("cat", "sat")) == ["sat<|im_end|>"]
    with pytest.raises(UserError, match="acts upon"):
        render(chat("cat<|im_end|>", "sat"), tokenizer)
    with pytest.raises(UserError, match=r"U\+FDD1"):
        render(chat("\ufdd1", "sat"), tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for turn in messages %}", "not valid"),
        ("{{ raise_exception('no cats') }}", r"refuses a dialogue of user, assistant \(no cats\)"),
        ("{{ messages[0].content + 1 }}", "refuses a dialogue"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses a dialogue"),
        (
            "{% for turn in messages %}{{ turn.content }}{% if 0 %}{% generation %}{% endgeneration %}"
            "{% endif %}{% endfor %}",
            "marks none",
        ),
        # A prompt that opens otherwise than the rendered answer: what to train is not said anywhere.
        (
            tiny_hf.CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"),
            "without it before",
        ),
    ],
)
def test_templates_that_cannot_be_used_are_user_errors(source, message):
    with pytest.raises(UserError, match=message):
        render(chat("cat", "sat"), with_template(source))


def test_an_end_of_turn_that_swallows_white_space_is_trained():
    spec = json.loads(make("chatml").files["tokenizer.json"])
    for token in spec["added_tokens"]:
        token["rstrip"] = token["special"]  # as Phi-3's
    tokenizer = HFTokenizer(make("chatml").files | {"tokenizer.json": json.dumps(spec).encode()})
    messages = chat("cat", "sat ", "the", "end")
    assert len(render(messages, tokenizer).tokens) < len(render(messages, make("chatml")).tokens)
    assert trained(tokenizer, messages) == ["sat <|im_end|>", "end<|im_end|>"]


def test_a_dialogue_that_the_template_refuses_is_named():
    with pytest.raises(UserError, match=r"a dialogue of user, user, assistant.*turns must alternate"):
        render([chat("cat")[0], *chat("cat", "sat")], make("mistral"))
    with pytest.raises(UserError, match="role 'robot' is unknown"):
        render([{"role": "robot", "content": "a"}], make("chatml"))
    with pytest.raises(UserError, match="no chat template"):
        render(chat("cat", "sat"), HFTokenizer(tiny_hf.wordpiece()))


def test_dates_json_loops_and_special_tokens_render_as_in_transformers():
    source = (
        "{{ strftime_now('%Y') | length }}{{ messages[0] | tojson }}{% for turn in messages %}"
        "{% if loop.index0 %}{% break %}{% endif %}{{ bos_token }}{{ eos_token }}{% endfor %}"
        "{{ tools is none }}{{ unk_token is defined }}"
    )
    template = with_template(source).template
    text = template.text([{"role": "user", "content": "<b>é"}, {"role": "user", "content": "x"}], False)
    assert text == '4{"role": "user", "content": "<b>é"}<|im_end|>TrueFalse'


def test_the_template_file_comes_before_the_configuration():
    files = tiny_hf.byte_level(template="other") | {"chat_template.jinja": tiny_hf.CHATML.encode()}
    assert render(chat("cat", "sat"), HFTokenizer(files)) == render(chat("cat", "sat"), make("chatml"))
    assert make("mistral").template.source == tiny_hf.MISTRAL  # the one named "default"


def test_no_answer_means_nothing_trained():
    for name in NAMES:
        example = render(chat("cat"), make(name))
        assert example == replace(example, weights=[0.0] * len(example.tokens))


def test_a_sentencepiece_model_alone_takes_a_template(sentencepiece):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = {"eos_token": "<|end|>", "bos_token": "<|bos|>", "chat_template": template}
    model = sentencepiece._model()
    files = {"tokenizer.model": model, "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = HFTokenizer(files)
    messages = chat("the cat <|end|> 好", "一 sat", "ran", "far 好")
    whole, ours = render(messages, tokenizer), render(messages, sentencepiece)
    assert (whole.tokens, whole.weights) == (ours.tokens[1:], ours.weights[1:])  # but for <|bos|>
    assert prompt_ids(messages, tokenizer) == prompt_ids(messages, sentencepiece)[1:]
