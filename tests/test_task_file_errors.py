"""A task file with a mistake: one clear error that names the fix, and nothing left behind."""

import json
from pathlib import Path

import pytest
from helpers import Forked, command_line, torch_as_it_was

from egtrain.build import build_run
from egtrain.config.files import load_config
from egtrain.errors import DivergedError, EgtrainError, UsageError
from egtrain.run import Run
from egtrain.task_file import TaskFileError, load_task_file
from egtrain.tasks import LOSS, metrics_text
from egtrain.train import train
from egtrain.workers import Ranks

GOOD = """
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset


def model(width: int = 4):
    return nn.Linear(3, 2)


def dataset(split):
    samples = TensorDataset(torch.ones(40, 3), torch.ones(40).long())
    return None if split == "validation" else samples


def loss(model, batch):
    inputs, labels = batch
    outputs = model(inputs)
    return nn.functional.cross_entropy(outputs, labels), {"accuracy": 0.5}


plain_loss = loss


class Samples(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self.get(index)
"""
"""A task file; what stands after it replaces parts."""
STREAMED = (
    GOOD
    + """
def dataset(split):
    return None if split == "validation" else Samples()
"""
)
SETTINGS = [
    "workers=2",
    "worker_batch_size=4",
    "steps=4",
    "schedule.warmup_epochs=0",
    "threads=1",
    "device=cpu",
    "precision=fp32",
]


def write(folder: Path, text: str | bytes, name: str = "own.py") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def run_of(path: Path, *further: str, preset: str = "eg") -> Run:
    with torch_as_it_was():
        return build_run(load_config(preset, [*SETTINGS, *further], load_task_file(path)), Ranks())


