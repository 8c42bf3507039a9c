"""The bytes of all tensors that are alive, counted as CUDA's allocator would."""

import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Storages that operations make while the mode is on, until they are freed. In place of
    `DeviceMemory`, with a limit that the test sets.
    """

    def __init__(self):
        super().__init__()
        self.now = self.highest = 0
        self.most_allowed = 2**62
        self._alive = {}
        self._communicates = False

    def ignore(self, tensors):
        """These were there before."""
        self._alive.update({x.untyped_storage()._cdata: None for x in tensors})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._communicates |= function.namespace == "c10d"
        for leaf in tree_leaves(result):
            if hasattr(leaf, "untyped_storage"):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._alive:
                    self._add(storage)
        return result

    def _add(self, storage):
        size, key = storage.nbytes(), storage._cdata

        def freed(_):
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        if self.now > self.highest:
            self._let_threads_finish()
        self.highest = max(self.highest, self.now)

    def _let_threads_finish(self):
        """A thread of gloo's lets go of a collective's tensors some time after it has said that
        they are there; until then they would be counted.
        """
        while self._communicates and not _other_threads_sleep():
            time.sleep(0.0002)

    def used(self):
        self._let_threads_finish()
        return self.now

    def begin(self):
        self.highest = self.used()

    def peak(self):
        return self.highest

    def limit(self):
        return self.most_allowed


def _other_threads_sleep():
    time.sleep(0)  # one that waits for the interpreter gets it
    own = str(threading.get_native_id())
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if task.name != own and ") S " not in (task / "stat").read_text():
                return False
    return True
