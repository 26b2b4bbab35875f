"""Sampler actors as one stage: dispatch of groups, membership, and the stage itself."""
