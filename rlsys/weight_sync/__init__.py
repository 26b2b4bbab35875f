"""Adapter weights on their way from the learner to the samplers, and the proof of their arrival."""
