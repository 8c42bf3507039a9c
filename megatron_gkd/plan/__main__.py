"""`python -m megatron_gkd.plan --check --gpus RANKS FLAGS`: the layout and the memory that a rank
needs, or exit status 2 and the reason.
"""

import argparse

from megatron_gkd.config import layout_line, parse_config_or_exit
from megatron_gkd.flags import exit_with
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.memory import estimate
from megatron_gkd.plan.workload import workload


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_gkd.plan",
        allow_abbrev=False,
        epilog="The other flags are those of megatron_gkd.train, whose --help lists them.",
    )
    parser.add_argument("--check", action="store_true", required=True)
    parser.add_argument("--gpus", type=int, required=True, metavar="RANKS")
    own, flags = parser.parse_known_args()
    config = parse_config_or_exit(flags)
    try:
        model_args = read_model_args(config.model.model)
        print(layout_line(config, own.gpus, model_args))
        needed = estimate(model_args, config.parallel, workload(config, model_args))
        print(f"Memory: at most about {needed.describe()}; towers not counted", flush=True)
    except (ValueError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
