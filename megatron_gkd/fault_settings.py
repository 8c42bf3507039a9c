"""The settings of a run that meets faults: how long it waits, and what it does on purpose only."""

from dataclasses import dataclass

from megatron_gkd.flags import require_at_least, setting


@dataclass
class FaultConfig:
    _argument_group_name = "faults"

    collective_timeout: int = setting(
        600,
        "Seconds that a rank waits for the others in a collective before it ends the run.",
        aliases=["--ddp_timeout"],
    )
    start_timeout: int = setting(
        120, "Seconds that ranks and machines wait for each other at the start."
    )
    take_over_output_dir: bool = setting(
        False,
        "Take --output_dir from another run that still holds it: it ends without saving. For one "
        "that cannot be ended, on a machine that does not answer.",
    )
    allow_changed_inputs: bool = setting(
        False,
        "Resume though rows or base weights are not those that the checkpoint was trained with.",
    )

    def __post_init__(self):
        require_at_least(self, 1, "collective_timeout", "start_timeout")

    @property
    def group_timeout(self) -> float:
        """Seconds after which torch itself ends a collective: a little later than liveness.py,
        which says who has not answered.
        """
        return 1.05 * self.collective_timeout + 5
