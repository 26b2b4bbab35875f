"""DeepScaleR: about 40,000 competition problems (AIME until 2023, AMC, Omni-MATH, STILL), evaluated on MATH-500.

Luo et al. 2025, "DeepScaleR: Surpassing O1-Preview with a 1.5B Model by Scaling RL". The data set overlaps with MATH.
As in every task, training problems that also occur in MATH-500 are left out of training and counted.
"""

from __future__ import annotations

from rlsys.config import ColumnSection, SourceSection
from rlsys.tasks.dataset import DataSet
from rlsys.tasks.math import MATH_500


class DeepScaleR(DataSet):
    train = SourceSection(path="agentica-org/DeepScaleR-Preview-Dataset")
    held_out = MATH_500
    columns = ColumnSection(prompt="problem", answer="answer")
