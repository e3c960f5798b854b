"""An attack on the program: damaged bundles, hostile checkpoints, kills; every answer is judged.

`python -m tests.attack --help` says how to run it; `judge.py` says what counts as a fault.
"""
