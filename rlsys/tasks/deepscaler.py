"""DeepScaleR: about 40,000 competition problems (AIME until 2023, AMC, Omni-MATH, STILL), tested on MATH-500.

Luo et al. 2025, "DeepScaleR: Surpassing O1-Preview with a 1.5B Model by Scaling RL". Its problems include some of MATH:
those that MATH-500 holds are left out of training, and counted, as for every task.
"""

from __future__ import annotations

from rlsys.config import ColumnSection, SourceSection
from rlsys.tasks.dataset import DataSet
from rlsys.tasks.math import MATH_500


class DeepScaleR(DataSet):
    train = SourceSection(path="agentica-org/DeepScaleR-Preview-Dataset")
    held_out = MATH_500
    columns = ColumnSection(prompt="problem", answer="answer")
