"""LoRA on the decoder's column-, row- and expert-parallel linears, the toggle between teacher and
student, PEFT adapters in and out.
"""

from megatron_gkd.lora.apply import apply_lora
from megatron_gkd.lora.slots import as_student, as_teacher

__all__ = ["apply_lora", "as_student", "as_teacher"]
