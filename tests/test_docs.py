"""All commands of the README and docs/ run as printed, long ones with few steps or as a plan."""

import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import started, write_texts
from PIL import Image
from typer.testing import CliRunner

from egtrain.build import build_direction
from egtrain.cli import app
from egtrain.config.extrapolations import SECTIONS
from egtrain.config.files import load_config, preset_families
from egtrain.data.sets import OF_TASK

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if path.name != "results.md"  # its commands made its numbers: hours of training
}


@dataclass(frozen=True)
class Command:
    """A line of a block of shell commands, without its comment."""

    page: str
    text: str


COMMANDS = [
    Command(page, line.partition("  #")[0].strip())
    for page, text in PAGES.items()
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
PYTHON = [
    (page, block)
    for page, text in PAGES.items()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
]

PLAIN, AROUND, _CLOSURE, _SAM, _WORKERS, DDP, SECOND_GRADIENT, SHARDED, *_ = (
    block for page, block in PYTHON if page == "docs/library.md"
)
"""A user's training loops; test_own_loop.py checks what two of them compute."""

TINY = (
    "--data synthetic --steps 2 --workers 2 --device cpu "
    "--set model.depth=8 --set model.width=4 --set threads=1"
)
"""What makes a preset for images small enough for a test."""
TINY_TEXT = (
    "--data synthetic --steps 2 --workers 2 --device cpu "
    "--set model.layers=1 --set model.width=16 --set threads=1"
)
TASKS = {"spirals": "spirals.py", "table": "docs/examples/tabular_regression.py"}
"""Those with a task file."""
TINY_TASK = (
    "--steps 2 --workers 2 --device cpu --set worker_batch_size=8 "
    "--set threads=1 --set schedule.shorten_warmup=true"
)
RUNS = {
    "sgd": "quickstart-sgd",
    "eg": "quickstart",
    "resnet-eg": "resnet-eg",
    "transformer-eg": "transformer-eg",
    "spirals": "eg",
    "table": "eg",
}
"""The runs that the pages speak of, and their presets."""


def egtrain(arguments: str) -> str:
    result = CliRunner().invoke(app, shlex.split(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no data elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EGTRAIN_DATA", raising=False)
    return tmp_path


def make_runs(arguments: str) -> None:
    """Make small versions of the runs that a command reads."""
    for name in sorted(set(re.findall(r"runs/([\w-]+)", re.sub(r"--output \S+", "", arguments)))):
        if preset := RUNS.get(name):
            if name in TASKS:
                own = f"--task {TASKS[name]} --preset {preset} --output runs/{name}"
                egtrain(f"train {own} {TINY_TASK}")
                continue
            text = preset.startswith("transformer")
            size = f"{TINY_TEXT} --set task.subwords=200" if text else TINY
            egtrain(f"train --preset {preset} --output runs/{name} {size}")


def write_files(folder: Path) -> None:
    """Write the files that begin with their name, such as `# flowers.py`, and the examples."""
    shutil.copytree(ROOT / "docs/examples", folder / "docs/examples")
    for text in PAGES.values():
        for block in re.findall(r"```(?:python|yaml)\n(.*?)```", text, flags=re.DOTALL):
            if named := re.match(r"# (\w+\.(?:py|yaml))\n", block):
                (folder / named[1]).write_text(block)


def make_data(folder: Path, arguments: str) -> None:
    """Make small versions of the user's data that a command names, and the files of the pages."""
    write_files(folder)
    if "--init-from weights.safetensors" in arguments:
        make_runs("runs/spirals")
        egtrain("export runs/spirals --output weights.safetensors")
    if "images.npz" in arguments:
        (block,) = (block for _, block in PYTHON if "images.npz" in block)
        exec(compile(block, "docs/data.md", "exec"), {})
    if "folder:DIR" in arguments:
        for split in ("train", "test"):
            for number in range(8):
                place = folder / f"DIR/{split}/{number % 2}/{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (30 * number, 0, 0)).save(place)
    for path in {"FOLDER", "DIR"} & set(re.findall(r"\w+", arguments)):
        (folder / path).mkdir(exist_ok=True)
    if "FOLDER" in arguments:
        write_texts(folder / "FOLDER", words=93, pairs=60)


def made_small(arguments: str) -> str:
    """Return the arguments of a command that takes seconds and downloads nothing."""
    command = arguments.split()[0]
    if "--task" in arguments:
        return (
            arguments
            + {
                "train": " --dry-run --device cpu",
                "eval": " --device cpu",
                "plot-sharpness": " --samples 8 --device cpu --metrics trace",
                "bench": " --rounds 2 --variants local --device cpu",
                "sweep-batch": " --dry-run --no-estimate --device cpu",
            }[command]
        )
    if command == "plot-sharpness":
        arguments = re.sub(r" --samples \d+", "", arguments) + " --samples 8 --device cpu"
        return arguments + ("" if "--metrics" in arguments else " --metrics trace,line")
    if command == "bench":
        arguments = re.sub(r" --rounds \d+", "", arguments) + " --rounds 2 --data synthetic"
        return (
            f"{arguments} --device cpu --set model.depth=8 --set model.width=2 "
            "--set worker_batch_size=4 --set threads=1"
        )
    if command == "sweep-batch":
        # The plan of a real one needs torch and data, here the embedded ones.
        return (
            f"{arguments} --dry-run --no-estimate --data synthetic --device cpu "
            "--set data.train_samples=null"
        )
    if command != "train" or "--resume" in arguments:
        return arguments
    if re.search("quickstart-(lstm|transformer)", arguments):
        return f"{arguments} {TINY_TEXT}"
    if "--preset quickstart" in arguments and "--data" not in arguments:
        return f"{arguments} {TINY}"
    # The plan of the real thing: it needs neither the data nor eight GPUs.
    if "text:FOLDER" in arguments:
        arguments += " --batch-size 2 --workers 2 --set task.bptt=5 --set model.width=16"
    if "pairs:FOLDER" in arguments:
        arguments += " --batch-size 16 --workers 2 --set task.subwords=40 --set model.width=16"
    if "folder:DIR" in arguments:
        arguments += " --batch-size 8 --workers 2 --set model.width=2"
    if "--data synthetic" in arguments:
        arguments += " --set model.depth=8 --set worker_batch_size=8"
    arguments = re.sub(" --dry-run", "", arguments) + " --dry-run"
    return f"{arguments} --device cpu" + ("" if "--offline" in arguments else " --offline")


@pytest.mark.parametrize(
    "command",
    [
        c
        for c in COMMANDS
        if re.match("egtrain|torchrun", c.text) and c.page != "docs/examples.md"
        # test_examples.py runs those
    ],
    ids=lambda c: f"{c.page}: {c.text}",
)
def test_a_command_runs(command: Command, folder: Path) -> None:
    program, _, arguments = command.text.partition(" ")
    if program == "torchrun":
        launcher, _, arguments = arguments.partition("-m egtrain ")
        assert re.fullmatch(r"(--nnodes 2 --node-rank [01] )?--nproc-per-node 8 .*", launcher)
        arguments += " --nproc 8"
    make_data(folder, arguments)
    make_runs(arguments)
    assert egtrain(made_small(arguments))


def test_every_command_of_the_pages_is_known() -> None:
    others = {c.text for c in COMMANDS if not re.match("egtrain|torchrun", c.text)}
    assert sum(text.startswith("pip install -c constraints.txt") for text in others) == 2
    assert all(text.startswith("pip install") for text in others)


def test_settings_of_the_prose_are_accepted(folder: Path) -> None:
    settings = [
        code
        for text in PAGES.values()
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        if re.match(r"--(set|batch-size|workers|seed) \S*[^A-Z]+$", code)
    ]
    assert len(settings) >= 8
    for setting in settings:
        egtrain(f"train --preset resnet-eg --dry-run --offline --device cpu {setting}")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's advice
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # transformers' default
@pytest.mark.parametrize("page", sorted({page for page, _ in PYTHON}))
def test_python_of_the_pages_runs_from_top_to_bottom(page: str, folder: Path) -> None:
    names: dict[str, Any] = {"torch": torch}
    write_files(folder)
    make_runs(PAGES[page])
    for command in (c for c in COMMANDS if c.page == page and c.text.startswith("egtrain export")):
        egtrain(command.text.removeprefix("egtrain "))
    for block in (block for of, block in PYTHON if of == page):
        if "torch.distributed" in block:
            break  # what follows needs ranks: see below
        exec(compile(block, page, "exec"), names)


def test_a_loop_of_the_library_page_trains_and_saves_what_it_needs(folder: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(PLAIN, "docs/library.md", "exec"), names)
    weight = names["network"][0].weight
    before = weight.detach().clone()
    exec(compile(AROUND, "docs/library.md", "exec"), names)
    assert not torch.equal(weight, before)
    for name, state in torch.load("training.pt", weights_only=True).items():
        names[name].load_state_dict(state)


@pytest.mark.parametrize("program", [DDP, SHARDED], ids=["DDP", "FSDP2"])
def test_a_loop_of_two_processes_runs_under_torchrun(program: str, folder: Path) -> None:
    (arguments,) = re.findall("# torchrun (.*)", program)
    assert arguments == "--nproc-per-node 2 this_file.py"
    (folder / "this_file.py").write_text(program, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += shlex.split(arguments)
    with started(torchrun, folder, OMP_NUM_THREADS="1", PYTHONWARNINGS="error") as process:
        output = "".join(process.communicate(timeout=120))
    assert process.returncode == 0, output


# ---- tables that follow the code

VARIANTS = PAGES["docs/variants.md"]


def test_the_table_of_zeta_has_every_row_with_its_name_and_gradients() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| `([\w-]+)` \|.*\| (\d) \|$", VARIANTS, re.MULTILINE)
    assert {name for _, name, _ in rows} == set(SECTIONS)
    for variant, name, gradients in rows:
        config = load_config(f"resnet-{variant}")
        assert config.extrapolation.name == name
        direction = build_direction(config)
        assert int(gradients) == (1 if direction is None else direction.gradients)


def test_every_variant_and_family_stands_in_a_table() -> None:
    cells = re.findall(r"^\| (`[^|]*`) \|", VARIANTS, flags=re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    families = preset_families()
    assert named == {*families, *(variant for of in families.values() for variant in of)}


def test_every_public_data_set_stands_in_the_table() -> None:
    cells = re.findall(r"^\| (`.*?) \|", PAGES["docs/data.md"], re.MULTILINE)
    named = set(re.findall(r"`([\w-]+)`", "".join(cells)))
    assert {name for sets in OF_TASK.values() for name in sets} < named


def test_every_page_is_in_the_navigation_and_links_to_what_is_there() -> None:
    navigation = (ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"([\w-]+\.md)", navigation)) == pages
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150
