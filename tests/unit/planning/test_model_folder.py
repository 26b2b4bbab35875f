"""What is wrong with a model's folder is found before anything starts, with what, where and what would be right."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlsys.config import JobConfig, parse_config
from rlsys.errors import ConfigError
from rlsys.planning.model_folder import check_files, check_job, check_tokenizer
from rlsys.rewards.grader import Grader
from tests.unit.tokenization.test_renderer import CHATML, END, MOVING, tokenizer_of
from tests.waiting import run

ROWS = 264  # the tokenizer has 260 tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that can be trained, in two files."""
    config = Qwen3Config(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        eos_token_id=END,
        pad_token_id=END,  # the same token, as SmolLM2 has it
    )
    torch.manual_seed(0)
    at = tmp_path / "model"
    Qwen3ForCausalLM(config).save_pretrained(at, max_shard_size="40KB")
    tokenizer_of(CHATML).save_pretrained(at)
    assert len(list(at.glob("*.safetensors"))) >= 2
    return at


def job(folder: Path, *overrides: str) -> JobConfig:
    return parse_config(f"run: {{name: one}}\nmodel: {{path: '{folder}'}}", overrides)


def set_config(folder: Path, name: str = "config.json", **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def in_one_file(folder: Path) -> Path:
    """The same weights as model.safetensors."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def test_a_whole_folder_has_nothing_to_say_whose_pad_token_is_its_end_token(folder: Path) -> None:
    assert check_job(job(folder)) == check_tokenizer(folder) == ()
    in_one_file(folder)
    assert check_job(job(folder)) == ()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", [True, "2", -1, [END, None]], ids=json.dumps)
def test_an_end_that_is_no_token_is_found_before_tokenizer_and_weights_are_loaded(
    folder: Path, name: str, ends: Any
) -> None:
    set_config(folder, name, eos_token_id=ends)
    for check in (lambda: check_job(job(folder)), lambda: check_files(folder), lambda: check_tokenizer(folder)):
        with pytest.raises(
            ConfigError, match=rf"{re.escape(str(folder / name))}: eos_token_id is .*; wanted a token id"
        ):
            check()


@pytest.mark.parametrize(("tied", "unembed"), [(True, True), (True, False), (False, True)])
def test_an_adapter_that_peft_would_merge_into_another_model_is_told_at_the_start(
    folder: Path, tied: bool, unembed: bool
) -> None:
    set_config(folder, tie_word_embeddings=tied)
    notes = check_job(job(folder, f"lora.train_unembed={str(unembed).lower()}"))
    assert len(notes) == (tied and unembed)
    assert all("use `rlsys export --merged`" in note for note in notes)


def cut(folder: Path) -> None:
    path = in_one_file(folder)
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(folder: Path) -> None:
    path = in_one_file(folder)
    path.write_bytes(path.read_bytes()[:100])


def lose_a_file(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def lose_a_tensor(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path, {"format": "pt"})


def lose_all_weights(folder: Path) -> None:
    in_one_file(folder).unlink()


def pickle(folder: Path) -> None:
    torch.save(load_file(in_one_file(folder)), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_gguf(folder: Path) -> None:
    lose_all_weights(folder)
    (folder / "model-q4.gguf").write_bytes(b"GGUF")


def gguf_alone(folder: Path) -> None:
    as_gguf(folder)
    (folder / "config.json").unlink()


def lfs_pointer(folder: Path) -> None:
    in_one_file(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def int8(folder: Path) -> None:
    path = in_one_file(folder)
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path, {"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def damaged_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:500])


def quantised(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, quantization_config=fields)


def own_code(folder: Path) -> None:
    set_config(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})


def endless(folder: Path) -> None:
    set_config(folder, eos_token_id=None)
    set_config(folder, "generation_config.json", eos_token_id=None)
    made = tokenizer_of(None)
    made.eos_token = None
    (folder / "chat_template.jinja").unlink()
    made.save_pretrained(folder)


def fewer_rows(folder: Path) -> None:
    """A tokenizer of 260 for an embedding of 200, and both configuration and weights say so."""
    path = in_one_file(folder)
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:200].clone()
    save_file(tensors, path, {"format": "pt"})
    set_config(folder, vocab_size=200)


WRONG: list[tuple[Callable[[Path], object], str]] = [
    (cut, r"model\.safetensors has [\d,]+ bytes, but its header describes [\d,]+: .*incomplete"),
    (cut_in_the_header, r"model\.safetensors: the header is damaged or truncated \(100 bytes\)"),
    (lose_a_file, r"1 of the \d files listed in model\.safetensors\.index\.json are missing \(model-00001-of-"),
    (lose_a_tensor, r"lists 1 tensors that are not in their file, such as .* copy or download"),
    (lose_all_weights, r"found no weights; wanted model\.safetensors"),
    (pickle, r"found pytorch_model\.bin; wanted model\.safetensors.*save_pretrained"),
    (as_gguf, r"holds model-q4\.gguf\. GGUF files.*GgufConfig\(dequantize=True\)"),
    (gguf_alone, r"holds model-q4\.gguf and no config\.json\. GGUF"),
    (lfs_pointer, r"is a Git LFS pointer.*git .*lfs pull"),
    (int8, r"q_proj\.weight is I8; wanted F32, F16 or BF16"),
    (no_tokenizer, r"has no tokenizer; wanted tokenizer\.json"),
    (damaged_tokenizer, r"the tokenizer in .* cannot be loaded \(.*\); wanted tokenizer\.json"),
    (quantised(quant_method="gptq", bits=4), r"config\.json: quantization_config says gptq; .*before quantisation"),
    (quantised(quant_method="awq", bits=4), r"quantization_config says awq"),
    (quantised(quant_method="fp8"), r"quantization_config says fp8"),
    (quantised(quant_method="bitsandbytes", load_in_4bit=True), r"says bitsandbytes \(load_in_4bit\)"),
    (
        own_code,
        r"model_type 'mine' needs Python code in the folder \(auto_map, trust_remote_code\), which rlsys does not",
    ),
    (lambda folder: set_config(folder, model_type="lama"), r"found model_type 'lama'; wanted one that this transfor"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    (
        lambda folder: (folder / "config.json").unlink(),
        r"has no config\.json; wanted config, tokenizer and safetensors",
    ),
    (
        lambda folder: set_config(folder, vocab_size=300),
        r"embed_tokens\.weight in .* has 264 rows, but config.* says .*300",
    ),
    (
        fewer_rows,
        r"the tokenizer has 260 tokens, but the embedding has 200 rows; tokens without a row: 56 words such as",
    ),
    (lambda folder: set_config(folder, eos_token_id=33), r"eos_token_id 33 is '.' in the tokenizer, an ordinary token"),
    (endless, r"no stop condition, so every completion would run to rl\.sampling\.max_tokens"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG)
def test_what_cannot_be_trained_is_refused(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    began = time.process_time()
    with pytest.raises(ConfigError, match=rf"model\.path: .*{message}"):
        check_job(job(folder))
    assert time.process_time() - began < 10


def test_code_in_a_folder_of_a_known_architecture_is_not_needed(folder: Path) -> None:
    set_config(folder, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    assert check_job(job(folder)) == ()


def test_a_single_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model-q4.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"model-q4\.gguf is a file; wanted a folder\. GGUF"):
        check_job(job(path))


def test_completions_without_end_have_to_be_asked_for(folder: Path) -> None:
    endless(folder)
    assert len(check_job(job(folder, "rl.sampling.stop=[]"))) == 1  # no chat template
    assert len(check_job(job(folder, "rl.sampling.stop=[END]"))) == 1


def test_a_folder_without_a_tokenizer_serves_clients(folder: Path) -> None:
    no_tokenizer(folder)
    check_files(folder)
    assert check_tokenizer(folder) == ()


def test_tokens_beyond_the_embedding_that_no_prompt_needs_are_told(folder: Path) -> None:
    """As of Gemma 3 1B, whose tokenizer has a token for images that its embedding has not."""
    made = tokenizer_of(CHATML)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|sep|>", *(f"<x{i}>" for i in range(5))]})
    made.save_pretrained(folder)
    (note,) = check_job(job(folder))
    assert "tokens beyond the 264 rows of the embedding (<x4>)" in note
    made.chat_template = "<x4>" + CHATML
    made.save_pretrained(folder)
    with pytest.raises(
        ConfigError,
        match=r"265 tokens, but the embedding has 264 rows; tokens without a row: '<x4>', which is in every",
    ):
        check_job(job(folder))


def test_a_folder_without_a_chat_template_is_told(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (note,) = check_job(job(folder))
    assert "no chat template, so prompts are plain text" in note
    assert check_job(job(folder, "prompt.chat=false")) == ()
    with pytest.raises(ConfigError, match=r"prompt\.chat: .*prompt\.chat=false"):
        check_job(job(folder, "prompt.chat=true"))


def test_a_template_or_a_stop_that_cannot_serve_is_refused_here_too(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"stop: found '<\|im_end\|> '"):
        check_job(job(folder, "rl.sampling.stop=['<|im_end|> ']"))
    (folder / "chat_template.jinja").write_text(MOVING)
    assert check_job(job(folder, "prompt.system=Be brief.")) == ()
    with pytest.raises(ConfigError, match=r"before the question changes"):
        check_job(job(folder, "prompt.system=Be brief.", "task.name=calculator"))


def test_a_job_is_refused_before_ray_starts(folder: Path, tmp_path: Path) -> None:
    """By the command itself; nothing is written, and no Ray was imported into action."""
    lose_a_file(folder)
    path = tmp_path / "job.yaml"
    path.write_text(f"run: {{name: one, dir: {tmp_path}/runs}}\nmodel: {{path: '{folder}'}}\n")
    for command in ("train", "eval", "plan"):
        done = run([sys.executable, "-m", "rlsys", command, str(path)])
        assert done.returncode != 0
        assert "files listed in model.safetensors.index.json are missing" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "runs").exists()


def test_a_problem_with_a_token_that_the_model_has_not_is_refused_before_engines_start(
    folder: Path, tmp_path: Path
) -> None:
    made = tokenizer_of(CHATML)
    made.add_tokens(
        [f"<tool{i}>" for i in range(6)]
    )  # not special, so that texts may have them; 264 and 265 are beyond
    made.save_pretrained(folder)
    rows = [{"question": f"{i} of <tool{i % 3}>?", "answer": "1"} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    asked = ["task.name=dataset", "task.columns={}", f"task.train.path={data}", "model.max_length=256"]
    assert len(check_job(job(folder, *asked))) == 1
    Grader.start(job(folder, *asked), folder).close()
    rows[7]["question"] = "what of <tool5>?"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=r"'what of <tool5>\?': its prompt has the token id 265, .* 264 rows"):
        Grader.start(job(folder, *asked, "task.train_problems=39"), folder)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("tokenizer.json", b'{"version": "\xe9"}', r"tokenizer\.json, line 1: found byte 0xe9"),
        ("tokenizer.json", b'{"version":\n', r"tokenizer\.json, line 2: is no JSON"),
        ("tokenizer_config.json", b"\xff\xfe{\x00}\x00", r"tokenizer_config\.json, line 1: found UTF-16"),
        ("tokenizer_config.json", b"{}\n}", r"tokenizer_config\.json, line 2: is no JSON: Extra data"),
        ("chat_template.jinja", b"{# caf\xe9 #}", r"chat_template\.jinja, line 1: found byte 0xe9 at byte 7"),
        ("config.json", b'{"model_type": "\xe9"}', r"config\.json"),
        ("config.json", b"[1]", r"config\.json holds list; wanted an object"),
        ("generation_config.json", b"{\xe9}", r"generation_config\.json"),
        ("model.safetensors.index.json", b"{\xe9}", r"model\.safetensors\.index\.json"),
        ("model.safetensors.index.json", b"[]", r"model\.safetensors\.index\.json has no weight_map"),
    ],
)
def test_a_file_of_a_model_that_cannot_be_decoded_is_one_line_with_file_and_place(
    folder: Path, name: str, content: bytes, place: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"model\.path: .*{place}") as raised:
        check_job(job(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "two words", "50%20", "a#b", "\xfc\u4e2d", "a::b", "{a,b}", "what?"])
def test_the_path_of_a_model_is_no_pattern(folder: Path, name: str) -> None:
    moved = folder.rename(folder.with_name(name))
    assert check_job(job(moved)) == check_tokenizer(moved) == ()
    next(iter(moved.glob("*.safetensors"))).unlink()
    with pytest.raises(ConfigError, match=r"1 of the \d+ files listed in .* are missing"):
        check_job(job(moved))
