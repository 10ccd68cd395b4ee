import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import torch_as_it_was

# The tests' tensors are tiny: more threads only wait for each other.
torch.set_num_threads(1)

# Models are made in the tests: Hugging Face's libraries shall ask for none.
os.environ["HF_HUB_OFFLINE"] = "1"
# Where the user's runs are, is none of the tests' business.
os.environ.pop("EGTRAIN_RUNS", None)

TRAINING_OR_STARTING_PROCESSES = {
    "test_bench",
    "test_cli",
    "test_docs",
    "test_eval",
    "test_every_preset",
    "test_examples",
    "test_export",
    "test_figures",
    "test_init_from",
    "test_integrations",
    "test_loops_accumulation",
    "test_loops_clipping_and_amp",
    "test_loops_closures",
    "test_loops_ddp",
    "test_loops_foreign_parameters",
    "test_method_facts",
    "test_own_direction",
    "test_own_loop",
    "test_plot_sharpness",
    "test_post_local",
    "test_progress",
    "test_ranks",
    "test_resume",
    "test_runs",
    "test_sharpness_own_model",
    "test_sharpness_pictures",
    "test_sharpness_spectrum",
    "test_support",
    "test_sweep",
    "test_task_file",
    "test_task_file_errors",
    "test_text_data",
    "test_text_extra",
    "test_text_runs",
    "test_train",
    "test_wheel",
}
"""Files whose tests are not marked as fast."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as fast the tests that take under a minute together: `pytest -m fast`."""
    for item in items:
        if item.path.stem not in TRAINING_OR_STARTING_PROCESSES:
            item.add_marker(pytest.mark.fast)


@pytest.fixture(autouse=True)
def a_test_leaves_torch_as_it_was() -> Iterator[None]:
    """Undo what a run sets for its process, on which a later test would depend."""
    with torch_as_it_was():
        yield


@pytest.fixture(autouse=True)
def only_gpu_tests_find_a_gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let all other tests give the same results on a machine that has one."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an .npz file: 150 training images (4 batches of 32 and a rest), 1,100 test images."""
    from helpers import write_images

    return write_images(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder that holds multi30k and wikitext2-small, or skip, loudly."""
    home = os.environ.get("EGTRAIN_DATA")
    if home is None or not (Path(home) / "wikitext2-small").is_dir():
        pytest.skip(
            "NOT TESTED ON REAL DATA: set EGTRAIN_DATA to the folder that holds multi30k and "
            "wikitext2-small"
        )
    return Path(home)


@pytest.fixture(scope="session")
def undisturbed(
    images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Return a function from settings to the outcome of an uninterrupted run on one process."""
    from helpers import config_of, outcome, run_here

    done: dict[tuple[str, ...], dict[str, Any]] = {}

    def find(*further: str, extrapolation: str = "local") -> dict[str, Any]:
        key = (extrapolation, *further)
        if key not in done:
            directory = tmp_path_factory.mktemp("undisturbed") / "run"
            done[key] = outcome(
                run_here(directory, config_of(images, *further, extrapolation=extrapolation))
            )
        return done[key]

    return find
