"""What a run will need before it is started: memory and time of a rank, from sizes and flags."""