def error_of(path: Path, *further: str) -> EgtrainError:
    with pytest.raises(EgtrainError) as caught:
        run_of(path, *further)
    return caught.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "own.py: model() is missing: add it"),
        ("def model(:\n", "own.py:1: this is no Python (invalid syntax)"),
        (b"\x00\x01", "own.py: this is no Python"),
        (b"a = '\xff'\n", "own.py:1: this is no Python"),
        (f"import not_there_at_all\n{GOOD}", "it needs the package 'not_there_at_all', which is"),
        (f"{GOOD}\ndel loss\n", "own.py: loss(model, batch) is missing"),
        (f"{GOOD}\nloss = 3\n", "own.py: loss(model, batch) is no function: make it one"),
        (GOOD.replace("width: int = 4", "width"), "give every further parameter a default"),
        (GOOD.replace("width: int = 4", "width=torch.ones(2)"), "must be true or false, a number"),
        (GOOD.replace("width: int = 4", "width: float = 'a'"), "'width' of model() is a setting"),
        (GOOD.replace("width: int = 4", "width: float = float('inf')"), "'width' of model()"),
        (GOOD.replace("width: int = 4", "sha256: str = ''"), "a name that egtrain uses: rename it"),
        (GOOD.replace("width: int = 4", "_width: int = 4"), "a name that egtrain uses: rename it"),
        (GOOD.replace("width: int = 4", "width=None"), "whose type None does not say"),
        (GOOD.replace("width: int = 4", "width: int = 4, /"), "remove the '/' after it"),
        (GOOD.replace("(split)", "(split, width: int = 5)"), "one setting: give it the same type"),
    ],
)
def test_a_wrong_file_is_refused_with_the_way_out(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    error = error_of(write(tmp_path, text))
    assert isinstance(error, UsageError)
    assert message in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\ndef model(): return None\n", "must return a torch.nn.Module, not None"),
        (f"{GOOD}\ndef model(): return nn.LazyLinear(2)\n", "has lazy layers"),
        (f"{GOOD}\ndef model(): return nn.Linear(3, 2).requires_grad_(False)\n", "no parameter"),
        (
            f"{GOOD}\ndef model():\n"
            "    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double())\n",
            "have the types float32, float64",
        ),
        (f"{GOOD}\ndef dataset(split): return None\n", "dataset('train') returned None"),
        (f"{GOOD}\ndef dataset(split): return []\n", "dataset('train') is empty"),
        (f"{GOOD}\ndef dataset(split): return 3\n", "whose samples have no index"),
        (
            f"{GOOD}\nclass I(torch.utils.data.IterableDataset):\n    def __iter__(self): yield 1\n"
            "def dataset(split): return I()\n",
            "whose samples have no index",
        ),
        (
            f"{GOOD}\nclass I(Dataset):\n    def __getitem__(self, i): return 1\n"
            "def dataset(split): return I()\n",
            "has no length: define __len__",
        ),
        (f"{STREAMED}\nSamples.get = lambda self, i: (torch.ones(3 + i % 2), 1)\n", "one form, or"),
        (f"{STREAMED}\nSamples.get = lambda self, i: (torch.ones(3), None)\n", "define collate("),
        (
            f"{STREAMED}\nG = torch.Generator()\n"
            "Samples.get = lambda self, i: (torch.randn(3, generator=G), 1)\n",
            "not with a generator that the data set keeps",
        ),
        (
            f"{STREAMED}\nimport itertools\nN = itertools.count(1)\n"
            "Samples.get = lambda self, i: [torch.ones(1)] * min(next(N), 3)\n"
            "def collate(samples): return [part for sample in samples for part in sample]\n",
            "returns another sample when it is asked",
        ),
        (f"{GOOD}\ndef loss(model, batch): return 1.0, {{}}\n", "it is a value of type float"),
        (f"{GOOD}\ndef loss(model, batch): return model(batch[0]).sum(1), {{}}\n", "shape [4]"),
        (f"{GOOD}\ndef loss(model, batch): return model(batch[0]).mean()\n", "a dict of metrics"),
        (
            f"{GOOD}\ndef loss(model, batch): return model(batch[0]).mean().detach(), {{}}\n",
            "depends on no weight of the model",
        ),
        (f"{GOOD}\ndef loss(m, b): return plain_loss(m, b)[0], {{'step': 1}}\n", "rename it"),
        (
            f"{GOOD}\ndef loss(m, b): return plain_loss(m, b)[0], {{'accuracy': torch.ones(2)}}\n",
            "must be one number under a name",
        ),
        (
            f"{GOOD}\ndef loss(m, b): return plain_loss(m, b)[0], {{'wer': 1.0}}\n",
            "say whether more 'wer' is better",
        ),
        (f"{GOOD}\nmetric = 'acc'\n", "metric = 'acc' is none of those"),
        (f"{GOOD}\nmetric = 'loss'\nhigher_is_better = True\n", "which is made small"),
        (f"{GOOD}\nNET = nn.Linear(3, 2)\ndef model(): return NET\n", "a new model each time"),
        (f"{GOOD}\ndef dataset(split): return Samples\n", "returned the class Samples itself"),
        (
            f"{GOOD}\ndef loss(m, b):\n    b[0].mul_(2)\n    return plain_loss(m, b)\n",
            "changes its batch, which is used again",
        ),
        (
            f"{GOOD}\ndef loss(m, b):\n    result = plain_loss(m, b)\n"
            "    result[0].backward(retain_graph=True)\n    return result\n",
            "calls backward() itself",
        ),
        (
            f"{GOOD}\ndef loss(m, b):\n    with torch.no_grad(): m.bias.add_(1)\n"
            "    return plain_loss(m, b)\n",
            "changes the parameter 'bias' of the model",
        ),
        (
            f"{GOOD}\ndef loss(m, b):\n    result = plain_loss(m, b)\n"
            "    torch.set_grad_enabled(False)\n    return result\n",
            "switches gradients on or off",
        ),
        (
            f"{GOOD}\ndef loss(m, b):\n    more = {{}} if m.training else {{'more': 1.0}}\n"
            "    return plain_loss(m, b)[0], {'accuracy': 1.0, **more}\n",
            "return the same ones every time, in training and in evaluation",
        ),
        (
            f"{GOOD}\nimport os\nplain_data = dataset\ndef dataset(split):\n"
            "    os.chdir('/')\n    return plain_data(split)\n",
            "changes the working directory",
        ),
        (
            f"{GOOD}\ndef loss(m, b):\n    result = plain_loss(m, b)\n"
            "    m.eval()\n    return result\n",
            "leaves the model in another mode",
        ),
    ],
)
def test_a_wrong_return_is_refused_before_anything_is_trained(
    text: str, message: str, tmp_path: Path
) -> None:
    error = error_of(write(tmp_path, text))
    assert isinstance(error, UsageError)
    assert message in str(error)


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("\nraise ValueError('here')\n", "importing it"),
        ("\ndef model(): raise ValueError('here')\n", "model()"),
        ("\ndef dataset(split): raise ValueError('here')\n", "dataset(split)"),
        ("\ndef loss(model, batch): raise ValueError('here')\n", "loss(model, batch)"),
        (
            "\ndef loss(m, b):\n    if not m.training: raise ValueError('here')\n"
            "    return plain_loss(m, b)\n",
            "loss(model, batch)",
        ),
        (
            "\ndef dataset(split): return Samples()\n"
            "def get(self, index): raise ValueError('here')\nSamples.get = get\n",
            "dataset('train')[0]",
        ),
        (
            "\ndef dataset(split): return [1] * 40\n"
            "def collate(samples): raise ValueError('here')\n",
            "collate(samples)",
        ),
    ],
)
def test_an_exception_is_shown_once_from_the_users_file_on(
    text: str, called: str, tmp_path: Path
) -> None:
    path = write(tmp_path, GOOD + text)
    error = error_of(path)
    assert isinstance(error, TaskFileError)
    first, *lines = str(error).splitlines()
    assert first == f"own.py: {called} failed:"
    assert lines[0].startswith(f'  File "{path}", line ')
    assert lines[-1] == "ValueError: here"
    assert str(error).count("ValueError: here") == 1
    assert "egtrain/" not in str(error)


