"""How long the demo's teacher trains, and at which learning rate."""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cycle:
    """`steps` optimizer steps: linear warm-up, constant, linear decay to zero over the last `decay_steps`."""

    steps: int
    decay_steps: int

    @classmethod
    def parse(cls, text: str) -> "Cycle":
        """From "STEPS:DECAY"."""
        steps, decay = text.split(":")
        return cls(int(steps), int(decay))

    def factor(self, step: int, warmup_steps: int) -> float:
        """Learning-rate factor of the step after `step` finished ones of this cycle."""
        return min(1.0, (step + 1) / warmup_steps, (self.steps - step) / self.decay_steps)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Cycles, one after the other; from the second on the embedding is held to its rank."""

    cycles: tuple[Cycle, ...]
    warmup_steps: int

    @property
    def steps(self) -> int:
        """Of all cycles."""
        return sum(c.steps for c in self.cycles)

    @property
    def ends(self) -> tuple[int, ...]:
        """Finished steps at the end of each cycle."""
        return tuple(itertools.accumulate(c.steps for c in self.cycles))

    def factor(self, step: int) -> float:
        """Learning-rate factor of the step after `step` finished ones."""
        for end, cycle in zip(self.ends, self.cycles, strict=True):
            if step < end:
                return cycle.factor(step - (end - cycle.steps), self.warmup_steps)
        return 0.0
