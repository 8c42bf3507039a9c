"""GKD LoRA self-distillation of Qwen3-Omni and Qwen3 MoE on megatron-core. Importing this package
changes nothing in any other library.
"""
