"""A small byte-pair tokenizer made from a task's own texts.

Digits, operators, braces, newlines and ``\\boxed{`` always stand alone, so a number is its digits wherever it stands
and a text cut at a newline has the same ids in two parts as in one. Spaces do not split: a phrase that repeats becomes
one token, which keeps prompts short. All printable ASCII round-trips whatever the texts were; a character outside the
alphabet becomes U+FFFD, an ordinary token that every decoder shows, so nothing vanishes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlsys.errors import ConfigError

EOS, PAD = "<eos>", "<pad>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # no special token: those are hidden by skip_special_tokens
ALPHABET = [*map(chr, range(0x20, 0x7F)), "\n", UNKNOWN]
ALONE = r"\\boxed\{|[-+*/=;{}\n]|[0-9]"


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """At most `vocab_size` tokens learned from `texts`; the same texts give the same ids.

    Raises:
        ConfigError: the characters alone are more than `vocab_size` tokens.
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
    found = tokenizer.get_vocab_size()
    if found > vocab_size:
        raise ConfigError(
            f"model.make.vocab_size: found {vocab_size}; the characters of the task's texts and printable ASCII alone "
            f"are {found} tokens; wanted at least that"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
