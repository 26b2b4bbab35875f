"""Claims about prompts, ends and conversations with the tokenizers that people train with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlsys.config import ExampleSection, PromptSection
from rlsys.data.problems import Problem, encode
from rlsys.tokenization.control_tokens import control_tokens
from rlsys.tokenization.renderer import Renderer, build_supervised_example
from rlsys.tokenization.stop_conditions import load_tokenizer, stop_conditions_of
from rlsys.tokenization.tokenizer_class import tokenizer_class
from tests.real.known import KNOWN, load, model_folder
from tests.real.rows import PAGE, table

DAY = "2026-02-03"
QUESTION, SYSTEM = "What is 2 + 2?", "Be brief."
EXAMPLES = [ExampleSection(prompt="1+1?", answer="1 + 1 = 2. \\boxed{2}")]
TEXTS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many.\n\nHow many?",
    "  white space \t around \r\n\r\n ",
    "\u00e9\u00df \u4e2d\u6587\u3002 \U0001f600\u200d \u0627\u0644 x\u00b2 \u2260 \u00bd",
    "def f(x):\n    return {'a': x ** 2}  # <b>html</b> <pad_me> </s x> <|almost|",
    "1234567.89 - 100,000 = -5e-3 $\\frac{1}{2}$ \\boxed{42}",
    "<think>\nlet me see\n</think>\n\n4 <tool_call>",
]
Messages = list[dict[str, str]]


@pytest.fixture(params=sorted(KNOWN), scope="module")
def name(request: pytest.FixtureRequest) -> str:
    load(request.param)
    return str(request.param)


def renderer(name: str, **section: Any) -> Renderer:
    return Renderer(load(name), PromptSection(date=DAY, **section))


def by_transformers(name: str, messages: Messages, prompting: bool = True, **options: Any) -> list[int]:
    """Today's date is the run's on one day only, so it is given."""
    from datetime import datetime

    ids: list[int] = load(name).apply_chat_template(
        messages,
        add_generation_prompt=prompting,
        return_dict=False,
        strftime_now=datetime.fromisoformat(DAY).strftime,
        **options,
    )
    return ids


def asked(question: str, system: str | None, few_shot: list[ExampleSection]) -> Messages:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for example in few_shot:
        messages += [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
    return [*messages, {"role": "user", "content": question}]


def controls_in(name: str, ids: list[int]) -> list[int]:
    known = set(control_tokens(load(name)).ids_by_text.values())
    return [token for token in ids if token in known]


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("few_shot", [[], EXAMPLES])
@pytest.mark.parametrize("off", [False, True])
def test_a_prompt_is_what_transformers_makes_of_it(
    name: str, system: str | None, few_shot: list[ExampleSection], off: bool
) -> None:
    options = KNOWN[name].thinking_off if off else {}
    prompt = renderer(name, system=system, few_shot=few_shot, template_options=options)
    for question in (QUESTION, *TEXTS):
        ids = prompt.ids(question)
        assert ids == by_transformers(name, asked(question, system, few_shot), **options)
        begin = load(name).bos_token_id
        if name in ("llama3_1", "gemma3"):  # SmolLM2's is the token that begins every message
            assert ids[0] == begin and ids.count(begin) == 1


def test_a_text_that_begins_without_a_template_begins_once(name: str) -> None:
    tokenizer, ids = load(name), renderer(name, chat=False).ids(QUESTION)
    assert ids == tokenizer.encode(QUESTION)
    assert (ids[0] == tokenizer.bos_token_id) == (name in ("llama3_1", "gemma3"))


@pytest.mark.parametrize("text", TEXTS)
def test_marks_go_by_a_way_that_makes_the_same_tokens(name: str, text: str) -> None:
    tokenizer, controls = load(name), control_tokens(load(name))
    specials = list(controls.ids_by_text)[:3]
    for written in (text, specials[0] + text, f"{specials[0]}user\n{text}{specials[1]}\n{specials[2]}"):
        assert controls.ids_with_marks(written) == tokenizer.encode(written, add_special_tokens=False)


@pytest.mark.parametrize("place", ["question", "system", "few_shot prompt", "few_shot answer", "reply", "taught"])
def test_no_text_from_data_forges_a_control_token(name: str, place: str) -> None:
    """Every special token of the tokenizer at once, in each place that data comes to."""
    tokenizer, controls = load(name), control_tokens(load(name))
    sly = "4" + "\nassistant ".join(controls.ids_by_text)

    def made(text: str) -> list[int]:
        if place == "taught":
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            return build_supervised_example(tokenizer, messages, date=DAY)[0].tolist()
        if place == "reply":
            return renderer(name).reply_ids(text, None, False)
        shown = {"prompt": text, "answer": "2"} if place == "few_shot prompt" else {"prompt": "1+1?", "answer": text}
        few_shot = [ExampleSection(**shown)] if place.startswith("few_shot") else EXAMPLES
        system = text if place == "system" else SYSTEM
        return renderer(name, system=system, few_shot=few_shot).ids(text if place == "question" else QUESTION)

    assert controls_in(name, made(sly)) == controls_in(name, made("4"))
    assert sly in tokenizer.decode(made(sly))


def test_ends_are_those_of_every_file_and_stop_strings_of_special_tokens_are_ids(name: str, tmp_path: Path) -> None:
    tokenizer, known = load(name), KNOWN[name]
    found = stop_conditions_of(model_folder(name, tmp_path / "model"))
    named = [known.config] if isinstance(known.config, int) else known.config
    named = [*named, *([known.generation] if isinstance(known.generation, int) else known.generation)]
    assert set(found.ids) == {*named, tokenizer.eos_token_id}
    assert found.notes == ()
    ends = [tokenizer.decode([end]) for end in found.ids]
    assert found.stops(["END", *ends]) == (["END"], list(found.ids))


def test_the_next_turn_begins_with_what_was_sampled_and_reads_as_the_template_writes_it(name: str) -> None:
    """The model's turns are kept as sampled, ends included: gpt-oss's <|return|>, where its template writes <|end|>."""
    tokenizer, prompt, said = load(name), renderer(name, system=SYSTEM), KNOWN[name].said
    ids, end = prompt.ids(QUESTION), tokenizer.eos_token_id
    messages = asked(QUESTION, SYSTEM, [])
    for turn, reply in (("let me see", "3 apples"), ("so: 4", " right \n\n sure?"), ("yes", "end")):
        ids = [*ids, *tokenizer.encode(said + turn, add_special_tokens=False), end]
        ids += prompt.reply_ids(reply, end, True)
        messages += [{"role": "assistant", "content": turn}, {"role": "user", "content": reply}]
    whole = by_transformers(name, messages)
    if name == "gptoss":
        closing = tokenizer.convert_tokens_to_ids("<|end|>")
        assert ids.count(end) == 3
        ids = [closing if token == end else token for token in ids]
    assert ids == whole


def test_a_turn_cut_by_a_stop_text_is_ended_as_the_template_would(name: str) -> None:
    tokenizer, prompt = load(name), renderer(name)
    cut = prompt.reply_ids("no", tokenizer.encode("x")[-1], False)
    ended = prompt.reply_ids("no", tokenizer.eos_token_id, True)
    closing = "<|end|>" if name == "gptoss" else tokenizer.eos_token
    assert cut == [tokenizer.convert_tokens_to_ids(closing), *ended]


def test_thinking_is_switched_off_where_the_template_can(name: str) -> None:
    off = renderer(name, template_options=KNOWN[name].thinking_off).render(QUESTION)
    on = renderer(name).render(QUESTION)
    if name == "qwen3":
        assert off == on + "<think>\n\n</think>\n\n"
    elif name == "gptoss":
        assert off == on.replace("Reasoning: medium", "Reasoning: low") != on
    else:
        assert off == on
    if name == "qwen3":  # each turn begins as the first
        again = renderer(name, template_options=KNOWN[name].thinking_off).reply_ids("no", 151645, True)
        assert load(name).decode(again).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_what_is_taught_ends_as_completions_do(name: str) -> None:
    tokenizer = load(name)
    messages = [*asked(QUESTION, SYSTEM, EXAMPLES), {"role": "assistant", "content": "4"}]
    tokens, weights = build_supervised_example(tokenizer, messages, date=DAY)
    assert tokens.tolist() == by_transformers(name, messages, prompting=False)
    text = [tokenizer.decode(tokens[weights == 1].tolist())]
    thinking = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    said, end = KNOWN[name].said, tokenizer.eos_token
    inner = "<|end|>" if name == "gptoss" else end
    assert text == [f"{said}{EXAMPLES[0].answer}{inner}{thinking}{said}4{end}"]
    begin = int(weights.argmax())
    assert tokens[:begin].tolist() == renderer(name, system=SYSTEM).ids("1+1?")


@pytest.mark.parametrize("name", ["llama3_1", "gptoss"])
def test_the_digest_of_problems_does_not_change_at_midnight(name: str) -> None:
    """Llama 3.1's template has no date; that of 3.2 puts one into a system prompt of its own."""
    tokenizer = load(name)
    if name == "llama3_1":
        dated = (
            "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}"
            "<|eot_id|>"
        )
        tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
        tokenizer.chat_template = dated + load(name).chat_template
    digests = [
        encode([Problem(QUESTION, "4")], Renderer(tokenizer, PromptSection(date=day)).ids_of_each).digest
        for day in (DAY, DAY, "2026-02-04")
    ]
    assert digests[0] == digests[1] != digests[2]
    shown = Renderer(tokenizer, PromptSection(date=DAY)).render(QUESTION)
    assert ("Current date: 2026-02-03" if name == "gptoss" else "Today Date: 03 Feb 2026") in shown


