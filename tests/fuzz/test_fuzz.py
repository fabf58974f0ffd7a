"""A small run over every reader: the known hostile files and a few random ones. The long run is `make fuzz`."""

import pytest

from fuzz.corpus import corpus
from fuzz.running import Worker, cases
from fuzz.table import all_readers

READERS = all_readers()
SECONDS = 0.5  # of processor time per reader, about: what the random cases get after the known ones


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with Worker(tmp_path_factory.mktemp("fuzz")) as worker:
        yield worker


@pytest.mark.parametrize("name", list(READERS))
def test_a_damaged_file_is_read_rightly_or_refused(worker, name):
    found = list(cases(worker, name, range(1 + len(corpus(name)) + round(40 * READERS[name].share))))
    assert found[0].outcome == "ok", f"the valid folder is not read\n{found[0]}"
    faults = list({case.signature: case for case in found if case.outcome == "fault"}.values())
    assert not faults, f"{len(faults)} faults, kept in {worker.place / 'faults'}\n\n" + "\n\n".join(map(str, faults[:5]))
