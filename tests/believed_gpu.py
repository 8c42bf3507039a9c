"""A torch that believes in a GPU, without one: what code sees that runs on the CPU of a machine
with GPUs.
"""

from types import SimpleNamespace

import torch


def believe_in_a_gpu() -> list[str]:
    """Makes this process's torch see one GPU, whose properties it can ask for. Returns a list that
    says "started" each time CUDA is started.
    """
    started = []
    properties = SimpleNamespace(name="believed", major=9, minor=0, multi_processor_count=132)
    cuda = torch.cuda
    cuda.is_available, cuda.device_count = lambda: True, lambda: 1
    cuda._lazy_init = lambda: started.append("started")

    def get_device_properties(device=None):
        cuda._lazy_init()
        return [properties][cuda._utils._get_device_index(device, optional=True)]

    def current_device():
        cuda._lazy_init()
        return 0

    cuda.get_device_properties, cuda.current_device = get_device_properties, current_device
    # torch 2.14's AdamW asks the stream, whatever its parameters are on
    stream = SimpleNamespace(is_capturing=lambda: False)
    torch.accelerator.current_stream = lambda device=None: stream
    cuda.is_current_stream_capturing = stream.is_capturing
    return started
