"""Is it the same model? Tensors bit by bit, then hidden states and logits against transformers and
peft.
"""
