"""Conversion of requests to vLLM's and of its outputs to columns; invalid requests are refused here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlsys.answer_parts import CompletionPart, PartsRequest, PromptScores
from rlsys.architectures.families import text_part
from rlsys.data.problems import occurrences
from rlsys.errors import ConfigError, SamplingError
from rlsys.rollouts import Rollouts
from rlsys.sampler.growing_completion import Completion, completion_of, to_rollouts
from rlsys.tokenization.stop_conditions import has_tokenizer, read_json, stop_conditions_of
from rlsys.types import Array, SamplingParams

if TYPE_CHECKING:  # importing vLLM takes seconds and reads the environment
    import vllm
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput

MIN_TEMPERATURE = (
    0.01  # vLLM silently raises smaller ones to this, and the learner's p would be of another distribution
)
SEED_WORDS = 2**64 - 1


class BaseModel:
    """Facts from a model's folder that requests need."""

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "config.json")
        if config is None:
            raise ConfigError(f"sampler: {folder} has no config.json; wanted a Hugging Face model folder")
        config = text_part(config)
        self.vocab_size = int(config["vocab_size"])
        self.max_positions: int | None = config.get("max_position_embeddings")
        self.endings = stop_conditions_of(folder)
        self.has_tokenizer = has_tokenizer(folder)


def rows_of(tokens: Array, offsets: Array) -> list[list[int]]:
    """Token ids of each sequence."""
    return [part.tolist() for part in np.split(tokens, offsets[1:-1])] if len(offsets) > 1 else []


def check_sequences(
    what: str, ids: Sequence[object], tokens: Array, offsets: Array, room: int, max_length: int, vocab_size: int
) -> None:
    """
    Raises:
        SamplingError: an empty sequence, one with no `room` left under `max_length`, or ids outside the vocabulary.
    """
    lengths = np.diff(offsets)
    if len(lengths) != len(ids) or offsets[0] != 0 or offsets[-1] != len(tokens):
        raise SamplingError(
            f"{what}: found {len(ids)} ids, {len(lengths)} spans, {len(tokens)} tokens; wanted them to fit"
        )
    if (lengths == 0).any():
        raise SamplingError(f"{what} {ids[int(np.argmin(lengths))]}: found no token; wanted at least one")
    if (lengths + room > max_length).any():
        at = int(np.argmax(lengths))
        asked = f"{lengths[at]} tokens" + (f" + max_tokens {room}" if room else "")
        raise SamplingError(f"{what} {ids[at]}: found {asked}; wanted at most model.max_length = {max_length} together")
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        at = int(np.searchsorted(offsets, wrong[0], "right")) - 1
        raise SamplingError(f"{what} {ids[at]}: found token id {tokens[wrong[0]]}; wanted 0 to {vocab_size - 1}")


def stop_rules(
    stop: str | Sequence[str] | Sequence[int] | None, model: BaseModel, also: Sequence[str] = ()
) -> tuple[list[str], list[int]]:
    """(stop strings, stop token ids). Strings add to the model's end tokens; ids replace them; [] means no stop.

    `also`: further strings, whatever `stop` is.

    Raises:
        SamplingError: strings for a model without a tokenizer, or a string that no text can contain.
    """
    given: list[str | int] = [stop] if isinstance(stop, str) else list(stop or ())
    strings = [*(item for item in given if isinstance(item, str)), *also]
    if strings and not model.has_tokenizer:
        raise SamplingError(
            f"SamplingParams.stop: found strings {strings!r} for a model without a tokenizer; wanted ids"
        )
    is_exact = stop is not None and not any(isinstance(item, str) for item in given)
    ids = [int(item) for item in given] if is_exact else list(model.endings.ids)
    try:
        texts, special = model.endings.stops(strings)
    except ConfigError as error:
        raise SamplingError(f"SamplingParams.{error}") from None
    return texts, list(dict.fromkeys([*ids, *special]))


