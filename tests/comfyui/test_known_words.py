"""Words that a text encoder was never taught are told of in ComfyUI, in our node and in its own."""


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
