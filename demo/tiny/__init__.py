"""The small model that `checkpoint_tools.make_tiny_model` writes: its files, tokenizer, toy
language and training.
"""