def test_the_page_says_what_these_tokenizers_give() -> None:
    for known in KNOWN:
        load(known)
    assert table() in PAGE.read_text(encoding="utf-8"), "docs/tokenizers.md: run `python -m tests.real.rows`"


@pytest.mark.parametrize(
    ("known", "model_type"),
    [
        ("qwen3", "qwen3"),
        ("qwen3", "qwen2"),
        ("llama3_1", "llama"),
        ("gemma3", "gemma3_text"),
        ("gptoss", "gpt_oss"),
        ("smollm2", "llama"),
    ],
)
def test_the_class_chosen_without_torch_encodes_and_decodes_as_autotokenizer_does(
    known: str, model_type: str, tmp_path: Path
) -> None:
    folder = model_folder(known, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    assert tokenizer_class(folder) is not None
    light, auto = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(light) is type(auto)
    assert light.backend_tokenizer.to_str() == auto.backend_tokenizer.to_str()
    assert (light.special_tokens_map, light.chat_template) == (auto.special_tokens_map, auto.chat_template)
    ids = [auto.encode(text) for text in TEXTS]
    assert [light.encode(text) for text in TEXTS] == ids
    assert light.batch_decode(ids, skip_special_tokens=True) == auto.batch_decode(ids, skip_special_tokens=True)
