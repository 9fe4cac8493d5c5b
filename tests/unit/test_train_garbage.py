"""Garbage is collected between steps, at the same ones on every rank, and never inside one."""

import gc

from mimscale.train.garbage import COLLECT_EVERY_STEPS, collected_between_steps


class Ring:
    def __init__(self):
        self.me = self


def test_nothing_is_collected_but_at_its_steps_and_everything_is_as_before_afterwards():
    collections = []
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    try:
        with collected_between_steps() as after_step:
            collections.clear()
            rings = [Ring() for _ in range(5000)]
            del rings
            after_step(1)
            assert collections == []
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0, "a collection looks at all that torch has made"
            after_step(COLLECT_EVERY_STEPS)
            assert collections == ["start", "stop"]
    finally:
        gc.callbacks.pop()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
