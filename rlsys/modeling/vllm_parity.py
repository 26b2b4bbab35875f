"""Makes the learner compute like vLLM where transformers and vLLM implement a model differently.

Rotary embeddings with length-dependent factors (longrope): transformers selects the factors by the longest sequence of
a forward pass, so a token's values depend on the other sequences of its pack; vLLM by its maximum sequence length.

Sliding window of Cohere 2: one token longer in vLLM, as the model was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlsys.errors import ConfigError

_WINDOW_AND_ITSELF = ("cohere2",)  # model types whose window does not count the token itself
_FIXED = "longrope, fixed"  # a rope_type that transformers does not update


def match_sampler(model: PreTrainedModel, max_length: int) -> None:
    """Change the model to compute like a vLLM engine for sequences of up to `max_length` tokens.

    Raises:
        ConfigError: the model's rotary embedding cannot match vLLM's.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):  # by type of layer
            for layer_type, kind in kinds.items():
                _fix_rotary(model, module, kind, max_length, layer_type)
            module.rope_type = {key: _FIXED if kind == "longrope" else kind for key, kind in kinds.items()}
        elif isinstance(kinds, str):
            _fix_rotary(model, module, kinds, max_length, None)
            module.rope_type = _FIXED if kinds == "longrope" else kinds
    _change_window(model, 1)


@contextmanager
def as_published(model: PreTrainedModel) -> Iterator[None]:
    """Restore the published configuration during the block, such as for saving the model."""
    _change_window(model, -1)
    try:
        yield
    finally:
        _change_window(model, 1)


def _change_window(model: PreTrainedModel, by: int) -> None:
    config = model.config.get_text_config()
    if config.model_type not in _WINDOW_AND_ITSELF or config.sliding_window is None:
        return
    config.sliding_window += by
    for module in model.modules():
        if isinstance(getattr(module, "sliding_window", None), int):
            module.sliding_window += by


def _fix_rotary(model: PreTrainedModel, module: nn.Module, kind: str, max_length: int, layer_type: str | None) -> None:
    name, config = type(model).__name__, module.config
    if "dynamic" in kind:
        raise ConfigError(
            f"{name} has a rotary embedding of type {kind!r}, whose frequencies depend on the sequence length and "
            "differ between transformers and vLLM; wanted another rope_type in config.json"
        )
    if kind != "longrope":
        return
    prefix, which = ("", {}) if layer_type is None else (f"{layer_type}_", {"layer_type": layer_type})
    # rlsys starts engines with max_model_len = max_length + 1 (rlsys/sampler/engine_args.py), which vLLM uses here.
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, model.device, seq_len=max_length + 1, **which)
    module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
