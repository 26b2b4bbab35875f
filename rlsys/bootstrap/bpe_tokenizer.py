"""Trains a small byte-pair tokenizer on the texts of a task.

Digits, operators, braces, newlines and ``\\boxed{`` are always separate tokens. A number is therefore always its
digits, and a text that is split at a newline has the same ids as the unsplit text. Spaces do not separate tokens: a
repeated phrase becomes one token, which keeps prompts short. All printable ASCII round-trips, whatever the training
texts. A character outside of the alphabet becomes U+FFFD, an ordinary token that every decoder shows.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlsys.errors import ConfigError

EOS, PAD = "<eos>", "<pad>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # not a special token, which skip_special_tokens would hide
ALPHABET = [*map(chr, range(0x20, 0x7F)), "\n", UNKNOWN]
ALONE = r"\\boxed\{|[-+*/=;{}\n]|[0-9]"


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most `vocab_size` tokens on `texts`; the same texts give the same ids.

    Raises:
        ConfigError: the alphabet alone has more than `vocab_size` tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(ALONE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (EOS, PAD)],
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size > vocab_size:
        raise ConfigError(
            f"model.make.vocab_size: found {vocab_size}; wanted at least {size}, the number of characters in printable "
            "ASCII and the task's texts"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
