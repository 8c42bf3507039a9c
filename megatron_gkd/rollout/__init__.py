"""On-policy steps: Batch -> Batch with new responses, written by the training model itself."""
