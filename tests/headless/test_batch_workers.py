"""`cascade batch` on ComfyUI servers and on Ray: what is lost with a worker, a server or a machine is made again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from cascade_nodes.headless.batch import on_ray
from cascade_nodes.headless.batch.command import choose_card
from cascade_nodes.headless.batch.driver import Driver
from cascade_nodes.headless.batch.journal import Journal
from cascade_nodes.headless.batch.progress import BatchProgress
from cascade_nodes.headless.batch.work import Job, LocalCrew, Outcome, Picture, Waiting
from cascade_nodes.headless.cli import main
from cascade_nodes.headless.signals import REPEATED
from cascade_nodes.tests.headless.comfyui_server import ComfyUI
from cascade_nodes.tests.headless.command import errors_of, start
from cascade_nodes.tests.headless.test_batch import batch, colours, folder, lines, table

__all__ = ["folder"]  # the fixture

ROWS = [
    {"name": f"r{number:02}", "1.color": number, "1.width": 1000, "1.height": 1000} for number in range(40)
]
NAMES = [row["name"] for row in ROWS]


@pytest.fixture
def servers(folder) -> Iterator[list[ComfyUI]]:
    started = [ComfyUI(folder / f"server{number}") for number in (1, 2)]
    yield started
    for server in started:
        server.shutdown()
        server.server_close()


def test_servers_share_the_rows(folder, servers):
    table(*({"name": f"r{number}", "1.color": number, "1.batch_size": 2} for number in range(5)))
    urls = [server.url for server in servers]
    assert batch("--server", *urls) == 0
    assert {line["worker"] for line in lines()} == set(urls)
    assert sorted(line["name"] for line in lines()) == [f"r{number}" for number in range(5)]
    assert colours() == {f"r{number}_{one}.png": (0, 0, number) for number in range(5) for one in (1, 2)}
    assert batch("--server", *urls) == 0
    assert len(lines()) == 5


def test_a_row_that_a_server_refuses(folder, servers, capsys):
    table({"name": "a"}, {"name": "b", "1.width": 0}, {"name": "c", "1.width": "wide"})
    assert batch("--server", servers[0].url) == 1
    assert list(colours()) == ["a.png"]
    said = capsys.readouterr().err
    assert "error: b: Node 1 (EmptyImage): input 'width' is 0, but it must be between 1 and 16384." in said
    assert (
        "error: c: Node 1 (EmptyImage): input 'width' is 'wide', but it takes a whole number (INT)." in said
    )


def test_the_row_of_a_lost_server_goes_to_another(folder, servers, capsys):
    """The server has accepted the row, but never begins it."""
    lost, other = servers
    lost.patience = 10**9
    other.patience = 1
    table(*({"name": f"r{number}", "1.color": number} for number in range(5)))
    execute = other._execute

    def execute_and_lose(validation):
        if lost.pending:
            lost.pending.clear()  # as one that was restarted
        return execute(validation)

    other._execute = execute_and_lose
    assert batch("--server", lost.url, other.url) == 0
    assert {line["worker"] for line in lines()} == {other.url}
    assert sorted(colours()) == [f"r{number}.png" for number in range(5)]
    assert f"{lost.url} lost the graph: it was taken off the queue, or it restarted. It is done again." in (
        capsys.readouterr().err
    )


def test_ctrl_c_twice_takes_the_row_off_the_server(folder, servers):
    (server, _) = servers
    server.patience = 10**9
    table({"name": "a"}, {"name": "b"})
    with batch_process(folder, "--server", server.url) as process:
        wait_for(lambda: server.pending, process)
        process.send_signal(signal.SIGINT)
        said = ""
        while "a second signal drops" not in said:
            said += errors_of(process).readline()
        time.sleep(REPEATED + 0.1)  # sooner it would be the same one
        process.send_signal(signal.SIGINT)
        said += errors_of(process).read()
    assert process.returncode == 130
    assert "Stopping after a; a second signal drops what is under way." in said
    assert "Dropped a; the same command makes what is missing." in said
    assert [path for path, _ in server.posts] == ["/prompt", "/queue", "/interrupt"]
    assert colours() == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--server", "127.0.0.1:9", "--workers", "2"],
            "--server runs on ComfyUIs, and --workers and --address on Ray",
        ),
        (
            ["--server", "127.0.0.1:9", "--memory", "4GB"],
            "--memory limits this program alone; start the ComfyUIs",
        ),
        (["--server", "127.0.0.1:9"], "No ComfyUI answers at http://127.0.0.1:9"),
        (
            ["--address", "127.0.0.1:9"],
            "Nothing answers at --address '127.0.0.1:9' (Connection refused); give the address that `ray start --head`",
        ),
        (["--gpus-per-worker", "1"], "--gpus-per-worker needs --workers; give the number of workers."),
    ],
)
def test_options_that_do_not_go_together(arguments, sentence, folder, capsys):
    table({"name": "a"})
    assert batch(*arguments) == 1
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


class Vanishing(LocalCrew):
    """Workers that are lost with one row, every time."""

    def __init__(self, row: str):
        self.row = row
        self.job = None

    def ended(self, seconds: float) -> list[Outcome]:
        job, self.job = self.job, None
        if job is None:
            return []
        if job.name == self.row:
            return [Outcome(job.name, error="its worker is gone.", lost=True)]
        return [Outcome(job.name, (Picture("2", ".png", job.name.encode()),))]


def test_a_row_that_ends_workers_is_given_up(folder):
    rows = [Waiting(name, partial(Job, name, {}, ("2",), "")) for name in "abc"]
    journal = Journal(Path("made"))
    summary = Driver(rows, Vanishing("b"), journal, BatchProgress()).run([])
    journal.close()
    assert summary.made == ["a", "c"]
    assert summary.failed == [("b", "3 workers were lost with it; the last: its worker is gone.")]
    assert [line.get("error") for line in lines()] == [None, summary.failed[0][1], None]


def test_each_process_of_a_launcher_has_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    for visible, expected in ((None, "1"), ("4,7", "7"), ("GPU-a,GPU-b", "GPU-b")):
        environment = launched | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
        choose_card(environment)
        assert environment["CUDA_VISIBLE_DEVICES"] == expected
    alone = {"LOCAL_RANK": "1"}
    choose_card(alone)
    assert alone == {"LOCAL_RANK": "1"}


@pytest.mark.parametrize("package", ["ray", "pyarrow"])
def test_an_extra_that_is_not_installed(package, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    table({"name": "a"})
    Path("rows.parquet").write_bytes(b"")
    arguments = {"ray": ["rows.jsonl", "--workers", "2"], "pyarrow": ["rows.parquet"]}[package]
    assert main(["batch", "graph.json", *arguments, "--output", "made"]) == 1
    extra = {"ray": "cluster", "pyarrow": "parquet"}[package]
    assert f"which is not installed: pip install 'cascade-nodes[{extra}]'." in capsys.readouterr().err


def test_ray_reads_no_address_and_counts_nobody():
    alone, joined = {"RAY_USAGE_STATS_ENABLED": "1"}, {}
    on_ray.prepare(alone, alone=True)
    on_ray.prepare(joined, alone=False)
    assert len(alone.pop("RAY_AUTH_TOKEN")) == 64
    assert alone == {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token",
    }  # fmt: skip
    assert joined == {"RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.parametrize(
    "arguments",
    [["--workers", "0"], ["--workers", "two"], ["--gpus-per-worker", "1.5"], ["--gpus-per-worker", "-1"]],
)
def test_numbers_that_there_are_not(arguments, folder, capsys):
    with pytest.raises(SystemExit):
        batch(*arguments)
    assert "is not a number of " in capsys.readouterr().err


def test_the_row_of_a_killed_worker_is_made_again(folder):
    """All sockets that listen meanwhile are on loopback addresses."""
    table(*ROWS)
    with batch_process(folder, "--workers", "2") as process:
        first = next(wait_for(workers, process))
        os.kill(first, signal.SIGSTOP)  # with a row, which it cannot finish
        addresses = {address for one in family(process) for address in listening(one)}
        assert addresses == {"127.0.0.1"}
        wait_for(lambda: len(made()) == len(ROWS) - 1, process)
        os.kill(first, signal.SIGKILL)
        said = errors_of(process).read()
        assert process.wait() == 0, said
    check_all_made(said)
    assert len(set(workers())) > 1


@pytest.mark.nightly
def test_the_rows_of_a_lost_machine_are_made_again(folder, monkeypatch):
    """There are two machines, each with a worker."""
    environment = dict(os.environ)
    on_ray.prepare(environment, alone=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    table(*ROWS)
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        lost = cluster.add_node(num_cpus=1)
        (raylet,) = lost.all_processes["raylet"]

        def is_lost(worker: int) -> bool:
            return psutil.Process(worker).ppid() == raylet.process.pid

        options = ["--workers", "2", "--address", cluster.address]
        with batch_process(folder, *options) as process:
            first = next(wait_for(workers, process))
            os.kill(first, signal.SIGSTOP)
            if not is_lost(first):  # then it waits for the other one
                second = next(wait_for(lambda: (worker for worker in workers() if worker != first), process))
                os.kill(second, signal.SIGSTOP)
                os.kill(first, signal.SIGCONT)
                assert is_lost(second)
            wait_for(lambda: len(made()) == len(ROWS) - 1, process)
            cluster.remove_node(lost, allow_graceful=False)
            said = errors_of(process).read()
            assert process.wait() == 0, said
        check_all_made(said)
    finally:
        cluster.shutdown()


def check_all_made(said: str) -> None:
    """Asserts that all rows were made once, and no other picture."""
    assert sorted(made()) == NAMES
    assert colours() == {f"{row['name']}.png": (0, 0, row["1.color"]) for row in ROWS}
    assert "It is done again." in said
    assert said.splitlines()[-1] == f"{len(ROWS)} of {len(ROWS)} rows made."


def made() -> list[str]:
    return [line["name"] for line in whole_lines()]


def workers() -> Iterator[int]:
    """The processes that made rows, in the order of the rows."""
    return iter([int(line["worker"].rpartition(":")[2]) for line in whole_lines()])


def whole_lines() -> list[dict]:
    path = Path("made/batch.jsonl")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for(condition: Callable, process: subprocess.Popen[str]):
    """What a condition gives once it holds; of an iterator, that it has something."""
    while True:
        assert process.poll() is None, errors_of(process).read()
        value = condition()
        if isinstance(value, Iterator):
            value = list(value)
            if value:
                return iter(value)
        elif value:
            return value
        time.sleep(0.01)


@contextmanager
def batch_process(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process; what of it and its workers still runs at the end is killed."""
    process = start("batch", "graph.json", "rows.jsonl", "--output", "made", *options, cwd=folder)
    with process:
        try:
            yield process
        finally:
            for one in family(process) if process.poll() is None else ():
                with suppress(psutil.NoSuchProcess):
                    one.kill()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def listening(process: psutil.Process) -> list[str]:
    connections = process.net_connections(kind="tcp")
    return [one.laddr.ip.removeprefix("::ffff:") for one in connections if one.status == psutil.CONN_LISTEN]
