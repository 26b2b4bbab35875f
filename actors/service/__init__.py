"""Deployments on Ray, which serve `rlsys.ServiceClient`."""
