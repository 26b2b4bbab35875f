"""Doors of few lines from Ray onto rlsys, and what keeps a job together. Ray is imported here and nowhere else."""
