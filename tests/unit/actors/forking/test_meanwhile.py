"""A call in a fork of this process gives here what it gives there."""

from __future__ import annotations

import os

import pytest

from actors.forking.meanwhile import Meanwhile
from rlsys.errors import ConfigError
from tests.waiting import until_gone


def test_the_result_is_that_of_another_process() -> None:
    pid, notes = Meanwhile(lambda: (os.getpid(), "ü" * 200_000)).result()  # more than a pipe holds
    assert pid != os.getpid() and notes == "ü" * 200_000
    until_gone([pid], "the fork")


def test_an_error_is_raised_here_as_it_is() -> None:
    def refuse() -> None:
        raise ConfigError("model.path: no tokenizer")

    with pytest.raises(ConfigError, match=r"^model\.path: no tokenizer$"):
        Meanwhile(refuse).result()


@pytest.mark.parametrize("how", ["dies", "cannot be sent"])
def test_a_call_without_an_answer_is_repeated_here(how: str) -> None:
    here = os.getpid()

    def call() -> object:
        if os.getpid() != here and how == "dies":
            os._exit(9)
        return (lambda: os.getpid()) if how == "cannot be sent" else lambda: here

    found = Meanwhile(call).result()
    assert callable(found) and found() == here
