"""Deployments for `rlsys.ServiceClient` on Ray."""
