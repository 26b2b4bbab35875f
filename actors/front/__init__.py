"""Processes of `rlsys serve`: the controller's actor, and the HTTP process."""
