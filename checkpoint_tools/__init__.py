"""Command lines over the package: make, convert, merge and verify model folders."""

import logging
import warnings

# megatron-core says on import, which follows this one, which accelerators are absent: a converter
# needs none.
for message in (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    "`torch.distributed.*deprecated",
):
    warnings.filterwarnings("ignore", message=message)
logging.getLogger("transformers.modeling_rope_utils").setLevel(
    logging.ERROR
)  # does not know the model's rotary keys
