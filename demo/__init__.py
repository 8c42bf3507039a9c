"""Two demos on a small model: a distilled system prompt (run.sh) and a student that learns to hear
(run_speech.sh).
"""
