"""LoRA on the decoder's column-, row- and expert-parallel linears, the toggle between teacher and
student, PEFT adapters in and out.
"""

from megatron_gkd.lora.apply import apply_lora
from megatron_gkd.lora.modules import lora_enabled

__all__ = ["apply_lora", "lora_enabled"]
