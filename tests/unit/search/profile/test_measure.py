"""Profiles are measured point by point, and go on from their file."""

from pathlib import Path

import pytest
from msgspec.structs import replace as change
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.profile.data import Profile, ProfileHeader, held_out
from nanoflow_search.profile.load import Load, ProfileError, SoloLoad
from nanoflow_search.profile.measure import take_profile
from support.places import LLAMA_3_8B

from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build

LAYER = build(read_model_config(LLAMA_3_8B)).layer
H200 = DEVICES["H200-sustained"]
HEADER = ProfileHeader(
    model_fingerprint="f",
    precision=BFLOAT16,
    device="d",
    device_sms=132,
    tensor_parallel=1,
    static_w=185.0,
    power_cap_w=700.0,
)


class Cut(Exception):
    pass


def test_a_profile_that_was_cut_goes_on(tmp_path: Path) -> None:
    """Killed after any point, the next run measures the rest and no point twice; the fit holds what was left out."""
    path = tmp_path / "profile.json"
    alone = [SoloLoad(Load(op, n, sms)) for op in ("qkv", "o") for n in (256, 512, 1024) for sms in (64, None)]
    alone += [SoloLoad(Load("attention/decode", 4e5, sms), two_clocks=True) for sms in (36, None)]
    together = [
        (Load("qkv", 512), Load("attention/decode", 4e5)),
        (Load("o", 512, 96), Load("attention/decode", 4e5, 36)),
    ]
    device = SyntheticDevice(LAYER, H200, noise=0.0)
    taken: list[str] = []

    def cut_at_every_third(what: str) -> None:
        if len(taken) % 3 == 2 and what not in taken:
            taken.append(what)
            raise Cut
        taken.append(what)

    profile = None
    while profile is None:
        try:
            profile = take_profile(device, HEADER, alone, together, path, cut_at_every_third)
        except Cut:
            continue
    assert len(profile.points) == len(alone) + 2 == len({str(p) for p in profile.points})
    assert [p.heated for p in profile.points if p.busy < 1] == [True, True]
    assert len(profile.pairs) == 2
    assert all(pair.first_slowdown >= 1 and pair.second_slowdown >= 1 for pair in profile.pairs)
    assert Profile.load(path) == profile
    assert held_out(profile).worst < 0.02
    before = len(taken)
    assert take_profile(device, HEADER, alone, together, path, taken.append) == profile
    assert len(taken) == before
    with pytest.raises(ProfileError, match="was taken of"):
        take_profile(device, change(HEADER, device="another"), alone, together, path)
