"""MATH: competition problems, Hendrycks et al. 2021, arXiv:2103.03874.

Split as by Lightman et al. 2023, arXiv:2305.20050: 12,000 to train on, and MATH-500 to test. The copy trained on is one
that carries final answers beside the solutions.
"""

from __future__ import annotations

from rlsys.config import ColumnSection, SourceSection
from rlsys.tasks.dataset import DataSet

MATH_500 = SourceSection(path="HuggingFaceH4/MATH-500", split="test")


class Math(DataSet):
    train = SourceSection(path="nlile/hendrycks-MATH-benchmark")
    held_out = MATH_500
    columns = ColumnSection(prompt="problem", answer="answer")
