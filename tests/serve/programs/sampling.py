"""Sampling clients of the base, of unnamed and of named weights: samples, log-probabilities of prompts, old weights."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
from tinker import types

from tests.serve.programs.sdk import VERSION, datum, logprobs_of, wait
from tests.serve.programs.seen import MODEL, check, say, step
from tests.serve.programs.training import ADAM, CLOSE, EXACT, IDS, fresh, supervised

PROMPT = types.ModelInput.from_ints(IDS)
CONTEXT = 512  # positions of tests/serve/tiny_base.py
AGREE = 1e-3  # learner against sampler, whose kernels differ; both compute in float32 here
TOP = 5


def samples(client: Any, _: Any) -> None:
    trainer = fresh(client)
    with step("a sampling client of the base"):
        base = wait(client.create_sampling_client(base_model=MODEL))
        q = prompt_logprobs(base, IDS)
        p = learner_logprobs(trainer, IDS)
        check("a fresh adapter is the base", q[1:], p, AGREE)
    with step("save_weights_and_get_sampling_client"):
        first = wait(trainer.save_weights_and_get_sampling_client())
        check("learner and sampler agree", prompt_logprobs(first, IDS)[1:], p, AGREE)
    draws(first)
    prompts(first)
    with step("an old sampling client keeps its weights"):
        wait(trainer.forward_backward([supervised()], "cross_entropy"))
        wait(trainer.optim_step(ADAM))
        second = wait(trainer.save_weights_and_get_sampling_client())
        new = learner_logprobs(trainer, IDS)
        check("the new one has the new weights", prompt_logprobs(second, IDS)[1:], new, AGREE)
        check("the old one has the old weights", prompt_logprobs(first, IDS)[1:], p, AGREE)
        check("old and new differ", bool(np.abs(new - p).max() > 0.01), True)
    with step("save_weights_for_sampler"):
        path = wait(trainer.save_weights_for_sampler("named")).path
        check(
            "a sampler checkpoint's path",
            path.startswith("tinker://") and path.endswith("/sampler_weights/named"),
            True,
        )
        named = wait(client.create_sampling_client(model_path=path))
        check("it has the weights that were saved", prompt_logprobs(named, IDS)[1:], new, AGREE)
        other = wait(trainer.create_sampling_client(path))
        check("so has one of the training client", prompt_logprobs(other, IDS)[1:], new, AGREE)
        if hasattr(named, "get_base_model"):  # 0.15 on
            check("get_base_model", named.get_base_model(), MODEL)
            tokenizer = named.get_tokenizer()
            check("the sampling client's tokenizer", tokenizer.decode(tokenizer.encode("4 + 5")), "4 + 5")
    if VERSION >= (0, 15):
        with step("a pickled sampling client"):
            copy = pickle.loads(pickle.dumps(named))
            check("it samples from the same weights", prompt_logprobs(copy, IDS)[1:], new, AGREE)


def draw(sampler: Any, number: int = 1, prompt: Any = PROMPT, **params: Any) -> list[Any]:
    asked = types.SamplingParams(**{"max_tokens": 8, "temperature": 1.0, **params})
    return list(wait(sampler.sample(prompt=prompt, num_samples=number, sampling_params=asked)).sequences)


def tokens(sequences: list[Any]) -> list[list[int]]:
    return [list(each.tokens) for each in sequences]


def draws(sampler: Any) -> None:
    with step("samples"):
        found = draw(sampler, 6, seed=3)
        check("as many as asked", len(found), 6)
        check(
            "a log-probability per token", [len(each.logprobs) for each in found], [len(each.tokens) for each in found]
        )
        check("they are log-probabilities", bool(all(each <= 0.0 for one in found for each in one.logprobs)), True)
        check("samples of one request differ", len({tuple(each.tokens) for each in found}) > 1, True)
        check("stop_reason is stop or length", {each.stop_reason for each in found} <= {"stop", "length"}, True)
        check("no sample is longer than max_tokens", max(map(len, tokens(found))) <= 8, True)
        if VERSION >= (0, 28):
            check("sequence ids are distinct", len({each.sequence_id for each in found}), 6)
        again = draw(sampler, 6, seed=3)
        check("the same seed, the same samples", tokens(again), tokens(found))
        check("another seed, other samples", tokens(draw(sampler, 6, seed=4)) != tokens(found), True)
        longest = max(found, key=lambda each: len(each.tokens))
        scored = prompt_logprobs(sampler, [*IDS, *longest.tokens])[len(IDS) :]
        check("a sample's log-probabilities are those of its tokens in a prompt", longest.logprobs, scored, AGREE)
    with step("stops and lengths"):
        # no stop: runs to max_tokens even if the model ends
        never = draw(sampler, 2, stop=[], max_tokens=5, seed=1)
        say(saw="stop=[]", tokens=tokens(never), reasons=[each.stop_reason for each in never])
        check("max_tokens ends a sample", [each.stop_reason for each in never], ["length", "length"])
        check("with exactly so many tokens", [len(each.tokens) for each in never], [5, 5])
        line = tokens(never)[0]
        at = draw(sampler, 1, stop=[line[2]], max_tokens=5, seed=1)[0] if line[2] not in line[:2] else None
        if at is not None:
            check("a stop id ends a sample and is in it", list(at.tokens), line[:3])
            check("its reason is stop", at.stop_reason, "stop")
        greedy = draw(sampler, 3, temperature=0.0, stop=[], max_tokens=4)
        check("temperature 0 is greedy", len({tuple(each.tokens) for each in greedy}), 1)
        best = top(sampler, [*IDS, greedy[0].tokens[0]])[-1]
        check(
            "greedy takes the most likely token or one as likely",
            best[0][1] - dict(best)[greedy[0].tokens[0]] < AGREE,
            True,
        )
        low = draw(sampler, 3, temperature=0.001, stop=[], max_tokens=4, seed=1)
        check("a low temperature is served", tokens(low)[0], list(greedy[0].tokens))
        only = draw(sampler, 2, top_k=1, stop=[], max_tokens=4, seed=1)
        check("top_k 1 is greedy", tokens(only)[1], list(greedy[0].tokens))
        narrow = draw(sampler, 2, top_p=0.5, max_tokens=4, seed=1)
        check("top_p is served", len(narrow), 2)
    with step("a stop string"):
        tokenizer = sampler_tokenizer(sampler)
        if tokenizer is not None:
            text = tokenizer.decode(greedy[0].tokens[:2])
            tail = tokenizer.decode(greedy[0].tokens[1:2])
            if tail and tail not in tokenizer.decode(greedy[0].tokens[:1]):
                found = draw(sampler, 1, temperature=0.0, stop=tail, max_tokens=4)[0]
                check("a stop string ends with the token that completes it", tokenizer.decode(found.tokens), text)
                check("the reason is stop (string)", found.stop_reason, "stop")
                listed = draw(sampler, 1, temperature=0.0, stop=["never this", tail], max_tokens=4)[0]
                check("one of several stop strings", list(listed.tokens), list(found.tokens))
    with step("no max_tokens"):
        params = types.SamplingParams(temperature=1.0, seed=1)
        prompt = types.ModelInput.from_ints((IDS * CONTEXT)[: CONTEXT - 12])
        found = wait(sampler.sample(prompt=prompt, num_samples=1, sampling_params=params)).sequences[0]
        whole = len(found.tokens) == 12 or found.stop_reason == "stop"
        check("a sample ends with the context, or by itself", whole, True)
    with step("many requests at once"):
        futures = [sampler.sample(PROMPT, 2, types.SamplingParams(max_tokens=4, seed=index)) for index in range(40)]
        found = [list(wait(each).sequences) for each in futures]
        check("each is answered", [len(each) for each in found], [2] * 40)
        check(
            "among others too, the same seed gives the same samples",
            tokens(found[7]),
            tokens(draw(sampler, 2, max_tokens=4, seed=7)),
        )


def prompts(sampler: Any) -> None:
    with step("prompt log-probabilities"):
        params = types.SamplingParams(max_tokens=1, temperature=1.0, seed=1)
        plain = wait(sampler.sample(PROMPT, 1, params, include_prompt_logprobs=True))
        q = prompt_logprobs(sampler, IDS)
        check(
            "one per token of the prompt, none for the first",
            [each is None for each in plain.prompt_logprobs],
            [True] + [False] * (len(IDS) - 1),
        )
        check("sample and compute_logprobs agree", plain.prompt_logprobs[1:], q[1:], EXACT)
        found = wait(sampler.sample(PROMPT, 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=TOP))
        rows = found.topk_prompt_logprobs
        check("the first row is undefined", rows[0] is None, True)
        check("k entries per row", [len(each) for each in rows[1:]], [TOP] * (len(IDS) - 1))
        check("in descending order", all(row[j][1] >= row[j + 1][1] for row in rows[1:] for j in range(TOP - 1)), True)
        check("log-probabilities", all(np.exp([each for _, each in row]).sum() <= 1 + 1e-4 for row in rows[1:]), True)
        inside = [
            (dict(row)[token], at)
            for row, token, at in zip(rows[1:], IDS[1:], q[1:], strict=True)
            if token in dict(row)
        ]
        check("top-k agrees with the prompt's own", [each for each, _ in inside], [each for _, each in inside], CLOSE)
        outside = [
            row[-1][1] - at for row, token, at in zip(rows[1:], IDS[1:], q[1:], strict=True) if token not in dict(row)
        ]
        check("what is not in it is less likely", all(each >= -CLOSE for each in outside), True)
        alone = wait(sampler.sample(PROMPT, 1, params, topk_prompt_logprobs=TOP))
        check("top-k without the prompt's own", alone.topk_prompt_logprobs is not None, True)
    if VERSION >= (0, 33):
        with step("the last prompt log-probabilities"):
            last = wait(sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=3))
            check("only the last three", [each is None for each in last], [True] * (len(IDS) - 3) + [False] * 3)
            check("equal to those of all", last[-3:], q[-3:], CLOSE)


def top(sampler: Any, ids: list[int]) -> list[Any]:
    params = types.SamplingParams(max_tokens=1, temperature=1.0, seed=1)
    answer = wait(sampler.sample(types.ModelInput.from_ints(ids), 1, params, topk_prompt_logprobs=TOP))
    return answer.topk_prompt_logprobs


def sampler_tokenizer(sampler: Any) -> Any:
    return sampler.get_tokenizer() if hasattr(sampler, "get_tokenizer") else None  # 0.15 on


def prompt_logprobs(sampler: Any, ids: list[int]) -> Any:
    found = wait(sampler.compute_logprobs(types.ModelInput.from_ints(ids)))
    check(
        "compute_logprobs: one per token, none for the first",
        [each is None for each in found],
        [True] + [False] * (len(ids) - 1),
    )
    return np.array([np.nan if each is None else each for each in found])


def learner_logprobs(trainer: Any, ids: list[int]) -> Any:
    answer = wait(trainer.forward([datum(ids[:-1], ids[1:])], "cross_entropy"))
    return logprobs_of(answer)[0]
