"""The configuration: round trips, defaults of the main job, and refusals that name the way out."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcifar.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from fastcifar.errors import ConfigError
from fastcifar.serialization import build


@given(
    st.builds(
        RunConfig,
        data=st.builds(DataConfig, val_split=st.integers(0, 5000), data_dir=st.none() | st.just(Path("some/folder"))),
        optim=st.builds(OptimConfig, lr=st.floats(1e-6, 10), clip_norm=st.none() | st.floats(0.1, 5)),
        engine=st.builds(
            EngineConfig, threads=st.none() | st.integers(1, 64), compile=st.sampled_from(["auto", "on", "off"])
        ),
        model=st.just(ModelConfig("resnet", blocks=(3, 3, 2, 3), channels=(64, 128, 128, 256), pool=4)),
        epochs=st.integers(1, 1000),
    )
)
def test_json_loads_back(config):
    assert RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "the configuration: unknown key 'epoch'; did you mean epochs"),
        ({"epochs": None}, "epochs is None; expected int"),
        ({"epochs": True}, "epochs is True; expected int"),
        ({"epochs": 0}, "the configuration: epochs is 0; expected 1 or more"),
        ({"data": {"data_dir": "a\0b"}}, r"data_dir is 'a\\x00b'; expected text without the character NUL"),
        ({"model": []}, r"model is \[\]; expected an object"),
        ({"model": {"arch": "resnet", "blocks": [1, "2"]}}, "blocks is '2'; expected int"),
        ({"optim": {"lr": 10**400}}, r"lr is 1000[0.]+0; expected float"),
        ({"optim": {"lr": -1}}, "the configuration: optim: lr is -1.0; expected above 0"),
        ({"loss": {"label_smoothing": 2}}, "label_smoothing is 2.0; expected 0 to 1"),
        ({"data": {"dataset": "cifar"}}, "did you mean cifar10"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_damaged_files_are_refused_with_the_place(change, message):
    text = json.dumps(json.loads(RunConfig().to_json()) | change)
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_json(text)


@pytest.mark.parametrize("complete", [False, True])
def test_records_in_a_list_are_whole(complete):
    @dataclass
    class Part:
        name: str

    with pytest.raises(ConfigError, match="the list lacks name"):
        build(tuple[Part, ...], [{}], "the list", complete=complete)


def test_a_file_may_be_partial_or_must_be_complete():
    text = '{"optim": {"lr": 0.5}, "epochs": 3}'
    assert RunConfig.from_json(text) == RunConfig(optim=OptimConfig(lr=0.5), epochs=3)
    with pytest.raises(ConfigError, match="the file lacks model, data, schedule, loss, average, engine, batch_size"):
        build(RunConfig, json.loads(text), "the file", complete=True)
    whole = json.loads(RunConfig().to_json())
    assert build(RunConfig, whole, "the file", complete=True) == RunConfig()
    del whole["model"]["shake_drop"], whole["schedule"]["periodic"], whole["recipe"]
    assert build(RunConfig, whole, "an older version's file", complete=True) == RunConfig()
    del whole["data"]["loader"]
    with pytest.raises(ConfigError, match="the file: data lacks loader, so it is damaged or another version's"):
        build(RunConfig, whole, "the file", complete=True)


@pytest.mark.parametrize("device", ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:01", "cuda:300", "cuda\n", "cuda:٣"])
def test_devices_are_known_by_their_form(device):
    assert EngineConfig(device="cuda:15").device == "cuda:15"
    with pytest.raises(ConfigError, match="is not known; choose auto, cpu, cuda or cuda:INDEX"):
        EngineConfig(device=device)


def test_what_is_not_json_is_refused():
    with pytest.raises(ConfigError, match=r"give the config.json of a run"):
        RunConfig.from_json("{", "some/file")
    with pytest.raises(ConfigError, match="is not JSON"):
        RunConfig.from_json("[" * 100_000)


def test_changes_in_python_are_checked_too():
    with pytest.raises(ConfigError, match="epochs is 0"):
        replace(RunConfig(), epochs=0)
    with pytest.raises(ConfigError, match="epochs is '2'; expected a number"):
        replace(RunConfig(), epochs="2")


def test_an_older_runs_file_loads():
    """The file has null for what was not given, and false where a network has no pre-activation."""
    model = {"arch": "resnet18", "pre_activation": False, "blocks": None, "dropout": 0.1}
    assert RunConfig.from_json(json.dumps({"model": model})).model == ModelConfig("resnet18", dropout=0.1)
