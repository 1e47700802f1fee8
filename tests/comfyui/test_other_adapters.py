"""Adapters of other programs in ComfyUI: the same weights as those programs', in our node and in its own."""

# ComfyUI leaves an OFT's `rescale` out, and has DoRA's norms of the weight before it is changed.
OTHERWISE = ("LyCORIS oft constrained", "dora")


def test_our_node_makes_the_other_programs_weights(measured):
    ours = {name: error for name, error in measured.items() if "loader" not in name}
    assert len(ours) > 40
    assert {name: error for name, error in ours.items() if error > 1e-5} == {}


def test_comfyuis_own_loader_reads_what_we_write(measured):
    theirs = {name: error for name, error in measured.items() if "loader" in name}
    assert len(theirs) > 20
    wrong = {name for name, error in theirs.items() if error > 1e-5}
    assert all(any(words in name for words in OTHERWISE) for name in wrong)
