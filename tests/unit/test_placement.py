"""Which GPUs an instance gets, and the ways in which groups do not fit."""

import pytest

from nanoflow_backend.config import ConfigError, EngineConfig
from nanoflow_backend.serving.placement import place

TWO_AND_ONE = [
    {"name": "m_0", "kind": "KIND_MODEL", "count": 2},
    {"name": "named", "kind": "KIND_CPU", "count": 1},
]


def placed(groups, instance, *, tp=1, device="auto", instances=TWO_AND_ONE, visible=None, kind="MODEL", device_id="0"):
    config = EngineConfig(model="m", tensor_parallel=tp, device=device)
    args = {
        "model_instance_name": instance,
        "model_instance_kind": kind,
        "model_instance_device_id": device_id,
    }
    parameters = {} if groups is None else {"gpu_device_ids": {"string_value": groups}}
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return place(config, args, {"parameters": parameters, "instance_group": instances}, environment)


@pytest.mark.parametrize(
    ("groups", "instance", "options", "expected"),
    [
        ("0;1;2", "m_0_0", {}, "0"),
        ("0;1;2", "m_0_1", {}, "1"),
        ("0;1;2", "named_0", {}, "2"),
        ("0,1;2,3;5,4", "named_0", {"tp": 2}, "5,4"),
        ("1;0;2", "m_0_0", {"visible": "3,GPU-a,GPU-b"}, "GPU-a"),
        ("0;1;2", "m_0_1", {"device": "cuda", "visible": ""}, "1"),
        (None, "m_0_1", {"kind": "GPU", "device_id": "3"}, "3"),
    ],
)
def test_each_instance_sees_its_group_only(groups, instance, options, expected):
    config, environment = placed(groups, instance, **options)
    assert environment == {"CUDA_VISIBLE_DEVICES": expected}
    assert config.device == "cuda"


def test_without_groups_an_instance_sees_all():
    config, environment = placed(None, "m_0_1")
    assert (config.device, environment) == ("auto", {})


@pytest.mark.parametrize(
    ("groups", "options", "complaint"),
    [
        ("", {}, "gpu_device_ids: expected groups of GPU ids .* got ''"),
        ("0;1;", {}, "gpu_device_ids: expected groups"),
        ("0;-1;2", {}, "gpu_device_ids: expected groups"),
        ("0;1", {}, "gpu_device_ids: expected 3 groups, one for each instance, got '0;1'"),
        ("0;1;0", {}, "gpu_device_ids: expected each GPU once, got '0;1;0'"),
        ("0;1;2", {"tp": 2}, r"tensor_parallel: expected 1, for this instance has the GPUs \[0\]"),
        ("0,1;2,3;4,5", {}, r"tensor_parallel: expected 2, for this instance has the GPUs \[0, 1\]"),
        ("0;1;2", {"device": "cpu"}, "device: expected cuda or auto, got cpu"),
        ("2;1;0", {"visible": "6,7"}, "gpu_device_ids: expected ids below 2, for CUDA_VISIBLE_DEVICES is 6,7"),
        ("0", {"instances": [{"name": "m_0", "kind": "KIND_GPU", "count": 1}]}, "expected instances of KIND_MODEL"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        placed(groups, "m_0_0", **options)
