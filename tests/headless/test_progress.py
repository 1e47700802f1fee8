import io
from pathlib import Path

from cascade_nodes.headless.progress import ConsoleProgress, TransferProgress
from cascade_nodes.headless.results import SavedPicture


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding="utf-8"):
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding=encoding, newline="")

    def isatty(self):
        return True

    def written(self):
        self.flush()
        return self.bytes.getvalue().decode(self.encoding)


def watch(progress):
    progress.node_started(1, 2, "3 (CascadePriorSampler)")
    for step in (1, 2):
        progress.node_step(step, 2, None)
    progress.node_finished(1.25)
    progress.node_reused(2, 2, "4 (SaveImage)")


def test_elsewhere_a_line_for_each_node():
    stream = io.StringIO()
    watch(ConsoleProgress(stream))
    assert stream.getvalue() == (
        f"[1/2] 3 (CascadePriorSampler)  {'#' * 24} 2/2  1.2 s\n[2/2] 4 (SaveImage)  reused\n"
    )


def test_what_a_node_tells_is_a_line_of_its_own():
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    progress.node_started(1, 2, "3 (CascadeLoRAApply)")
    progress.node_notified("x.safetensors teaches [sun].")
    progress.node_finished(1.25)
    assert stream.getvalue() == (
        "[1/2] 3 (CascadeLoRAApply): x.safetensors teaches [sun].\n[1/2] 3 (CascadeLoRAApply)  1.2 s\n"
    )


def test_on_a_terminal_the_line_is_redrawn():
    stream = Terminal()
    watch(ConsoleProgress(stream))
    lines = stream.written().split("\r")
    assert lines[1] == "[1/2] 3 (CascadePriorSampler)\x1b[K"
    assert lines[2].startswith(f"[1/2] 3 (CascadePriorSampler)  {'█' * 12}{'░' * 12} 1/2  0.")
    assert lines[4] == f"[1/2] 3 (CascadePriorSampler)  {'█' * 24} 2/2  1.2 s\x1b[K\n"
    assert lines[5] == "[2/2] 4 (SaveImage)  reused\x1b[K\n"


def test_a_terminal_without_block_characters_gets_plain_ones():
    stream = Terminal("latin-1")
    progress = ConsoleProgress(stream)
    progress.node_step(1, 2, None)
    assert f"{'#' * 12}{'.' * 12} 1/2" in stream.written()


def test_a_saved_picture_has_a_line_of_its_own():
    stream, results = Terminal(), io.StringIO()
    progress = ConsoleProgress(stream, results)
    progress.status("waiting")
    progress.picture_saved(SavedPicture(Path("output/a.png"), "1", 2.04))
    assert stream.written() == "\rwaiting\x1b[K\n"
    assert results.getvalue() == "output/a.png  (2.0 s)\n"


def test_an_open_line_is_ended_once():
    stream = Terminal()
    progress = ConsoleProgress(stream)
    progress.status("waiting")
    progress.close()
    progress.close()
    assert stream.written() == "\rwaiting\x1b[K\n"


def transfer(progress):
    progress.node_started(1, 1, "stage_a")
    for arrived in (25_000_000, 50_000_000, 100_000_000):
        progress.bytes_arrived(arrived, 100_000_000)
    progress.file_arrived(Path("models/vae/stage_a.safetensors"), 2.5)


def test_a_file_that_arrives_has_a_bar_in_bytes():
    stream, results = Terminal(), io.StringIO()
    transfer(TransferProgress(stream, results))
    lines = stream.written().split("\r")
    # The bytes of an earlier transfer are in the bar, but not in the speed.
    assert lines[2] == f"[1/1] stage_a  {'█' * 6}{'░' * 18} 25/100 MB  0.0 MB/s\x1b[K"
    assert lines[3].startswith(f"[1/1] stage_a  {'█' * 12}{'░' * 12} 50/100 MB  ")
    assert lines[5] == f"[1/1] stage_a  {'█' * 24} 100/100 MB  2.5 s\x1b[K\n"
    assert results.getvalue() == "models/vae/stage_a.safetensors\n"


def test_elsewhere_a_line_for_each_file():
    stream = io.StringIO()
    progress = TransferProgress(stream, io.StringIO())
    transfer(progress)
    progress.node_started(2, 2, "previewer")
    progress.file_kept(Path("models/vae/previewer.safetensors"))
    assert stream.getvalue() == (
        f"[1/1] stage_a  {'#' * 24} 100/100 MB  2.5 s\n[2/2] previewer  already there, whole\n"
    )
