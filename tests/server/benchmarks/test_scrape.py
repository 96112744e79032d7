"""The measurement of the metrics page, for two seconds: it finds every gauge, and every value on it once true."""

import random

from support.places import DEMO_MODEL

from benchmarks.serving import scrape


def test_every_value_of_every_gauge_was_a_load_of_the_engine(tmp_path):
    ages, changes = {}, {}
    with scrape.serving(tmp_path, DEMO_MODEL, True, "nanoflow,vllm,trtllm") as server:
        scraper = scrape.Scraper(server, 0.05)
        used = scrape.drive(server, scraper, 2.0, random.Random(5))
        scrape.measure_ages(tmp_path / "loads", scraper.scrapes, ages, changes)
    assert used.keys() == {"tritonserver", "stub", "engine"}
    assert ages.keys() == scrape.GAUGES.keys()
    assert all(len(of_one) == len(scraper.scrapes) > 10 for of_one in ages.values())
    assert changes["nanoflow_kv_cache_usage_perc"] > changes["nanoflow_num_requests_running"] > 0
    pages = ages['nanoflow_kv_cache_pages{state="used"}']
    assert sum(ages["nanoflow_kv_cache_usage_perc"]) < sum(pages), "what is live is newer than what is not"
