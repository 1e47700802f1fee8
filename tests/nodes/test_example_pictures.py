"""The example pictures come into the input folder by themselves, and never over a file that is there."""

import logging

from cascade_nodes.nodes.hosts.example_pictures import PICTURES, place_pictures

NAMES = sorted(path.name for path in PICTURES.glob("*.png"))


def test_all_are_copied_and_the_copies_stay(tmp_path):
    folder = tmp_path / "input"
    place_pictures(folder)
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    place_pictures(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    for name in NAMES:
        assert (folder / name).read_bytes() == (PICTURES / name).read_bytes()


def test_nothing_is_written_over(tmp_path):
    first, second, *others = NAMES
    (tmp_path / first).write_bytes(b"my own")
    (tmp_path / second).symlink_to("nowhere")
    place_pictures(tmp_path)
    assert (tmp_path / first).read_bytes() == b"my own"
    assert (tmp_path / second).is_symlink()
    assert not (tmp_path / "nowhere").exists()
    assert all((tmp_path / name).is_file() for name in others)


def test_a_folder_that_takes_no_file_is_told_of_and_stops_nothing(tmp_path, caplog):
    folder = tmp_path / "input"
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        place_pictures(folder)
    (line,) = caplog.messages
    assert "example workflows could not be copied" in line
    assert str(folder) in line
