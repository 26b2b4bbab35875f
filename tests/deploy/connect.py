"""A driver that says whether the cluster of its environment let it in."""

from __future__ import annotations

import os

import ray

if __name__ == "__main__":
    ray.init(address=f"{os.environ['RAY_HEAD_IP']}:{os.environ['RLSYS_PORT']}", log_to_driver=False)
    print("let in")
