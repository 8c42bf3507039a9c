"""GKD LoRA self-distillation of a Qwen3-Omni thinker on megatron-core. Importing this package
changes nothing in any other library.
"""
