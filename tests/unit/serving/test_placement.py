"""Which GPUs an instance gets, and the ways in which groups do not fit."""

import pytest

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.kv_events import KvEventsConfig
from nanoflow_backend.serving.placement import place

TWO_AND_ONE = [
    {"name": "m_0", "kind": "KIND_MODEL", "count": 2},
    {"name": "named", "kind": "KIND_CPU", "count": 1},
]


def placed(groups, instance, *, instances=TWO_AND_ONE, kind="MODEL", device_id="0", tp=1, shared=None, **config):
    engine_config = EngineConfig(model="m", tensor_parallel=tp, **config)
    args = {"model_instance_name": instance, "model_instance_kind": kind, "model_instance_device_id": device_id}
    parameters = {} if groups is None else {"gpu_device_ids": {"string_value": groups}}
    if shared is not None:
        parameters["GPU_DEVICE_IDS"] = {"string_value": shared}
    return place(engine_config, args, {"parameters": parameters, "instance_group": instances}).gpus


@pytest.mark.parametrize(
    ("groups", "instance", "options", "expected"),
    [
        ("0;1;2", "m_0_0", {}, (0,)),
        ("0;1;2", "m_0_1", {}, (1,)),
        ("0;1;2", "named_0", {}, (2,)),
        ("0,1;2,3;5,4", "named_0", {"tp": 2}, (5, 4)),
        (None, "m_0_1", {"kind": "GPU", "device_id": "3"}, (3,)),
        (None, "m_0_1", {}, None),
        (None, "m_0_1", {"gpus": (1,)}, (1,)),
        (None, "m_0_0", {"shared": "3"}, (3,)),
        (None, "m_0_1", {"shared": "3, 5", "tp": 2}, (3, 5)),
        (None, "m_0_1", {"shared": "5", "kind": "GPU", "device_id": "3"}, (3,)),
    ],
)
def test_each_instance_has_its_group(groups, instance, options, expected):
    assert placed(groups, instance, **options) == expected


@pytest.mark.parametrize(
    ("groups", "options", "complaint"),
    [
        ("", {}, "gpu_device_ids: expected groups of GPU ids .* got ''"),
        ("0;1;", {}, "gpu_device_ids: expected groups"),
        ("0;-1;2", {}, "gpu_device_ids: expected groups"),
        ("0;1", {}, "gpu_device_ids: expected 3 groups, one for each instance, got '0;1'"),
        ("0;1;0", {}, "gpu_device_ids: expected each GPU once, got '0;1;0'"),
        ("0;1;2", {"tp": 2}, r"gpus: expected 2 different ids \(tensor_parallel\), got \[0\]"),
        ("0,1;2,3;4,5", {}, r"gpus: expected 1 different ids \(tensor_parallel\), got \[0, 1\]"),
        ("0;1;2", {"device": "cpu"}, "gpus: expected none with device cpu"),
        ("0;1;2", {"gpus": (0,)}, "gpus: expected none in engine.json"),
        (None, {"shared": "0;1"}, "GPU_DEVICE_IDS: expected GPU ids as in \"0,1\", got '0;1'"),
        (None, {"shared": "0,1"}, r"gpus: expected 1 different ids \(tensor_parallel\), got \[0, 1\]"),
        ("0;1;2", {"shared": "0"}, "gpu_device_ids: expected it without GPU_DEVICE_IDS, got both"),
        ("0", {"instances": [{"name": "m_0", "kind": "KIND_GPU", "count": 1}]}, "expected instances of KIND_MODEL"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, options, complaint):
    with pytest.raises((ConfigError, ValueError), match=complaint):
        placed(groups, "m_0_0", **options)


MIXED = [
    {"name": "m_0", "kind": "KIND_MODEL", "count": 2, "gpus": []},
    {"name": "m_1", "kind": "KIND_GPU", "count": 2, "gpus": [3, 1]},
    {"name": "m_2", "kind": "KIND_CPU", "count": 1, "gpus": []},
]


def rank(instance, kind, device_id="0", instances=MIXED, **events):
    args = {"model_instance_name": instance, "model_instance_kind": kind, "model_instance_device_id": device_id}
    config = EngineConfig(model="m", kv_events=KvEventsConfig(**events))
    return place(config, args, {"instance_group": instances}).kv_events.data_parallel_rank


def test_each_instance_that_publishes_has_a_number_of_its_own():
    numbers = [
        rank("m_0_0", "MODEL"),
        rank("m_0_1", "MODEL"),
        *(rank(f"m_1_{index}", "GPU", device_id) for index in (0, 1) for device_id in ("3", "1")),
        rank("m_2_0", "CPU"),
    ]
    assert numbers == [0, 1, 2, 3, 4, 5, 6]
    assert rank("m_0_1", "MODEL", data_parallel_rank=10) == 11


def test_ports_beyond_the_last_are_refused_where_the_instance_starts():
    assert rank("m_0_0", "MODEL", endpoint="tcp://*:65535") == 0
    with pytest.raises(ConfigError, match=r"kv_events.data_parallel_rank: expected a port up to 65535 for endpoint"):
        rank("m_0_1", "MODEL", endpoint="tcp://*:65535")
