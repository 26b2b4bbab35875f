"""GSM8K: grade-school word problems, 7,473 for training, 1,319 for evaluation. Cobbe et al. 2021, arXiv:2110.14168."""

from __future__ import annotations

from rlsys.config import ColumnSection, SourceSection
from rlsys.math_grading.extraction import extract
from rlsys.tasks.dataset import DataSet


class Gsm8k(DataSet):
    train = SourceSection(path="openai/gsm8k", subset="main")
    held_out = SourceSection(path="openai/gsm8k", subset="main", split="test")
    columns = ColumnSection(prompt="question", answer="answer")

    def answer(self, text: str) -> str:
        """Return the text after #### in a worked solution; a text without #### is itself the answer."""
        final_answer = extract(text)
        return text if final_answer is None else final_answer.strip()
