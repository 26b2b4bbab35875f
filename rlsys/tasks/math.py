"""MATH: competition problems, Hendrycks et al. 2021, arXiv:2103.03874.

Split of Lightman et al. 2023, arXiv:2305.20050: 12,000 problems for training, MATH-500 for evaluation. The training
source is a copy of the data set that has a column with the final answers.
"""

from __future__ import annotations

from rlsys.config import ColumnSection, SourceSection
from rlsys.tasks.dataset import DataSet

MATH_500 = SourceSection(path="HuggingFaceH4/MATH-500", split="test")


class Math(DataSet):
    train = SourceSection(path="nlile/hendrycks-MATH-benchmark")
    held_out = MATH_500
    columns = ColumnSection(prompt="problem", answer="answer")
