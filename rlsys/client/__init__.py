"""The primitives in a user's hands, after the Tinker SDK: a service, training clients, sampling clients, futures.

Nothing here knows Ray. A `Backend` (see ``rlsys.client.backend``) is what reaches learner and samplers; the one on Ray
is ``actors.service.deployment``. ``rlsys.service.learner_host``, ``turns`` and ``snapshot_cache`` are the other end of
the wire: what a learner door and a sampler door do, in order.
"""

from rlsys.client.config import ServiceConfig
from rlsys.client.futures import ApiFuture
from rlsys.client.sampling import SamplingClient
from rlsys.client.service import ServiceClient
from rlsys.client.training import TrainingClient

__all__ = ["ApiFuture", "SamplingClient", "ServiceClient", "ServiceConfig", "TrainingClient"]
