"""Unknown words and other programs' syntax are told of in ComfyUI, in our node and in its own."""


def test_unknown_words_are_told_of_at_whichever_node_encodes(measured):
    told = measured
    assert told["known"] == []
    for node in ("ours", "theirs"):
        (sentence,) = told[node]
        assert "was never taught 'dog', so" in sentence
        assert "circle, square, triangle" in sentence
    assert len(told["unlearned"]) == 1
    assert told["learned"] == []
    assert len(told["untaught"]) == 1
    assert told["taught"] == []
    assert told["without words"] == []


def test_syntax_of_other_programs_is_told_of_at_whichever_node_encodes(measured):
    """Beside the node it stands once: our node's panel shows it, ComfyUI's node has none."""
    ((ours, in_panel),) = measured["syntax, ours"]
    ((theirs, beside_node),) = measured["syntax, theirs"]
    assert ours == theirs
    assert "'<lora:x:0.8>' is read as words" in ours
    assert "'BREAK' is read as a word" in ours
    assert (in_panel, beside_node) == (True, False)
    assert measured["no syntax"] == []
