from __future__ import annotations

import pytest

from stunet.errors import SettingsError
from stunet.settings import SETTINGS, check_settings, parse_settings


def test_values_are_read_as_json_or_bare_words() -> None:
    got = parse_settings(
        ["num_epochs=3", "initial_lr=1e-3", "patch_size=[8, 16]", "batch_dice=false", "activation_checkpointing=all"]
    )
    assert got == {
        "num_epochs": 3,
        "initial_lr": 0.001,
        "patch_size": [8, 16],
        "batch_dice": False,
        "activation_checkpointing": "all",
    }


def test_numbers_with_commas_are_a_list() -> None:
    assert parse_settings(["patch_size=64,64,32"]) == {"patch_size": [64, 64, 32]}


def test_unknown_name_lists_the_known_and_guesses() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(["learning_rate=0.1"])
    assert all(name in str(caught.value) for name in SETTINGS)
    with pytest.raises(SettingsError, match="did you mean num_epochs"):
        parse_settings(["num_epoch=3"])


@pytest.mark.parametrize(
    "assignment",
    [
        "num_epochs=0", "num_epochs=2.5", "num_epochs=true", "num_epochs=many", "initial_lr=0", "initial_lr=-1",
        "initial_lr=NaN", "initial_lr=Infinity", "weight_decay=-1e-5", "oversample_foreground_percent=33",
        "batch_size=0", "patch_size=[64]", "patch_size=64", "patch_size=[0,8,8]", "activation_checkpointing=some",
        "probabilistic_oversampling=1", "save_every=",
    ],
)  # fmt: skip
def test_impossible_values(assignment: str) -> None:
    with pytest.raises(SettingsError, match=f"{assignment.split('=')[0]}=.* must be "):
        parse_settings([assignment])


@pytest.mark.parametrize("assignment", ["num_epochs", "=3", "num_epochs 3"])
def test_not_an_assignment(assignment: str) -> None:
    with pytest.raises(SettingsError, match="name=value"):
        parse_settings([assignment])


def test_the_source_is_named() -> None:
    with pytest.raises(SettingsError, match="configuration 2d: unknown setting x"):
        check_settings({"x": 1}, source="configuration 2d")
