"""`python -m checkpoint_tools.make_tiny_model --output DIR`: a small model folder in the hub's
format.

By default a whole Qwen3-Omni: audio tower, vision tower, MoE decoder, talker, code2wav, tokenizer,
processor files and chat template; with --family qwen3_moe a text model. The command line also
teaches the decoder a toy language to read, and the audio tower to tell how it sounds (the decoder
hears nothing for that); tests call `build_folder`: random weights, in a second.
"""

import sys

from checkpoint_tools.command import first_paragraph, refusals_in_one_line
from checkpoint_tools.settings import OUTPUT_HELP
from demo.tiny.config import TinyModelConfig
from megatron_gkd import startup
from megatron_gkd.families import families
from megatron_gkd.flags import Parser, refuse_unknown
from megatron_gkd.stop_requests import end_at_once_on_signals

# What the command line does unless told otherwise. 600 steps are a minute of one core: every rule
# of the toy language at or near 100 % on held-out prompts. 500 are half a minute: the tower tells
# the word in 98 % of its outputs.
TRAINED = {"train_steps": 600, "tower_steps": 500}


def parse() -> tuple[str, TinyModelConfig]:
    """The command line: (--output, a flag for each setting)."""
    parser = Parser(
        [TinyModelConfig],
        prog="python -m checkpoint_tools.make_tiny_model",
        description=first_paragraph(__doc__),
    )
    parser.add_argument("--output", required=True, help=OUTPUT_HELP)
    parser.set_defaults(**TRAINED)
    refuse_unknown(sys.argv[1:], parser)
    family = families().get(parser.parse_known_args()[0].family)
    if family and not family.towers:
        parser.set_defaults(tower_steps=0)
    (config,), others = parser.parse(sys.argv[1:])
    return others.output, config


def main() -> None:
    with refusals_in_one_line():
        output, config = parse()
    startup.quiet_imports()
    # after the command line is known to be right: they take seconds
    import transformers

    from demo.tiny.folder import build_folder

    # the hub's own config makes it warn about the talker's rotary keys
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with refusals_in_one_line():
        print(build_folder(output, config))


if __name__ == "__main__":
    end_at_once_on_signals()
    main()
