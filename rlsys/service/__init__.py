"""The server side of `rlsys.client`: clients' calls on one learner and one engine. No Ray here."""
