"""PartialOrder says which launches are certain to have ended before another starts, whatever the device's speed."""

from __future__ import annotations

from nanoflow_backend.schedule.plan import Schedule, ScheduleError


class PartialOrder:
    """The order of an unrolled schedule that lanes and waits guarantee; the order of issue alone guarantees nothing.

    Step k is launch `steps[k] = (layer, launch number)`; sets of steps are bit masks, so that a closure over
    thousands of launches costs milliseconds.
    """

    def __init__(self, schedule: Schedule, num_layers: int) -> None:
        self.steps = schedule.unroll(num_layers)
        self.index = {step: k for k, step in enumerate(self.steps)}
        self.direct: list[list[int]] = []  # the steps each one follows: the one before it in its lane, and its waits
        self.before: list[int] = []  # all steps that have ended when it starts, as a mask
        last_in_lane: dict[str, int] = {}
        for k, (layer, number) in enumerate(self.steps):
            launch = schedule.launches[number]
            direct = [last_in_lane[launch.lane]] if launch.lane in last_in_lane else []
            for wait in launch.waits:
                if wait.layers_back > layer:
                    continue  # there is no such layer: nothing to wait for
                target = self.index.get((layer - wait.layers_back, wait.launch), k)
                if target >= k:
                    raise ScheduleError(
                        f"launch {number} ({launch.operation} {launch.start}..{launch.stop}): "
                        f"waits for launch {wait.launch}, which is not issued before it"
                    )
                direct.append(target)
            last_in_lane[launch.lane] = k
            mask = 0
            for j in direct:
                mask |= self.before[j] | (1 << j)
            self.direct.append(direct)
            self.before.append(mask)

    def precedes(self, first: int, second: int) -> bool:
        return bool(self.before[second] >> first & 1)
