"""`python -m megatron_gkd.plan --model DIR --gpus 64 --gpu h100 [flags of megatron_gkd.train]`:
every possible layout with its memory and time, the best one and why, the reasons against the
others; with --script the best as a launch script. `--check`: the one layout that the flags name.
"""

import json
import os
import shlex
import sys

from megatron_gkd.flags import exit_with
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.check import check
from megatron_gkd.plan.layouts import Plan, make_job, make_plan
from megatron_gkd.plan.rates import read_rates
from megatron_gkd.plan.script import check_new, script_of, write_new
from megatron_gkd.plan.settings import PlanSettings, parse_plan
from megatron_gkd.plan.table import closest, everything, impossible, numbers, summary
from megatron_gkd.plan.ways_out import ways_out
from megatron_gkd.stop_requests import end_at_once_on_signals


def main() -> None:
    """The command."""
    try:
        own, config, given = parse_plan(sys.argv[1:])
        if own.check:
            print("\n".join(check(own, config)), flush=True)
            return
        for path in (own.json, own.script):
            check_new(path, overwrite=own.overwrite)  # before seconds of planning
        job = config, given, read_model_args(config.model.model), read_rates(own.gpu or "h100")
        plan = make_plan(make_job(own, *job))
        if own.json:
            text = json.dumps(numbers(plan), indent=1)
            write_new(own.json, text + "\n", overwrite=own.overwrite)
        if not plan.choices:
            ways = ways_out(own, *job)
            tried = f"Any of these would do: {', '.join(ways)}."
            if not ways:
                tried = "More GPUs, shorter rows, fewer samples and a lower rank would not do."
            raise ValueError(
                "\n".join(["no layout is possible.", *closest(plan), tried, *impossible(plan)])
            )
        print("\n".join(summary(plan)))
        if own.all:
            print("\n".join(["", *everything(plan)]))
        write_script(own, plan)
    except BrokenPipeError:  # a pager or head that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        exit_with(error)


def write_script(own: PlanSettings, plan: Plan) -> None:
    """Of the pick, or where there is none how to get it."""
    if not own.script:
        print("\n--script FILE writes it as a launch script, --all prints every layout")
        return
    text = script_of(plan.job, plan.pick, own.script)
    write_new(own.script, text, overwrite=own.overwrite, executable=True)
    name = shlex.quote(own.script)
    print(f"\nWritten: {name}; on the machine of the run, bash {name} --check checks it")


if __name__ == "__main__":
    end_at_once_on_signals()
    main()
