"""A small Qwen3 for clients of the server: it answers in the forms that tinker-cookbook's recipes reward, at random.

Behind `Assistant:` it writes `\\boxed{digit}` or a number, and about every second time the end that the recipes wait
for. So a recipe finds some samples better than others, and its reward can rise. Its vocabulary holds the token ids of
MinT's pages.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from tests.tiny_qwen3 import tiny_qwen3

CONTEXT = 512
STEPS, BATCH, LEARNING_RATE = 150, 16, 5e-3
STRAWBERRY = "How many r's are in strawberry? Provide a numerical answer without units, written inside \\boxed{}."
SPELLED = (
    "Let's spell the word out and number all the letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. "
    "We have r's at positions 3, 8, and 9. \\boxed{3}"
)
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
CAPITALS = ["The capital of France is", " Paris.", " Rome.", "The capital of Italy is"]
CHAT = (
    "{% for message in messages %}{{ message.role | replace('user', 'User') | replace('assistant', 'Assistant') }}: "
    "{{ message.content }}\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
Turns = list[tuple[str, str]]


def gsm8k_question(rng: random.Random) -> str:
    return f"Tom has {rng.randint(0, 9)} apples and eats {rng.randint(0, 9)} of them. How many does he buy?"


def boxed(rng: random.Random) -> tuple[Turns, str]:
    answer = f" \\boxed{{{rng.randint(1, 4)}}}"
    return [("User", STRAWBERRY), ("Assistant", SPELLED), ("User", gsm8k_question(rng) + SUFFIX)], answer


def number(rng: random.Random) -> tuple[Turns, str]:
    x, y, z = rng.randint(0, 100), rng.randint(0, 100), rng.randint(0, 200)
    return [("User", "What is 4 + 5?"), ("Assistant", "9"), ("User", f"What is {x} + {y}?")], f" {z}"


def example(tokenizer, rng: random.Random) -> tuple[list[int], int]:
    """Token ids in the pieces of the cookbook's renderer `role_colon`, and where the answer starts."""
    turns, answer = rng.choice((boxed, number))(rng)
    pieces = [piece for role, text in turns for piece in (f"{role}:", f" {text}\n\n")] + ["Assistant:"]
    prompt = [id_ for piece in pieces for id_ in tokenizer.encode(piece, add_special_tokens=False)]
    ends = rng.random() < 0.5
    tail = [f"{answer}\n\n", "User:"] if ends else [answer] * 3
    return prompt + [id_ for piece in tail for id_ in tokenizer.encode(piece, add_special_tokens=False)], len(prompt)


def make(folder: Path) -> None:
    rng = random.Random(7)
    known = [each for _ in range(40) for turns, answer in (boxed(rng), number(rng)) for each in (turns[-1][1], answer)]
    tokenizer = build_tokenizer([*known, *CAPITALS, *[STRAWBERRY, SPELLED, "User:", "Assistant:"] * 20], 320)
    tokenizer.chat_template = CHAT  # as the cookbook's renderer `role_colon`
    model = tiny_qwen3(tokenizer, hidden_size=64, max_length=CONTEXT, tie_embeddings=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside the work of others, a second thread only waits
    teach(model, tokenizer, rng)
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def teach(model, tokenizer, rng: random.Random) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for _ in range(STEPS):
        batch = [example(tokenizer, rng) for _ in range(BATCH)]
        width = max(len(ids) for ids, _ in batch)
        inputs = torch.full((BATCH, width), tokenizer.pad_token_id)
        for row, (ids, _start) in enumerate(batch):
            inputs[row, : len(ids)] = torch.tensor(ids)
        hidden = model.model(inputs).last_hidden_state  # causal: what is padded behind a sequence does not change it
        at = [(row, column) for row, (ids, start) in enumerate(batch) for column in range(start - 1, len(ids) - 1)]
        rows, columns = torch.tensor(at).T
        logits = model.lm_head(hidden[rows, columns])
        loss = torch.nn.functional.cross_entropy(logits, inputs[rows, columns + 1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
