"""Every error that rlsys raises on purpose, in one tree.

    RlsysError
    ├── ConfigError (ValueError)           a job's YAML or an override is wrong
    │   └── RunExistsError                 the run directory already holds a run
    ├── DatumError (ValueError)            a datum is wrong: which datum, which key, found, wanted
    │   └── MissingInputError (KeyError)   the loss requires an input that the datum lacks
    ├── LossError (ValueError)             unknown loss, or unknown or impossible loss_fn_config
    ├── SamplingError (ValueError)         a sampling request that cannot be served as asked
    ├── GradientError (ArithmeticError)    no gradient, or one that is not finite; weights are untouched
    ├── DivergedError (ArithmeticError)    an update has destroyed the policy: no finite numbers, or no gradient
    ├── WeightSyncError (RuntimeError)     a sampler does not hold the weights that it should
    ├── MismatchError (RuntimeError)       learner and sampler disagree on log-probabilities
    ├── GradingError (RuntimeError)        too many graders failed for the rewards to mean anything
    ├── QualityError (RuntimeError)        a stage ended below the quality that the next one needs
    ├── StalledError (TimeoutError)        work remains and nothing moved within the limit
    ├── ClusterError (RuntimeError)        the cluster cannot be reached or lacks what the job asks for
    ├── ActorFailedError (RuntimeError)    an actor died, or raised something that is not in this tree
    │   ├── ActorDiedError                 it is gone, or its engine is: its work can be done again by another
    │   └── DataLostError                  what a stage made was on a node that is gone: the stage can be done again
    ├── StorageError (RuntimeError)        a disk does not take what has to be written: full, read-only, over quota
    └── CheckpointError (ValueError)       a file of weights is damaged, foreign or misplaced

To add one: derive from RlsysError and the builtin that a caller would expect, take one message, and draw it above.
One message and no other state keeps every error picklable, so that it survives the way out of an actor.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RlsysError(Exception):
    """The root: catch it to catch all that rlsys raises on purpose."""


class ConfigError(RlsysError, ValueError):
    """A job's configuration is wrong."""


class RunExistsError(ConfigError):
    """The run directory already holds a run."""


class DatumError(RlsysError, ValueError):
    """A datum is wrong in itself or for the loss it was submitted to."""


class MissingInputError(DatumError, KeyError):
    """A datum lacks an input that the loss requires."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class LossError(RlsysError, ValueError):
    """No such loss, or its loss_fn_config is not one that it takes."""


class SamplingError(RlsysError, ValueError):
    """A sampling request cannot be served as asked."""


class GradientError(RlsysError, ArithmeticError):
    """optim_step has no gradient, or one that is not finite; the weights are as before."""


class DivergedError(RlsysError, ArithmeticError):
    """An update has destroyed the policy: its log-probabilities are not finite, or nothing moves it any more."""


class WeightSyncError(RlsysError, RuntimeError):
    """A sampler could not prove that it serves the weights it was sent."""


class MismatchError(RlsysError, RuntimeError):
    """Learner and sampler give the same tokens too different log-probabilities."""


class GradingError(RlsysError, RuntimeError):
    """So many graders failed that training on their zeros would be wrong."""


class QualityError(RlsysError, RuntimeError):
    """A stage ended below the quality that the next stage needs."""


class StalledError(RlsysError, TimeoutError):
    """Work remains and nothing moved within the limit."""


class ClusterError(RlsysError, RuntimeError):
    """The Ray cluster cannot be reached, or lacks what the job asks for."""


class ActorFailedError(RlsysError, RuntimeError):
    """An actor died, or raised an error from outside this tree."""


class ActorDiedError(ActorFailedError):
    """An actor or its engine is gone. What it was doing may or may not have been done."""


class DataLostError(ActorFailedError):
    """An object that a stage had made is gone with its node."""


class StorageError(RlsysError, RuntimeError):
    """A disk does not take what has to be written."""


class CheckpointError(RlsysError, ValueError):
    """A file of weights is damaged, foreign or misplaced."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known; empty where no known name is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
