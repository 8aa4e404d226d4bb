"""Policies as text: what each name stands for, round trips, and refusals that name the valid form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcifar.augment.policy import Erase, Mix, Policy, parse
from fastcifar.errors import ConfigError


@given(
    st.builds(
        Policy,
        crop=st.integers(0, 64),
        flip=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        rotate=st.sampled_from([0.0, 5.0, 22.5, 180.0]),
        turns=st.booleans(),
        translate=st.sampled_from([0.0, 0.125]),
        shear=st.sampled_from([0.0, 7.0]),
        greyscale=st.sampled_from([0.0, 0.1]),
        intensity=st.sampled_from([0.0, 0.1]),
        fill=st.sampled_from(["black", "mean", "reflect", "clamp"]),
        interpolation=st.sampled_from(["nearest", "bilinear"]),
        automatic=st.sampled_from([None, ("autoaugment", ()), ("randaugment", (3, 14))]),
        erase=st.none()
        | st.builds(Erase, st.integers(1, 64), st.integers(1, 99), st.sampled_from([0.5, 1.0]), st.booleans()),
        mix=st.none() | st.builds(Mix, st.sampled_from(["mixup", "cutmix"]), st.sampled_from([0.2, 1.0])),
    )
)
def test_every_policy_is_its_text(policy):
    assert parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", "none"),
        ("standard", "crop:4,flip:0.5"),
        ("transform1", "crop:4,flip:0.5,rotate:15,translate:0.1"),
        ("transform2", "crop:4,flip:0.5,rotate:30,translate:0.2,shear:10"),
        ("transform2,rotate:20", "crop:4,flip:0.5,rotate:20,translate:0.2,shear:10"),
        ("cutout_4x4", "cutout:4x4"),
        ("standard, randaugment:2, 14, mixup", "crop:4,flip:0.5,randaugment:2,14,mixup:1"),
        ("standard,flip:alternating", "crop:4,flip:alternating"),
        ("flip:alternating,standard", "crop:4,flip:0.5"),
        ("transform1,crop:0", "flip:0.5,rotate:15,translate:0.1"),
    ],
)
def test_names_stand_for_the_reports_settings_and_later_parts_override(text, canonical):
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("standart", "did you mean standard"),
        ("crop:x", r"write it as crop or crop:4 \(pixels\)"),
        ("crop:65", "crop is 65; give a value from 0 to 64"),
        ("flip:2", "flip is 2; give a value from 0 to 1"),
        ("rotate", "write it as rotate:15"),
        ("fill:red", r"fill:black\|mean\|reflect\|clamp"),
        ("cutout:0x4", "1 to 64 squares"),
        ("randaugment:3", "randaugment:2,9"),
        ("randaugment:9,9", "1 to 8 operations"),
        ("randaugment:2,31", "a magnitude of 0 to 30"),
        ("mixup:0", "mixup is 0"),
        ("bilinear:3", "write it as bilinear"),
        ("standard:4", "standard takes no value"),
        ("flip:nan", "flip is nan"),
    ],
)
def test_refusals_name_the_valid_form(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