@pytest.mark.parametrize("loaders", [0, 2])
def test_an_exception_in_mid_epoch_comes_from_a_loader_as_from_the_process_itself(
    loaders: int, tmp_path: Path
) -> None:
    text = STREAMED + (
        "\ndef get(self, index):\n    if index == 17: raise KeyError('broken')\n"
        "    return torch.ones(3), 1\nSamples.get = get\n"
    )
    path = write(tmp_path, text)
    run = run_of(path, f"data.loaders={loaders}", "steps=50")

    def ask_for_all() -> None:
        for step in range(5):
            for worker in (0, 1):
                run.task.batch(worker, step)

    with pytest.raises(TaskFileError) as caught:
        ask_for_all()
    first, *lines = str(caught.value).splitlines()
    assert first == "own.py: dataset('train')[17] failed:"
    assert lines[-1] == "KeyError: 'broken'"
    assert sum(line.startswith("  File") for line in lines) == 2


class Silent:
    """An observer that ignores the news."""

    def trained(self, *_: object) -> None: ...
    def evaluating(self, *_: object) -> None: ...
    def evaluated(self, *_: object) -> None: ...
    def save(self, *_: object) -> None: ...


def test_a_loss_that_is_not_finite_at_once_is_not_blamed_on_the_rate(tmp_path: Path) -> None:
    text = f"{GOOD}\ndef loss(m, b): return plain_loss(m, b)[0] * float('nan'), {{}}\n"
    run = run_of(write(tmp_path, text))
    with pytest.raises(DivergedError, match="nan at step 1: look at the model, the data and"):
        train(run, Silent(), lambda: False)


def test_metrics_that_change_their_names_are_refused(tmp_path: Path) -> None:
    text = GOOD + (
        "\ncalls = []\ndef loss(m, b):\n    calls.append(1)\n"
        "    more = {'more': 1.0} if calls[5:] else {}\n"
        "    return plain_loss(m, b)[0], {'accuracy': 1.0, **more}\n"
    )
    run = run_of(write(tmp_path, text))
    with pytest.raises(UsageError, match="return the same ones every time"):
        train(run, Silent(), lambda: False)


@pytest.mark.parametrize(
    "text",
    [
        "class Net(nn.Linear):\n    def __init__(self, width: int = 4): super().__init__(3, 2)\n"
        "model = Net\n",
        "import functools\nmodel = functools.partial(model, width=7)\n",
        "model = lambda width=3: nn.Linear(3, 2)\n",
        "def model(width: int = 4, **further): return nn.Linear(3, 2)\n",
        "def dataset(split): return None if split == 'validation' else [(torch.ones(3), 1)] * 40\n",
        "def loss(m, b): return plain_loss(m, b)[0], {}\n",
        "def loss(m, b): return plain_loss(m, b)[0][None], {'wer': torch.ones(1)}\n"
        "higher_is_better = False\n",
        "def model():\n    net = nn.Linear(3, 2)\n    net.bias.requires_grad_(False)\n"
        "    return net\n",
        "def dataset(split): return None if split == 'validation' else Samples()\n"
        "Samples.get = lambda self, i: (torch.ones(3), torch.tensor(float('nan')), True, 1)\n"
        "def loss(m, b): return plain_loss(m, (b[0], b[3]))\n",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 3\n",
        "def model(json: int = 4, copy: str = 'a', model_dump: float = 1.0, "
        "items: list[int] = [1], size: tuple[int, ...] = (1, 2), flag: bool = False, "
        "none: int | None = None): "
        "return nn.Linear(3, 2)\n",
    ],
)
def test_what_is_unusual_but_right_trains(text: str, tmp_path: Path) -> None:
    final = train(run_of(write(tmp_path, f"{GOOD}\n{text}")), Silent(), lambda: False)
    assert "loss" in final["test"]


