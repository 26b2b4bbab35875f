"""Sections ``task``, ``prompt``, ``turns`` and ``rewards``: problems, prompts, environments and grades."""

from __future__ import annotations

from datetime import date
from typing import Any

from pydantic import Field, field_validator, model_validator

from rlsys.config.key_types import PathText, Processes, Seconds
from rlsys.config.section import Section


class SourceSection(Section):
    """Rows of a data set: a local file or folder (jsonl, json, csv, parquet), or a name on the Hub."""

    path: PathText
    subset: str | None = None  # of a data set that has several, such as "main" of openai/gsm8k
    split: str = "train"  # of a Hub data set or of a folder that has several


class ColumnSection(Section):
    """Which columns of a data set hold what."""

    prompt: str = "question"
    answer: str = "answer"


class ExampleSection(Section):
    """One worked example of a few-shot prompt."""

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class PromptSection(Section):
    """How a problem's text becomes the prompt's tokens."""

    chat: bool | None = None  # apply the tokenizer's chat template; None: if it has one
    system: str | None = None
    template: str = "{prompt}"  # around every question, few-shot ones too; {prompt} is the question
    few_shot: list[ExampleSection] = Field(default_factory=list)
    max_tokens: int | None = Field(None, ge=1)  # longer prompts are dropped and counted; None: they stop the run
    # to the chat template: {enable_thinking: false}. Any: the template defines them
    template_options: dict[str, Any] = Field(default_factory=dict)
    date: str | None = None  # YYYY-MM-DD, today's date for a chat template; None: the day on which the run began

    @field_validator("date", mode="before")
    @classmethod
    def _is_a_day(cls, day: object) -> str | None:
        """YAML reads an unquoted day as a date object."""
        try:
            return None if day is None else date.fromisoformat(str(day)).isoformat()
        except ValueError:
            raise ValueError(f"found {day!r}; wanted a day such as 2026-11-29, or null") from None

    @model_validator(mode="after")
    def _holds_the_question(self) -> PromptSection:
        if "{prompt}" not in self.template:
            raise ValueError(
                f"template: found {self.template!r}; wanted a text with {{prompt}} where the question goes"
            )
        if self.chat is False and self.system is not None:
            raise ValueError("system: a system prompt needs a chat template; put it into prompt.template instead")
        return self


class TurnSection(Section):
    """Multi-turn tasks: the environment replies from killable processes beside the samplers."""

    max_turns: int = Field(8, ge=1)  # of the model; all turns and replies share rl.sampling.max_tokens
    reply_timeout_s: Seconds = 5.0  # of one reply; a slower reply ends the completion and is counted
    workers: Processes = 1  # reply processes per sampler
    python_tool: bool = False  # allow the task "python" to run code that the model writes, in a sandbox (docs/tasks.md)


class TaskSection(Section):
    name: str = "arithmetic"  # a task of rlsys.tasks, or your class as "package.module:Class"
    train_problems: int | None = Field(None, ge=1)  # at most; None: all of a data set, 4096 of a generated task
    eval_problems: int | None = Field(None, ge=1)  # at most; None: all of a data set, 200 of a generated task
    train: SourceSection | None = None  # None: the task's default
    eval: SourceSection | None = None  # None: the task's default, else a held-out part of train
    columns: ColumnSection | None = None  # None: the task's default
    eval_share: float = Field(0.05, gt=0, lt=1)  # of train, held out by a hash of the prompt, where there is no eval
    # passed to your task class. Any: the class defines them
    options: dict[str, Any] = Field(default_factory=dict)
    min_operations: int = Field(3, ge=1)  # of train and eval problems
    max_operations: int = Field(4, ge=1)
    supervised_max_operations: int = Field(4, ge=1)  # of the examples that a base is trained on; the shortest have 1


class RewardSection(Section):
    """The reward is correct * grade + format * form + length * brevity - overlong penalty; each has its own curve.

    A grade is any finite number, such as a negative cost; graders of right and wrong give 1 and 0.
    """

    correct: float = 1.0  # weight of the task's grade
    solved_at: float = 1.0  # a completion with this grade or more counts as right
    # when the grader times out or fails; with negative grades, set it to the lowest grade
    failed_grade: float = 0.0
    format: float = 0.0  # weight of the format term: 1 if the completion has the right format, else 0
    format_pattern: str | None = None  # regular expression to search for; None: a final answer is required
    length: float = Field(0.0, ge=0)  # weight of brevity within the group, Kimi k1.5, arXiv:2501.12599 section 2.3.3
    workers: Processes = 2  # processes, each killable
    timeout_s: Seconds = 3.0  # of one grade
    max_failed_share: float = Field(
        0.5, ge=0, le=1
    )  # a larger share of timeouts and exceptions in a batch stops the run
    function: str | None = None  # "package.module:function" of (completion, answer) -> float; None: the task's own

    @field_validator("format_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        import regex  # only for a job with a pattern

        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"is no valid regular expression: {error}") from None
        return pattern
