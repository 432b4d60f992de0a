# SPDX-License-Identifier: Apache-2.0
"""When so many seconds have passed since the last save: at one step, in all processes.

The clocks of processes differ, their steps do not, and a save must begin at the same
step everywhere. So process 0's clock decides. It is looked at together, at steps that
all processes know: each look brings process 0's word, which is "save now" or the step
of the next look. That step is half as far away as the save would be if steps went on
taking what they took, and no further than the save before. (The first steps after a
save seem to take nothing: they are dispatched and not waited for.) So there are at most
twice as many looks between two saves as the number of steps between them has binary
digits, 40 for a million, and the last ones are a step apart; a training step never
waits for an exchange otherwise.

Accuracy: the save comes at the first step past the time while steps take equally long;
when they become k times as long right after a look with r seconds left, up to r k/2
after that look. With one process the clock is looked at after every step.
Units: seconds of the given clock; steps as in `due`, ascending.
Invariants: every process calls `restart` and `due` with the same steps.
Raises: TimeoutError when process 0 does not answer a look in time.
"""

import itertools
import time
from collections.abc import Callable

import jax

from qwen_jax.checkpoint import agree

_instances = itertools.count()  # the same in every process: creation is collective


class Timer:
    """Whether `every_s` seconds have passed since the last restart.

    Args:
      every_s: 0 means never.
      timeout_s: how long a look may wait for process 0.
      clock: seconds, of any origin.
    """

    def __init__(
        self,
        every_s: float,
        *,
        timeout_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._every_s, self._timeout_s, self._clock = every_s, timeout_s, clock
        self._tag = f"qwen_jax/timer/{next(_instances)}"
        self._period = self._looks = 0
        self.restart(0)

    def restart(self, step: int) -> None:
        """A save of `step` has begun, or training goes on from it."""
        self._began_s = self._seen_s = self._clock()
        self._began_step = self._seen_step = step
        self._look_at = step + 1
        # The looks before a save are over everywhere when the next save has its votes,
        # and that is before the one after it begins: two periods back is safe.
        self._period, self._looks = self._period + 1, 0
        if self._period > 2:
            agree.forget(f"{self._tag}/{self._period - 2}")

    def due(self, step: int) -> bool:
        """Whether to save after `step`; call once a step in every process."""
        if not self._every_s:
            return False
        if jax.process_count() == 1:
            return self._left_s() <= 0
        if step < self._look_at:
            return False
        self._looks += 1
        tag = f"{self._tag}/{self._period}/{self._looks}"
        mine = self._next_look(step) if jax.process_index() == 0 else None
        self._look_at = agree.from_primary(tag, mine, self._timeout_s)
        return self._look_at == step

    def _left_s(self) -> float:
        return self._every_s - (self._clock() - self._began_s)

    def _next_look(self, step: int) -> int:
        """Process 0's word: `step` itself to save now."""
        left_s, now_s = self._left_s(), self._clock()
        if left_s <= 0:
            return step
        made = max(1, step - self._began_step)
        lately_s = (now_s - self._seen_s) / max(1, step - self._seen_step)
        took_s = max(lately_s, (now_s - self._began_s) / made, 1e-6)
        self._seen_s, self._seen_step = now_s, step
        return step + max(1, min(made, int(left_s / 2 / took_s)))
