"""The stages of the loop on Ray actors: dispatch, restart, checkpoint."""
