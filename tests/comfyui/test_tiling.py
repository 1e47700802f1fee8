"""Tiles in ComfyUI give what the whole gives, or what the host without ComfyUI gives, with the memory of a tile."""


def test_stage_a_and_the_previewer_in_tiles_are_seamless(measured):
    differences = {
        name: value for name, value in measured["differences"].items() if "coded" in name or "viewed" in name
    }
    assert len(differences) == 9
    assert {name: value for name, value in differences.items() if not value <= 1e-5} == {}


def test_stage_b_in_tiles_is_that_of_the_other_host(measured):
    differences = {name: value for name, value in measured["differences"].items() if "sampled" in name}
    assert len(differences) == 4
    assert {name: value for name, value in differences.items() if not value <= 1e-4} == {}


def test_memory_is_planned_and_used_for_a_tile(measured):
    seen = measured["seen"]
    assert seen["planned"] == [[2, 4, 32, 32], [1, 4, 32, 32]]
    assert len(seen["run"]) == 3 * 4  # one step
    assert max(max(shape[2:]) for shape in seen["run"]) == 32


def test_what_its_graphs_hold_a_forward_does_not_need_again(measured):
    assert measured["graph memory"] == {"half": 0, "more than a forward": 0}


def test_the_wrapper_of_another_node_is_called_with_the_whole(measured):
    assert {tuple(shape[2:]) for shape in measured["seen"]["wrapped"]} == {(50, 66)}


def test_interrupt_ends_the_run_before_the_next_tile(measured):
    assert measured["tiles after Interrupt"] == 0


def test_stage_b_takes_a_latent_that_ends_within_a_patch(measured):
    assert len(measured["odd"]) == 5
    assert {name: value for name, value in measured["odd"].items() if not value <= 1e-4} == {}


def test_without_a_previewer_each_way_of_decoding_says_so(measured):
    sentences = measured["without previewer"]
    assert len(sentences) == 4
    assert all("choose a previewer file in its loader" in sentence for sentence in sentences)
