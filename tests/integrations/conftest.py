"""What the tests of VLMEvalKit evaluate: a tiny LLaVA and two tables, new for every file."""

from pathlib import Path

import pytest
from vlm_tables import pope_rows, save_llava, scienceqa_rows, write_tsv


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def lmu(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lmu")
    write_tsv(folder / "POPE.tsv", pope_rows())
    write_tsv(folder / "ScienceQA_TEST.tsv", scienceqa_rows())
    return folder
