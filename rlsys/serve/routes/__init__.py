"""Routes by subject. They read requests and write answers; what they do is in `rlsys.serve`'s modules."""
