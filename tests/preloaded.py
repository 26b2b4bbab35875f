"""Imported by the server of tests/forked.py before its first fork. What is imported here is frozen: no collection of
garbage in a forked program, as after running out of memory, searches it or copies its pages.
"""

import gc
import importlib

from tests.forked import PRELOADED

gc.disable()  # imports make hardly any garbage
for name in PRELOADED:
    importlib.import_module(name)
gc.freeze()
gc.enable()
