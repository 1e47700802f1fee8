"""Optimisers by name and by class, each going on to the bit; schedules of the learning rate."""

import math

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.cascade_core.training.checks import check_optimiser
from cascade_nodes.cascade_core.training.optimisers import SOURCES, learning_rate
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.settings import TrainSettings, read_settings
from cascade_nodes.cascade_core.training.state import STATE, read_state
from cascade_nodes.nodes.training import CascadeTrainLoRA, CascadeTrainTokens, node_settings
from cascade_nodes.tests.core.training_runs import loop_of, run_until_killed, same, settings_of, write_world

OPTIMISERS = {
    **{name: {"optimizer": name} for name in SOURCES},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "torch.optim.NAdam": {
        "optimizer": "torch.optim.NAdam",
        "optimizer_arguments": {"momentum_decay": 0.01, "decoupled_weight_decay": True},
    },
    "prodigyopt.Prodigy": {
        "optimizer": "prodigyopt.Prodigy",
        "learning_rate": 1.0,
        "optimizer_arguments": {"d0": 1e-4, "use_bias_correction": True},
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_trains_and_goes_on_to_the_bit(world, tmp_path, name):
    """It goes on from the state's file; a sample on the way must leave no trace."""
    check_optimiser(settings_of(world, "lora", tmp_path, train=OPTIMISERS[name]).train)
    output = {"sample_every": 2, "sample_steps": 1, "prompts": ["a red star"]}
    whole = loop_of(settings_of(world, "lora", tmp_path / "whole", train=OPTIMISERS[name]))
    before = whole.state["stage_c.vector"].clone()
    assert whole.run().finished
    killed = settings_of(world, "lora", tmp_path / "killed", train=OPTIMISERS[name], output=output)
    run_until_killed(killed, 5)
    resumed = loop_of(killed)
    assert resumed.resume()
    assert resumed.step == 3
    assert resumed.run().finished
    assert not torch.equal(before, whole.state["stage_c.vector"])
    assert same(dict(whole.state), dict(resumed.state))
    states = [read_state(loop.folder / STATE)[0] for loop in (whole, resumed)]
    assert all(same(states[0][part], states[1][part]) for part in states[0])


def test_a_state_of_before_groups_were_kept_goes_on(world, tmp_path):
    """The numbers of AdamW's groups are those of the settings, which are the same."""
    whole = loop_of(settings_of(world, "lora", tmp_path / "whole"))
    whole.run()
    settings = settings_of(world, "lora", tmp_path)
    run_until_killed(settings, 5)
    tensors, metadata = read_safetensors(tmp_path / STATE)
    former = {name: v.clone() for name, v in tensors.items() if not name.startswith("optimiser.group.")}
    assert former.keys() < tensors.keys()
    write_safetensors(tmp_path / STATE, former, metadata)
    resumed = loop_of(settings)
    assert resumed.resume()
    resumed.run()
    assert same(dict(whole.state), dict(resumed.state))


@pytest.mark.parametrize("name", ["group.1.weight_decay", "group.0.lr", "group.0.params", "group.x.k"])
def test_numbers_of_other_groups_are_refused(world, tmp_path, name):
    loop = loop_of(settings_of(world, "lora", tmp_path, train={"steps": 1}))
    loop.run()
    tensors, metadata = read_safetensors(tmp_path / STATE)
    tensors = {key: value.clone() for key, value in tensors.items()}
    write_safetensors(tmp_path / STATE, {**tensors, f"optimiser.{name}": torch.tensor(1.0)}, metadata)
    with pytest.raises(CascadeError, match="which is of another optimiser or parameter"):
        loop.resume()


def test_schedule_free_gives_its_average_and_no_other(world, tmp_path):
    loop = loop_of(settings_of(world, "lora", tmp_path, train={"optimizer": "schedulefree"}))
    loop.run()
    assert loop.average is None
    weights = loop.task.trained.state_dict()["stage_c.vector"].clone()
    average = loop.state["stage_c.vector"]
    assert torch.equal(weights, loop.task.trained.state_dict()["stage_c.vector"])
    optimiser = loop.optimiser
    optimiser.eval()  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(average, loop.task.trained.state_dict()["stage_c.vector"])
    assert not torch.equal(average, weights)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer": "os.system"}, "'system' of os is not an optimiser of torch; give module.Class"),
        ({"optimizer": "gone.Class"}, "train.optimizer gone.Class is gone's, which is not installed;"),
        (
            {"optimizer": "torch.optim.LBFGS"},
            "torch.optim.LBFGS with train.optimizer_arguments {} cannot be used",
        ),
        (
            {"optimizer": "torch.optim.SGD", "optimizer_arguments": {"momentun": 0.9}},
            "cannot be used (TypeError: ",
        ),
        ({"optimizer": "adamw", "optimizer_arguments": {"epz": 1}}, "cannot be used (TypeError: "),
        (
            {"optimizer": f"{__name__}.Forgetful"},
            "keeps something that a checkpoint does not hold, so a run with it would not go on as it was",
        ),
        (
            {"optimizer": f"{__name__}.Texts"},
            "The optimiser keeps 'mood' as a str, which a checkpoint does not hold;",
        ),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_before_anything_is_loaded(values, sentence):
    with pytest.raises(CascadeError) as error:
        check_optimiser(TrainSettings(**values))
    assert sentence in str(error.value)


class Forgetful(torch.optim.SGD):
    """Keeps how often it stepped to itself."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= self.count * group["lr"] * parameter.grad


class Texts(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["mood"] = "good"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer": "adamv"}, "train.optimizer is 'adamv'; did you mean adamw?"),
        ({"optimizer": "a b.c"}, "train.optimizer is 'a b.c'; known: adamw, adamw8bit"),
        ({"optimizer": "prodigy"}, "train.learning_rate is 0.0001, but prodigy finds the rate itself"),
        ({"warmup": 1.5}, "train.warmup is 1.5; whole steps, or a share of the run below 1, are expected."),
        ({"restarts": 1, "schedule": "constant"}, "train.restarts is 1, but constant has none;"),
    ],
)
def test_settings_that_say_nothing_sensible(values, sentence):
    with pytest.raises(CascadeError) as error:
        TrainSettings(**values)
    assert sentence in str(error.value)


def test_prodigy_has_one_rate(world, tmp_path):
    values = {"optimizer": "prodigy", "learning_rate": 1.0}
    with pytest.raises(CascadeError, match=r"prodigy has one rate .* \(0.5, 1 of it\)"):
        settings_of(world, "lora", tmp_path, train=values, lora={"text_encoder": True})
    settings_of(world, "lora", tmp_path, train=values, lora={"text_encoder": True, "text_learning_rate": 1.0})


IMPORTED = """
import pathlib, torch
pathlib.Path(__file__).with_suffix(".imported").touch()
class Own(torch.optim.SGD):
    pass
"""


@pytest.mark.parametrize("node", [CascadeTrainLoRA, CascadeTrainTokens])
def test_a_client_names_no_class(world, tmp_path, monkeypatch, node):
    """A client of a server has the nodes' inputs alone; the same file on the command line is the user's own."""
    (tmp_path / f"own_{node.TASK}.py").write_text(IMPORTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(world)
    monkeypatch.setenv("CASCADE_MODELS", str(world / "models"))
    for text, sentence in (
        (f"train: {{optimizer: own_{node.TASK}.Own}}", "only `cascade train` imports a class"),
        ("train: {optimizer: prodigyopt.Prodigy}", "only `cascade train` imports a class"),
        (
            "train: {optimizer_arguments: {foreach: true}}",
            "train.optimizer_arguments are for `cascade train`",
        ),
    ):
        answer = node.validate_inputs(name="x", pictures=str(world / "pictures"), settings=text)
        assert sentence in str(answer)
        with pytest.raises(CascadeError, match="`cascade train`"):
            node_settings(node.TASK, {"pictures": str(world / "pictures"), "settings": text}, node.SECTIONS)
    for name in ("adamw8bit", "prodigy, learning_rate: 1.0", "schedulefree"):
        text = f"train: {{optimizer: {name}}}"
        inputs = {"pictures": str(world / "pictures"), "settings": text}
        assert node_settings(node.TASK, inputs, node.SECTIONS).train.optimizer == name.partition(",")[0]
    assert not (tmp_path / f"own_{node.TASK}.imported").exists()

    path = tmp_path / "settings.yaml"
    path.write_text(
        f"data: {{folder: .}}\noutput: {{file: a.safetensors}}\ntrain: {{optimizer: own_{node.TASK}.Own, "
        "optimizer_arguments: {momentum: 0.9}}"
    )
    check_optimiser(read_settings(path, "lora").train)
    assert (tmp_path / f"own_{node.TASK}.imported").exists()


def rates(*steps, **values):
    settings = TrainSettings(steps=100, learning_rate=1.0, **{"warmup": 0, **values})
    return pytest.approx([learning_rate(step, settings) for step in steps])


def test_schedules():
    assert rates(0, 50, 75, schedule="linear") == [1, 0.5, 0.25]
    assert rates(0, 50, 100, schedule="linear", final_learning_rate=0.2) == [1, 0.6, 0.2]
    assert rates(0, 25, 50, 75, 100, restarts=1) == [1, 0.5, 1, 0.5, 0]
    assert rates(0, 25, 50, 75, schedule="linear", restarts=1) == [1, 0.5, 1, 0.5]
    assert rates(0, 79, 90, 100, schedule="stable_decay") == [1, 1, 0.5, 0]
    assert rates(0, 49, 75, 100, schedule="stable_decay", decay=50, final_learning_rate=0.5) == [
        1,
        1,
        0.75,
        0.5,
    ]
    assert rates(0, 9, 19, 20, 60, warmup=0.2) == [0.05, 0.5, 1, 1, 0.5]
    assert rates(0, 20, 99, optimizer="schedulefree", warmup=50) == [1, 1, 1]


def test_the_rate_without_new_settings_is_as_it_was():
    """The former function, bit for bit."""

    def former(step, s):
        if step < s.warmup:
            return s.learning_rate * (step + 1) / s.warmup
        progress = (step - s.warmup) / max(s.steps - s.warmup, 1)
        floor = s.final_learning_rate
        return s.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    for settings in (
        TrainSettings(steps=777, learning_rate=3e-4),
        TrainSettings(steps=30, final_learning_rate=0.1),
    ):
        steps = range(settings.steps + 1)
        assert [learning_rate(i, settings) for i in steps] == [former(i, settings) for i in steps]


def test_a_run_by_epochs(world, tmp_path):
    """10 pictures in two buckets of 6 and 4 are 4 batches of at most 3."""
    values = {"epochs": 1.5, "accumulate": 2, "batch_size": 3, "warmup": 0}
    outcome = train(settings_of(world, "lora", tmp_path, train=values))
    assert outcome.step == 3
    told = []
    again = train(settings_of(world, "lora", tmp_path, train={**values, "epochs": 2.0}), told.append)
    assert again.step == 4
    assert told[0].startswith(
        "train.steps was 3 and is 4 now; from here on the learning rate follows the cosine"
    )
