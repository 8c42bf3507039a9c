"""What `checkpoint_tools.make_tiny_model` is made of: hub files, a tokenizer, a toy language and
its training.
"""