def test_annotations_may_be_text_and_helpers_lie_beside_the_file(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 3\n", "helper_beside_it.py")
    path = write(
        tmp_path,
        f"from __future__ import annotations\nimport helper_beside_it\n{GOOD}",
        "my own task.py",
    )
    config = load_config("eg", [*SETTINGS, "task.width=5"], load_task_file(path))
    assert config.task.model_dump()["width"] == 5
    with pytest.raises(UsageError, match="width must be a whole number, not"):
        load_config("eg", ["task.width=2.5"], load_task_file(path))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.widht=3", "no setting 'task.widht'; did you mean 'width'?"),
        ("task.width=wide", "task.width must be a whole number, not 'wide'"),
        ("task.width=true", "task.width must be a whole number, not true"),
        ("task.augment=true", "the task file has no setting 'task.augment'; it has width"),
        ("task.name=image", "--task says which task it is: leave task.name out"),
        ("task.file=other.py", "--task says which task it is: leave task.file out"),
        ("data.name=cifar10", "a task file has its own data: leave data.name out"),
        ("model.name=resnet", "task 'user' has no model 'resnet'"),
        ("task.sha256=abc", "own.py has changed since"),
        ("data.train_samples=41", "own.py has 40 training samples"),
        ("data.validation=40", "one must remain; use 0 to 39"),
        ("worker_batch_size=30", "larger than the 40 training samples"),
    ],
)
def test_a_wrong_setting_is_refused(setting: str, message: str, tmp_path: Path) -> None:
    assert message in str(error_of(write(tmp_path, GOOD), setting))


def test_settings_have_the_types_of_a_class_and_their_wrong_entries_are_named(
    tmp_path: Path,
) -> None:
    text = GOOD + (
        "\nclass Net(nn.Linear):\n"
        "    def __init__(self, scale: float = 4, sizes: list[int] = [1, 2]):\n"
        "        super().__init__(3, 2)\nmodel = Net\n"
    )
    path = write(tmp_path, text)
    config = load_config("eg", ["task.scale=2.5"], load_task_file(path))
    assert config.task.model_dump()["scale"] == 2.5
    with pytest.raises(UsageError, match=r"task\.sizes\.1 must be a whole number, not 'a'"):
        load_config("eg", ["task.sizes=[1, a]"], load_task_file(path))


def test_a_batch_that_loaders_cannot_send_is_refused_where_there_are_loaders(
    tmp_path: Path,
) -> None:
    text = STREAMED + (
        "\nSamples.get = lambda self, i: (torch.ones(3), 1)\n"
        "def collate(samples):\n"
        "    x, y = torch.utils.data.default_collate(samples)\n    return x, y, lambda: None\n"
        "def loss(m, b): return plain_loss(m, b[:2])\n"
    )
    path = write(tmp_path, text)
    run_of(path)
    assert "cannot be sent between processes" in str(error_of(path, "data.loaders=1"))


def test_a_validation_set_excludes_held_out_samples(tmp_path: Path) -> None:
    text = GOOD.replace('None if split == "validation" else ', "")
    path = write(tmp_path, text)
    assert run_of(path).task.evaluation_size("validation") == 40
    assert "has a validation set already" in str(error_of(path, "data.validation=4"))


