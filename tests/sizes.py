"""Sizes of `tiny_folder` that several test files share: the smallest model that has everything."""

SMALLEST = dict(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
SMALLEST |= dict(num_experts=4, moe_intermediate_size=16, vocab_size=503)
