"""Client API, modelled on the Tinker SDK: service client, training clients, sampling clients, futures.

This package does not import Ray. A `Backend` (``rlsys.client.backend``) connects clients to learner and samplers; the
backend on Ray is ``actors.service.deployment``. ``rlsys.service`` is the server side: it executes the calls of training
clients in order, and manages the snapshots in an engine.
"""

from rlsys.client.config import ServiceConfig
from rlsys.client.futures import ApiFuture
from rlsys.client.sampling import SamplingClient
from rlsys.client.service import ServiceClient
from rlsys.client.training import TrainingClient

__all__ = ["ApiFuture", "SamplingClient", "ServiceClient", "ServiceConfig", "TrainingClient"]
