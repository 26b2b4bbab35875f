"""A client loses nothing but time when processes of its server are killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve import kills
from tests.serve.clients import Server
from tests.serve.raw_client import RawClient, batch

STEPS = 4
PROMPT = [5, 90, 310, 7]


def test_a_loop_makes_the_same_steps_when_the_http_process_and_the_controller_are_killed(
    server: Server, tmp_path: Path
) -> None:
    (undisturbed,) = kills.finished(server, [kills.begin(server, "same", STEPS, tmp_path)])
    loop = kills.begin(server, "same", STEPS, tmp_path)
    for kind in ("http", "controller"):
        kills.after_a_step(server, loop, 0.2)
        kills.kill(server, kind)
    (steps,) = kills.finished(server, [loop])
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for found, wanted in zip(steps, undisturbed, strict=True):
        assert found["reward"] == wanted["reward"]
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    lost = [line for line in loop.lines() if line.get("saw") == "a loss"]
    assert len(lost) <= 1, f"the HTTP process alone costs nothing: {lost}"


def test_an_engine_and_a_learner_that_are_killed_cost_samples_time_and_a_model_what_came_after_its_checkpoint(
    server: Server,
) -> None:
    client = RawClient(server, server.key)
    model = client.model(server.model, 8)
    client.train(model, [(PROMPT, [12, 77])], 1, 1e-2)
    saved = client.result(client.call(model, "save_weights", path="kept"))["path"]
    few, many = batch([(PROMPT, [12, 77])]), batch([(PROMPT, [12, 77] * 120)] * 100)
    loss = client.result(client.call(model, "forward", forward_input=few))["metrics"]["loss:sum"]
    sampler = client.sampler(model_path=client.save(model, "sampled"))
    ask = {"num_samples": 8, "sampling_params": {"max_tokens": 200, "temperature": 0}}
    wanted = client.result(client.asample(sampler, PROMPT, **ask))["sequences"]
    sampling = client.asample(sampler, PROMPT, **ask)
    passing = client.call(model, "forward_backward", forward_backward_input=many)
    kills.kill(server, "learner")
    kills.kill(server, "host")
    failed = client.outcome(passing)
    assert failed["category"] == "server" and "learner died" in failed["error"] and "reference" in failed["error"]
    status, text = client.answer("optim_step", {"model_id": model, "seq_id": 9, "adam_params": {}})
    assert status == 404 and "learner died" in text and f"its last checkpoint is {saved}" in text, text
    found = client.result(sampling)["sequences"]
    assert [each["tokens"] for each in found] == [each["tokens"] for each in wanted]
    again = client.model_of(saved)
    assert client.result(client.call(again, "forward", forward_input=few))["metrics"]["loss:sum"] == loss
