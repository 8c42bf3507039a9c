"""`python -m checkpoint_tools.lower_rank --hf_model DIR --adapter DIR --lora_rank R --output DIR`:
a lower rank.

Each linear's update W_up W_down is replaced by its best approximation of rank R (singular values,
in fp64; no matrix larger than the adapter's own is formed), and the error that this makes is
printed. A linear whose own rank is lower (rank_pattern, layers without LoRA) keeps its update and
is padded with zeros. Raising a rank needs no tool: training continues an adapter at a higher
--lora_rank with the function unchanged.
"""

from pathlib import Path

from checkpoint_tools.command import parse_flags, run_command
from checkpoint_tools.settings import LowerRankConfig
from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which take seconds
    CONFIG = parse_flags(LowerRankConfig, __doc__)
    startup.quiet_imports()

from megatron_gkd.lora.lower_rank import lower_rank
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.model.args import read_model_args


def lower(config: LowerRankConfig) -> str:
    """Write the adapter; return the table of errors. Raises ValueError for a rank that is not
    lower.
    """
    model_args = read_model_args(config.hf_model)
    adapter = PeftAdapter(config.adapter, model_args)
    return lower_rank(adapter, model_args, config.hf_model, config.lora_rank, Path(config.output))


if __name__ == "__main__":
    run_command(CONFIG, lower)
