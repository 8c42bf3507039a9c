"""What a small model folder is made of: the flags of `checkpoint_tools.make_tiny_model` and the
argument of `build_folder`. Imports no torch, so that the command line answers at once.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_gkd.families import families
from megatron_gkd.flags import setting

TorchDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class TinyModelConfig:
    """Sizes are the decoder's. Raises ValueError for impossible sizes and for lessons of a tower
    that the family does not have.
    """

    family: str = setting("qwen3_omni", "A file of megatron_gkd/families.")
    num_hidden_layers: int = setting(3, "Decoder layers.")
    hidden_size: int = setting(128, "Width of the decoder.")
    num_attention_heads: int = setting(8, "Query heads.")
    num_key_value_heads: int = setting(4, "Key and value heads; divides the query heads.")
    head_dim: int = setting(32, "Channels of a head: even, at least 8.")
    num_experts: int = setting(8, "Experts of a layer.")
    num_experts_per_tok: int = setting(2, "Experts that a token is sent to.")
    moe_intermediate_size: int = setting(64, "Width of an expert.")
    vocab_size: int = setting(1024, "Tokens of the vocabulary.")
    rope_theta: float = setting(1000000.0, "Base of the rotary frequencies.")
    tie_word_embeddings: bool = setting(False, "The lm_head is the embedding.")
    thinker_only: bool = setting(
        False, "Leave out Qwen3-Omni's talker and code2wav, and the prefix of the thinker's names."
    )
    torch_dtype: TorchDtype = setting("float32", "Type of the stored weights.")
    max_shard_size: str = setting("5GB", "Largest safetensors file.")
    train_steps: int = setting(0, "Steps in which the decoder is taught the toy language.")
    tower_steps: int = setting(0, "Steps in which the audio tower is taught to tell its sound.")
    tower_sound: str = setting("tones", "The sound: tones, or voices (needs espeak-ng).")
    seed: int = setting(0, "Of weights and lessons: the same flags give the same bytes.")

    def __post_init__(self):
        if self.family not in families():
            raise ValueError(f"--family {self.family}: choose one of {', '.join(families())}")
        family = families()[self.family]
        if not family.towers:
            for flag in ("thinker_only", "tower_steps"):
                if getattr(self, flag):
                    raise ValueError(
                        f"--{flag}: {family.title} is a text model without towers; leave it out"
                    )
        if self.torch_dtype not in get_args(TorchDtype):
            raise ValueError(
                f"--torch_dtype {self.torch_dtype}: choose one of {', '.join(get_args(TorchDtype))}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"--num_attention_heads {self.num_attention_heads} is no multiple of "
                f"--num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 8:
            raise ValueError(
                f"--head_dim {self.head_dim} must be even and at least 8: half of it is split over "
                "three rotary axes"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"--num_experts_per_tok {self.num_experts_per_tok} exceeds "
                f"--num_experts {self.num_experts}"
            )
