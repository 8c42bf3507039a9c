"""On-policy steps: batches in, the same batches with new responses out (rollout.py), written by a
backend (backend.py): the training model itself (generate.py and what it imports; docs/rollout.md).
"""
