"""Exports a checkpoint for other programs: the adapter, or the base with the adapter merged into its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from rlsys.config import LoraSection
from rlsys.errors import CheckpointError, ConfigError
from rlsys.learner.adapter_checkpoint import read_adapter, require_base
from rlsys.learner.base_fingerprint import fingerprint_of
from rlsys.learner.checkpoint_files import CONFIG, WEIGHTS, read_files, read_info
from rlsys.modeling.text_part import configuration, is_composite, is_tied, load_whole, text_part
from rlsys.utils.atomic_files import new_folder
from rlsys.utils.shell_paths import command

UNTIE = (
    "model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings())); "
    "model.config.tie_word_embeddings = False"
)
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json", "*.pt", "*.pth", "*.gguf")


# model_type -> fused modules, for which vLLM's loader expects one adapter per part, and PEFT one per fused module
CUT_IN_VLLM = {"glm4": {"gate_up_proj": ("gate_proj", "up_proj")}}


def export_adapter(checkpoint: Path, out: Path, for_vllm: bool = False) -> tuple[str, ...]:
    """Write the new folder `out` with the two files that PEFT and ``vllm serve --enable-lora`` load.

    `for_vllm`: in vLLM's form, which PEFT does not load, for models where the forms differ (CUT_IN_VLLM). Returns
    warnings about programs that would compute another model with the adapter.
    """
    files = read_files(checkpoint)
    _require_new(out)
    with new_folder(Path(out)) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if for_vllm and (cuts := CUT_IN_VLLM.get(read_info(checkpoint).base.summary.partition(",")[0])):
            _cut(folder, load(files[WEIGHTS]), cuts)
    return _warnings(checkpoint, Path(out))


def _warnings(checkpoint: Path, out: Path) -> tuple[str, ...]:
    info = read_info(checkpoint)
    tied = is_tied(info.base_name) if info.lora.train_unembed else False
    if tied is False:
        return ()
    ties = "ties to its embeddings" if tied else "may tie to its embeddings (its config.json is not on this machine)"
    merged = out.with_name(f"{out.name}-merged")
    base = () if tied else ("--base", "BASE")
    return (
        f"{out}: the adapter changes the output layer, which the base {info.base_name} {ties}. Loaded as an adapter it "
        "computes the trained model. PEFT's merge_and_unload() adds it to the embeddings as well, which gives another "
        f"model. For a merged model: `{command('rlsys', 'export', checkpoint, merged, '--merged', *base)}`. Or in "
        f"Python, before PeftModel.from_pretrained: {UNTIE}",
    )


def _cut(folder: Path, tensors: dict[str, Tensor], cuts: Mapping[str, tuple[str, ...]]) -> None:
    """Rewrite an adapter's files: each part of a fused module gets its A and the part's rows of B."""
    adapters = {}
    for name, tensor in tensors.items():
        path, side = name.removesuffix(".weight").rsplit(".", 1)
        parts = cuts.get(path.rpartition(".")[2])
        if parts is None:
            adapters[name] = tensor
            continue
        pieces = tensor.chunk(len(parts)) if side == "lora_B" else [tensor.clone() for _ in parts]
        for part, piece in zip(parts, pieces, strict=True):
            adapters[f"{path.rpartition('.')[0]}.{part}.{side}.weight"] = piece.contiguous()
    save_file(adapters, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    config["target_modules"] = sorted({part for name in config["target_modules"] for part in cuts.get(name, (name,))})
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def export_merged(base: Path | str, checkpoint: Path, out: Path) -> None:
    """Write the new folder `out`: a complete model in Hugging Face format, in the base's dtype, with its tokenizer.

    W + (alpha / r) B A is computed in float32 and then rounded to that dtype. If the base ties its output layer to its
    embeddings and the adapter changes the output layer, the merged model has separate weights for both.
    """
    info, adapter = read_adapter(checkpoint)
    _require_new(out)
    try:
        model = load_whole(base, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: {base} cannot be loaded as a causal language model: {error}") from error
    trained = text_part(model) if is_composite(configuration(base)) else model
    require_base(f"{checkpoint}: cannot be merged into {base}", info.base, fingerprint_of(trained))
    with torch.no_grad():
        _merge(model, info.lora, adapter)
    with new_folder(Path(out)) as folder:
        model.save_pretrained(folder)
        _copy_tokenizer(base, folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes 0600


def _merge(model: PreTrainedModel, lora: LoraSection, adapter: dict[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    paths = sorted({name.rpartition(".")[0] for name in adapter})
    for path in paths:
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            raise CheckpointError(f"the base has no linear module {path}, which the adapter changes")
        if module is model.get_output_embeddings() and module.weight is model.get_input_embeddings().weight:
            module.weight = nn.Parameter(module.weight.clone())
            for config in (model.config, model.config.get_text_config()):  # programs read one or the other
                config.tie_word_embeddings = False
        delta = adapter[f"{path}.lora_B"].float() @ adapter[f"{path}.lora_A"].float() * (lora.alpha / lora.rank)
        module.weight.copy_(module.weight.float() + delta)


def _copy_tokenizer(base: Path | str, folder: Path) -> None:
    """Copy the other files of a base folder; of a base from the hub, the tokenizer."""
    if not Path(base).is_dir():
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        return
    for file in Path(base).iterdir():
        weights = any(file.match(pattern) for pattern in _WEIGHT_FILES)
        if file.is_file() and not weights and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _require_new(out: Path) -> None:
    if Path(out).exists():
        raise CheckpointError(f"{out}: is already there; wanted a new folder")