@pytest.mark.parametrize("preset", ["resnet-eg", "vgg-sam", "lstm-eg", "transformer-eg"])
def test_a_familys_rates_are_kept_and_its_net_and_data_replaced(
    preset: str, tmp_path: Path
) -> None:
    file = load_task_file(write(tmp_path, GOOD))
    config, of_family = load_config(preset, [], file), load_config(preset)
    assert config.optimizer == of_family.optimizer
    assert config.extrapolation == of_family.extrapolation
    assert config.schedule == of_family.schedule
    assert (config.task.name, config.model.name, config.data.name) == ("user",) * 3
    assert config.task.model_dump().keys() == {"name", "file", "sha256", "width"}


def test_a_variant_without_a_task_file_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match="it is a variant: add --task FILE, or name a family's"):
        load_config("eg")


def test_names_of_modules_are_refused(tmp_path: Path) -> None:
    for name in ("random", "torch", "numpy", "egtrain", "matplotlib"):
        with pytest.raises(UsageError, match=f"has the name of the module '{name}'"):
            load_task_file(write(tmp_path, GOOD, f"{name}.py"))
    (tmp_path / "apart").mkdir()  # not beside the files above, which would hide modules
    for _ in range(2):
        assert load_task_file(write(tmp_path / "apart", GOOD, "flowers.py")).name == "flowers.py"
    with pytest.raises(UsageError, match="cannot be read"):
        load_task_file(tmp_path)


def test_json_stays_json_whatever_the_file_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calling = "def loss(m, b):\n    print('called')\n    return plain_loss(m, b)\n"
    text = f"print('imported')\n{GOOD}\n{calling}"
    pairs = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["train", "--task", str(write(tmp_path, text)), "--preset", "eg", *pairs, "--json"]
    result = command_line(capsys, *command, "--output", "run")
    assert json.loads(result.stdout)["steps"] == 4
    assert "imported" in result.stderr
    assert "called" in result.stderr
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(("code", "text"), [(1, "raise ValueError('here')"), (2, "return None")])
def test_two_processes_report_a_mistake_once_and_leave_nothing(
    code: int, text: str, tmp_path: Path
) -> None:
    path = write(tmp_path, f"{GOOD}\ndef loss(model, batch): {text}\n")
    pairs = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["train", "--task", str(path), "--preset", "eg", *pairs, "--output", "run"]
    with Forked([*command, "--nproc", "2"], tmp_path) as process:
        assert process.wait() == code
        assert process.stderr.count("egtrain: own.py: loss(model, batch)") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_only_with_its_task_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, GOOD)
    pairs = [part for setting in SETTINGS for part in ("--set", setting)]
    command_line(capsys, "train", "--task", "own.py", "--preset", "eg", *pairs, "--output", "run")
    longer = ["train", "--resume", "run", "--steps", "6", "--allow-changes"]
    refused = command_line(capsys, *longer)
    assert refused.code == 2
    assert f"runs only where it is named: add --task {path}" in refused.stderr
    # The same content elsewhere is the same file.
    (tmp_path / "moved").mkdir()
    moved = write(tmp_path / "moved", GOOD, "other.py")
    assert command_line(capsys, *longer, "--task", str(moved)).code == 0
    assert command_line(capsys, "eval", "run", "--task", str(moved)).code == 0
    write(tmp_path, f"{GOOD}# changed\n")
    for command in (["eval", "run"], ["train", "--resume", "run"], ["plot-sharpness", "run"]):
        changed = command_line(capsys, *command, "--task", "own.py")
        assert changed.code == 2
        assert "--allow-changes" in changed.stderr
    assert command_line(capsys, "eval", "run", "--task", "own.py", "--allow-changes").code == 0
    # Settings that it no longer has.
    write(tmp_path, GOOD.replace("width", "widths"))
    renamed = command_line(capsys, "eval", "run", "--task", "own.py", "--allow-changes")
    assert renamed.code == 2
    assert "the task file has no setting 'task.width'; did you mean 'widths'?" in renamed.stderr


@pytest.mark.parametrize(
    ("returned", "message"),
    [("'abcd'", "one text for each of the 4 samples"), ("None", "one text"), ("[1]", "one text")],
)
def test_what_decode_returns_is_checked(returned: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"{GOOD}\ndef decode(model, batch): return {returned}\n")
    run = run_of(path)
    task: object = run.task
    with pytest.raises(UsageError, match=message):
        task.decode_batch(run.model, "test", 0)  # type: ignore[attr-defined]


def test_a_loss_that_counts_is_shown_once() -> None:
    assert metrics_text({"loss": 0.5}, [LOSS, LOSS]) == "loss 0.5000"
