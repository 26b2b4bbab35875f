"""A job's YAML and its checks: sections by subject, the job in `job.py`, reading in `load.py`."""

from rlsys.config.algorithm import (
    AdvantageSection,
    EvalSection,
    OverlapSection,
    OverlongSection,
    RlSection,
    SamplingSection,
)
from rlsys.config.job import JobConfig
from rlsys.config.learner import LearnerSection
from rlsys.config.load import dump_config, keys, load_command, load_config, parse_config
from rlsys.config.model import HALF_ON_CUDA, LoraSection, MakeSection, ModelSection, Precision, SupervisedSection
from rlsys.config.run import CheckSection, ClusterSection, RunSection, Stage, TrackingSection, WatchdogSection
from rlsys.config.sampler import SamplerSection, refuse_dtype
from rlsys.config.section import Section
from rlsys.config.task import (
    ColumnSection,
    ExampleSection,
    PromptSection,
    RewardSection,
    SourceSection,
    TaskSection,
    TurnSection,
)

__all__ = [
    "HALF_ON_CUDA",
    "AdvantageSection",
    "CheckSection",
    "ClusterSection",
    "ColumnSection",
    "EvalSection",
    "ExampleSection",
    "JobConfig",
    "LearnerSection",
    "LoraSection",
    "MakeSection",
    "ModelSection",
    "OverlapSection",
    "OverlongSection",
    "Precision",
    "PromptSection",
    "RewardSection",
    "RlSection",
    "RunSection",
    "SamplerSection",
    "SamplingSection",
    "Section",
    "SourceSection",
    "Stage",
    "SupervisedSection",
    "TaskSection",
    "TrackingSection",
    "TurnSection",
    "WatchdogSection",
    "dump_config",
    "keys",
    "load_command",
    "load_config",
    "parse_config",
    "refuse_dtype",
]
