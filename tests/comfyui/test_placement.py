"""Our placement of weights under ComfyUI's memory manager, on a card in main memory."""

from typing import Any

import pytest

KINDS = ("stage_c", "stage_b")
QUERIES = ("is_dynamic", "model_size", "loaded_size")  # asked more or less often from version to version
LOADING = ["current_loaded_device", "model_patches_to(device)", "model_patches_to(dtype)", "partially_load"]
STEPS = ["pre_run", *["prepare_state", "apply_hooks"] * 2, "cleanup"]
ORDERS = {
    "first": ["model_patches_models", *LOADING, *STEPS],
    "second": ["model_patches_models", "is_clone", "detach(False)", *LOADING, *STEPS],
    "a part leaves": ["partially_unload"],
    "all leaves": ["detach(True)"],
}


@pytest.fixture
def found(measured: dict[str, Any]):
    """Gives what one scenario found."""

    def of(scenario: str) -> dict[str, Any]:
        assert "error" not in measured[scenario], measured[scenario]["error"]
        return measured[scenario]

    return of


@pytest.mark.parametrize("run", ORDERS)
def test_order_of_calls(found, run):
    """A version of ComfyUI that asks its patchers something else is noticed here."""
    calls = found("order of calls")
    assert [call for call in calls[run] if call not in QUERIES] == ORDERS[run]
    assert calls["ours differs"] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_takes_no_more_than_there_is_room_for(found, kind):
    rows = found("budgets")[kind]
    least, whole = rows[0]["loaded"], rows[-1]["loaded"]
    assert 0 < least < whole
    for row in rows:
        assert row["loaded"] == row["on the card"] == row["gained"]
        assert row["loaded"] <= max(row["room"], least)
        assert row["loaded"] > row["room"] - 0.2 * whole or row["loaded"] == whole
        assert row["device"] == "cpu:0"


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_run_keeps_the_plan(found, kind):
    for row in found("budgets")[kind]:
        assert row["gained again"] == 0
        assert row["moved again"] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_patches_are_in_the_room(found, kind):
    rows = found("budgets")[f"{kind}, patched"]
    for row in rows:
        assert row["again"] == row["loaded"] <= max(row["room"], rows[0]["loaded"])
        assert (row["factors"] > 0, row["factors copied again"], row["factors of the whole"]) == (True, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gives_back_what_is_asked_or_is_detached(found, kind):
    results = found("budgets")
    always = min(row["left"] for row in results[kind])  # what only leaves with all
    for row in results[kind]:
        assert row["freed"] == row["loaded"] - row["left"]
        assert row["left"] == row["left on the card"]
        assert row["freed"] >= row["asked"] or row["left"] == always
        assert row["after detaching"] == [0, 0, "cpu"]
    assert results[f"{kind}, changed"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_what_the_manager_keeps_for_inference(found, kind):
    results = found("through the manager")
    rows = results[kind]
    assert results[f"{kind}, latents"] == 0
    for row in rows:
        assert row["loaded"] == row["on the card"]
        assert row["left"] >= 0 or row["loaded"] == rows[0]["loaded"]
        assert row["moved again"] == 0
    assert rows[-1]["copied again"] == 0


def test_two_networks_in_turn(found):
    results = found("in turn")
    assert results["wrong"] == 0
    assert results["changed"] == []
    assert results["left"] == 0
    for row in results["rows"]:
        assert row["uncounted"] == 0
        assert row["free"] >= 0
        assert row[row["run"]] > 0.9


def test_other_models(found):
    """Static ones, and where the version knows them dynamic ones: each gets its room."""
    for results in found("with foreign").values():
        assert results["wrong"] == 0
        assert results["changed"] == []
        for row in results["rows"]:
            assert row["uncounted"] == 0
            assert row["free"] >= 0
            assert row[row["run"]] > 0.9


def test_clones_and_models_that_die(found):
    for case, result in found("lives").items():
        if case.endswith("log"):
            assert result == []
        elif "all died" in case:
            assert result["left"] == 0 < result["before"], case
        else:
            assert result == {"uncounted": 0, "of the manager": [True], "freed": True, "as before": True}, (
                case
            )


def test_load_device_set_to_the_processor(found):
    for case, result in found("other device").items():
        # The processor adds in another order where it reads the file.
        assert result.pop("on the processor") <= 1e-5, case
        assert result == {"left": 0, "back": 0, "uncounted": 0, "changed": 0}, case


def test_states_of_the_manager(found):
    states = found("states")
    for name, result in states.items():
        assert result["same"] == [True, True], name
        if name != "highvram":
            assert result["uncounted"] == 0, name
            assert result["moved again"] == 0, name
    assert states["novram"]["loaded"] < states["none"]["loaded"]
    assert states["lowvram"]["loaded"] == states["reserve-vram"]["loaded"] == states["none"]["loaded"]
