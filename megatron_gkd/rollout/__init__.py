"""On-policy steps: batches in, the same batches with new responses out (rollout.py), written by a
backend (backend.py): the training model itself (generate.py, sampling.py, mode.py).
"""
