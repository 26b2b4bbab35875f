"""The tree of errors raised by rlsys.

    RlsysError
    ├── ConfigError (ValueError)           invalid configuration: a job's YAML, an override, an option
    │   └── RunExistsError                 the run directory already holds a run
    ├── DatumError (ValueError)            invalid datum: which datum, which key, found, wanted
    │   └── MissingInputError (KeyError)   the loss requires an input that the datum lacks
    ├── LossError (ValueError)             unknown loss, or invalid loss_fn_config
    ├── SamplingError (ValueError)         invalid sampling request
    ├── GradientError (ArithmeticError)    no gradient, or one that is not finite; weights are not changed
    ├── DivergedError (ArithmeticError)    an update destroyed the policy: values are not finite, or no gradient
    ├── WeightSyncError (RuntimeError)     a sampler does not hold the published weights
    ├── MismatchError (RuntimeError)       log-probabilities of learner and sampler differ too much
    ├── GradingError (RuntimeError)        too many graders failed for the rewards to be useful
    ├── QualityError (RuntimeError)        a stage ended below the quality that the next stage needs
    ├── StalledError (TimeoutError)        pending work made no progress within the time limit
    ├── ClusterError (RuntimeError)        the cluster cannot be reached, or has too few resources
    ├── ActorFailedError (RuntimeError)    an actor died, or raised an error from outside this tree
    │   ├── ActorDiedError                 the actor or its engine died: another actor can repeat its work
    │   ├── RunLostError                   a client's run ended with its learner; its checkpoints remain
    │   └── DataLostError                  an output was lost with its node: the stage can be repeated
    ├── StorageError (RuntimeError)        a disk cannot be written: full, read-only, over quota
    └── CheckpointError (ValueError)       weight files are damaged, foreign or misplaced

To add an error: derive from RlsysError and the builtin that a caller would expect, take one message as the only
argument, and add it to the tree above. An error without other state can be pickled, so Ray can return it from an actor.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RlsysError(Exception):
    """Base class of all errors raised by rlsys."""


class ConfigError(RlsysError, ValueError):
    """The configuration of a job or a client is invalid."""


class RunExistsError(ConfigError):
    """The run directory already holds a run."""


class DatumError(RlsysError, ValueError):
    """A datum is invalid, in itself or for its loss."""


class MissingInputError(DatumError, KeyError):
    """A datum lacks an input that the loss requires."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class LossError(RlsysError, ValueError):
    """The loss is unknown, or its loss_fn_config is invalid."""


class SamplingError(RlsysError, ValueError):
    """A sampling request is invalid or cannot be served."""


class GradientError(RlsysError, ArithmeticError):
    """optim_step has no gradient, or a gradient that is not finite. Weights are not changed."""


class DivergedError(RlsysError, ArithmeticError):
    """An update destroyed the policy: log-probabilities are not finite, or the gradient is exactly 0."""


class WeightSyncError(RlsysError, RuntimeError):
    """A sampler could not prove that it serves the published weights."""


class MismatchError(RlsysError, RuntimeError):
    """Learner and sampler compute different log-probabilities for the same tokens."""


class GradingError(RlsysError, RuntimeError):
    """Too many graders failed: training on their zero rewards would be wrong."""


class QualityError(RlsysError, RuntimeError):
    """A stage ended below the quality that the next stage needs."""


class StalledError(RlsysError, TimeoutError):
    """Pending work made no progress within the time limit."""


class ClusterError(RlsysError, RuntimeError):
    """The Ray cluster cannot be reached, or has too few resources for the job."""


class ActorFailedError(RlsysError, RuntimeError):
    """An actor died, or raised an error from outside this tree."""


class ActorDiedError(ActorFailedError):
    """An actor or its engine died. Its current call may or may not have taken effect."""


class RunLostError(ActorFailedError):
    """The learner that held a run died. Its saved checkpoints remain."""


class DataLostError(ActorFailedError):
    """An output of a stage was lost with the node that held it."""


class StorageError(RlsysError, RuntimeError):
    """A disk cannot be written."""


class CheckpointError(RlsysError, ValueError):
    """Weight files are damaged, belong to another model, or are in the wrong place."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Suffix for an error message about an unknown name: the nearest known name; empty if none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