def engine_params(
    params: SamplingParams,
    n: int,
    seed: int,
    model: BaseModel,
    also_stop: Sequence[str] = (),
    prompt_topk: int | None = None,
    *,
    also_stop_ids: Sequence[int] = (),
    topk: int = 0,
    in_parts: bool = False,
    with_text: bool = False,
) -> vllm.SamplingParams:
    """vLLM's parameters of one group; completion i is sampled with seed + i. `also_stop` and `also_stop_ids` add to
    `params.stop`.

    `prompt_topk`: also score the prompt, with so many of the likeliest tokens; None: do not. `topk`: likeliest tokens
    beside each sampled one. `in_parts`: outputs hold what is new in them. `with_text`: outputs hold text.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

    if 0 < params.temperature < MIN_TEMPERATURE:
        raise SamplingError(
            f"SamplingParams.temperature: found {params.temperature}; wanted 0 (greedy) or at least {MIN_TEMPERATURE}"
        )
    strings, ids = stop_rules(params.stop, model, also_stop)
    return vllm.SamplingParams(
        n=n,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=seed,
        stop=strings,
        stop_token_ids=list(dict.fromkeys([*ids, *also_stop_ids])),
        ignore_eos=True,  # `ids` holds them where they count
        detokenize=bool(strings) or with_text,
        logprobs=topk,  # 0: of the sampled token alone
        prompt_logprobs=prompt_topk,
        flat_logprobs=True,
        output_kind=RequestOutputKind.DELTA if in_parts else RequestOutputKind.FINAL_ONLY,
    )


def parts_params(request: PartsRequest, n: int, seed: int, model: BaseModel, scored: bool) -> vllm.SamplingParams:
    """As `engine_params`, for completions that arrive in parts with their text. `scored`: also score the prompt."""
    return engine_params(
        request.params,
        n,
        seed,
        model,
        request.also_stop,
        request.prompt_topk if scored else None,
        also_stop_ids=request.also_stop_ids,
        topk=request.topk,
        in_parts=request.incremental,
        with_text=model.has_tokenizer,
    )


def score_params(topk: int = 0) -> vllm.SamplingParams:
    """vLLM's parameters of a request that only scores its prompt. `topk`: also with so many of the likeliest tokens."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        max_tokens=1,  # vLLM cannot generate none
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=topk,  # 0: of the given tokens alone; given here, as this switches the prefix cache off
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def position_params(token: int) -> vllm.SamplingParams:
    """vLLM's parameters of a request that scores `token` as the prompt's next token."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        max_tokens=1,
        temperature=1.0,
        ignore_eos=True,
        detokenize=False,
        logprobs=1,
        logprob_token_ids=[token],
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def position_logprob(output: RequestOutput, token: int) -> float:
    """The log-probability (nats) in the output of a request of `position_params`."""
    (completion,) = output.outputs
    return float(completion.logprobs[0][token].logprob)


def prompt_scores(output: RequestOutput, k: int) -> PromptScores:
    """The scores in the output of a request that asked for its prompt's log-probabilities with the `k` likeliest.

    vLLM lists the prompt's token first, then the k likeliest, which may include that token again.
    """
    found = output.prompt_logprobs
    ids = np.asarray(found.token_ids, np.int32).reshape(-1, k + 1)
    values = np.asarray(found.logprobs, np.float32).reshape(-1, k + 1)
    return PromptScores(np.concatenate([np.zeros(1, np.float32), values[:, 0]]), ids[:, 1:], values[:, 1:])


def completion_part(completion: CompletionOutput, k: int) -> CompletionPart:
    """What is new in an output of `parts_params`, with the `k` likeliest tokens beside each sampled one."""
    if completion.finish_reason not in (None, "stop", "length"):
        raise SamplingError(f"the engine ended a request with {completion.finish_reason!r}; wanted 'stop' or 'length'")
    rows = completion.logprobs
    width, count = k + 1, len(completion.token_ids)
    if len(rows.token_ids) == width * count:
        ids = np.asarray(rows.token_ids, np.int32).reshape(count, width)
        values = np.asarray(rows.logprobs, np.float32).reshape(count, width)
    else:
        columns = [_ranked(rows, at, k) for at in range(count)]
        ids = np.asarray([each for each, _ in columns], np.int32).reshape(count, width)
        values = np.asarray([each for _, each in columns], np.float32).reshape(count, width)
    tokens = np.asarray(completion.token_ids, np.int32)
    return CompletionPart(
        completion.index, completion.text, tokens, values[:, 0], ids[:, 1:], values[:, 1:], completion.finish_reason
    )


def _ranked(rows: FlatLogprobs, at: int, k: int) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of one position: the sampled token, then the k likeliest.

    vLLM lists them so. Where it merges outputs that nobody has fetched, a sampled token that is among the k likeliest
    is listed once, with its rank.
    """
    where = range(rows.start_indices[at], rows.end_indices[at])
    first = where[0]
    likeliest = sorted(where[1:] if len(where) > k else where, key=lambda i: rows.ranks[i])[:k]
    order = [first, *likeliest]
    return [rows.token_ids[i] for i in order], [rows.logprobs[i] for i in order]


def group_seeds(seed: int, problems: Array, occurrence: Array | None = None) -> list[int]:
    """(P,) seeds by problem and occurrence, not by position: one call or several give the same completions.

    `occurrence`: (P,) how often each problem was sampled before under this seed; None: count repeats in `problems`.
    The next n - 1 numbers above each seed are free for its children.
    """
    times = occurrences(problems) if occurrence is None else occurrence
    words = zip(problems.tolist(), times.tolist(), strict=True)
    return [_word(seed, problem & SEED_WORDS, nth) for problem, nth in words]


def child_seeds(seed: int, problems: Array, n: int, occurrence: Array | None = None) -> list[int]:
    """(R,) seeds of P * n completions: those that vLLM gives the children of a group's request."""
    return [group + child for group in group_seeds(seed, problems, occurrence) for child in range(n)]


def _word(seed: int, *words: int) -> int:
    return int(np.random.SeedSequence([seed & SEED_WORDS, *words]).generate_state(1, np.uint64)[0] >> 2)


def later_seed(seed: int, *where: int) -> int:
    """Seed of a further request of a completion; `where`: the position at which it continues."""
    return _word(seed, *where)


def columns(
    problems: Array, prompt_tokens: Array, prompt_offsets: Array, n: int, outputs: Sequence[RequestOutput], version: int
) -> Rollouts:
    """P finished requests as R = P * n columnar completions; a greedy request answered once and counts n times."""
    done = [
        finished(completion, version)
        for output in outputs
        for completion in sorted(output.outputs, key=lambda completion: completion.index) * (n // len(output.outputs))
    ]
    return to_rollouts(problems, prompt_tokens, prompt_offsets, done)


def finished(completion: CompletionOutput, version: int) -> Completion:
    """A completion of vLLM that ended by a stop condition or at its length limit."""
    if completion.finish_reason not in ("stop", "length"):
        raise SamplingError(f"the engine ended a request with {completion.finish_reason!r}; wanted 'stop' or 'length'")
    return so_far(completion, version)


def so_far(completion: CompletionOutput, version: int) -> Completion:
    """vLLM's completion, which may have been stopped from outside."""
    logprobs = completion.logprobs.logprobs
    return completion_of(completion.token_ids, logprobs, version, stopped=completion.finish_reason == "stop")
