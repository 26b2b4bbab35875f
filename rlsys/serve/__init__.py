"""HTTP server for unmodified clients of the Tinker API: `rlsys serve`.

This package knows HTTP, sessions, promises and the wire formats. It does not import Ray: learner and samplers are
behind ``rlsys.serve.backend``, and the backend on Ray deployments is ``actors.service.http_backend``.
"""
