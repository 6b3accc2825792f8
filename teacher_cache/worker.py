"""Who this process is among the workers that fill one cache, and who does what is done once.

Policy: no coordinator and no clocks. Claims in the ledger are hints against double work, never safety: what is committed first
stands, whoever made it.
"""

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from signal_store.errors import InputError

if TYPE_CHECKING:
    from signal_store.io.objects import Objects

POLL_SECONDS = 2.0
PATIENCE_SECONDS = 1800.0
"""A waiter that has seen nothing for this long does the work itself: the claimant may be dead."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker `number` (from 0) of `count`; `local` is its number on this machine, which picks its GPU. It may plan with so many
    `processes`: of a script of your own with more than one, all but `if __name__ == "__main__":` runs in each."""

    number: int = 0
    count: int = 1
    local: int = 0
    processes: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "i/n", i from 0."""
        number, slash, count = text.partition("/")
        if not slash:
            raise InputError("not a worker", expected="i/n with 0 <= i < n", found=text, where="--worker")
        return cls._checked(number, count, "0", "--worker")

    @classmethod
    def from_environment(cls) -> Self:
        """As torchrun, accelerate or Slurm tells its processes; alone if none did."""
        for rank, size, local in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
            if rank in os.environ and size in os.environ:
                return cls._checked(os.environ[rank], os.environ[size], os.environ.get(local, "0"), f"{rank}, {size}, {local}")
        return cls()

    @classmethod
    def _checked(cls, number: str, count: str, local: str, where: str) -> Self:
        plain = all(re.fullmatch(r"[0-9]{1,9}", part) for part in (number, count, local))
        if not plain or int(number) >= int(count):
            raise InputError("not a worker", expected="i/n with 0 <= i < n", found=f"{number}/{count}", where=where)
        return cls(int(number), int(count), int(local))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def claims(self, objects: "Objects", what: str) -> bool:
        """Leave a claim; False if another worker's stands. A worker that was killed finds its own again; the claim of one among
        another number of workers is out of date."""
        from signal_store.ledger.documents import CLAIMS  # reads zarr in, for which no help waits

        key = f"{CLAIMS}/{what}"
        if objects.create(key, str(self).encode()):
            return True
        standing = objects.read(key).decode()
        if standing.partition("/")[2] != str(self.count):
            objects.delete(key)
            return objects.create(key, str(self).encode())
        return standing == str(self)

    def should_make(self, objects: "Objects", what: str, key: str) -> bool:
        """Whether this worker is to make what `key` will hold: yes if it comes first, or alone; else after waiting in vain."""
        if objects.exists(key):
            return False
        if self.count == 1 or self.claims(objects, what):
            return True
        from run_kit.progress import progress_bar  # and rich's bars

        with progress_bar() as progress:
            progress.add_task(f"waiting for another worker's {what}", total=None, unit="")
            waited = 0.0
            while waited < PATIENCE_SECONDS:
                time.sleep(POLL_SECONDS)
                waited += POLL_SECONDS
                if objects.exists(key):
                    return False
        return True


ALONE = Worker()
