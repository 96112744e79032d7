"""Which rows decode, once decodes are dealt out to groups."""

from nanoflow_search.cost.workload import Mix
from nanoflow_search.predict.decode_layout import count_decodes, even_groups

from nanoflow_backend.schedule.plan import Group


def test_decodes_are_counted_as_the_engine_deals_them() -> None:
    groups = (Group(512, 0.25), Group(1024, 0.75))
    decodes = count_decodes(Mix(400, 624, 1, 1), groups)
    assert [decodes(*rows) for rows in ((0, 512), (0, 50), (100, 512), (512, 1024), (500, 522))] == [
        100,
        50,
        0,
        300,
        10,
    ]
    assert count_decodes(Mix(400, 624, 1, 1), ())(300, 512) == 100
    even = count_decodes(Mix(400, 624, 1, 1), even_groups(1024, range(256, 1025, 256)))
    assert [even(start, start + 256) for start in range(0, 1024, 256)] == [100] * 4
