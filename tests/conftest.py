"""Settings of the whole suite."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import zoo

# Lightning's log handler keeps the stream it was born with, which pytest's capture closes after the first test.
logging.raiseExceptions = False
torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it does
# lightning 2.6.6 calls methods that jsonargparse has renamed
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
os.environ.setdefault("ZOO_PLUGINS", "0")  # whatever else is installed must not decide a test


# The kernels' tests run where torch, numpy and pytest are all there is.
if importlib.util.find_spec("lightning") is None:
    _folders = ("engine", "tasks", "data", "convert", "metrics")
    _needs_training = (*_folders, "explain/test_command.py", "test_configs.py", "test_readme.py", "test_docs.py")
    collect_ignore = [*_needs_training, "test_bench.py", "test_import.py", "test_package.py", "test_platform_wheel.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the emulated kernels of a session are compiled, once."""
    base = tmp_path_factory.getbasetemp()
    # the processes of pytest-xdist share it, too
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms; torch then also fills uninitialised memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace: dict) -> None:
    doctest_namespace["zoo"] = zoo
    doctest_namespace["torch"] = torch
