"""A small run over every reader: the known hostile files and a few random ones. The long run is
`make fuzz`.
"""

from random import Random

import pytest

from fuzz.corpus import corpus
from fuzz.probes import PROBES
from fuzz.running import Worker, cases
from fuzz.table import all_readers

READERS = {name: reader for name, reader in all_readers().items() if reader.share > 0.05}
RANDOM = 8  # cases for a reader, after the known ones


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with Worker(tmp_path_factory.mktemp("fuzz")) as worker:
        yield worker


@pytest.fixture(scope="module")
def strict_worker(tmp_path_factory):
    with Worker(
        tmp_path_factory.mktemp("probes"), seconds=4, mib=300
    ) as worker:  # of a busy machine
        yield worker


def seeds(name: str) -> list[int]:
    """The valid folder, all known files and some random ones; of slow readers a sample, the same
    every time.
    """
    last = len(corpus(name)) + RANDOM
    share = READERS[name].share
    return [
        0,
        *(
            range(1, last + 1)
            if share == 1
            else Random(name).sample(range(1, last + 1), min(last, round(40 * share)))
        ),
    ]


@pytest.mark.parametrize("name", list(READERS))
def test_a_damaged_file_is_read_rightly_or_refused(worker, name):
    faults = {
        case.signature: str(case)
        for case in cases(worker, name, seeds(name))
        if case.outcome == "fault"
    }
    assert not faults, f"{len(faults)} faults, kept in {worker.place / 'faults'}\n\n" + "\n\n".join(
        list(faults.values())[:5]
    )


@pytest.mark.parametrize("act", list(PROBES))
def test_what_a_reader_must_not_do_is_a_fault(strict_worker, act):
    case = strict_worker.run(act, 0)
    assert case.outcome == "fault" and act in case.fault, case
    assert (strict_worker.place / "faults" / f"{act}-0/fault.txt").exists() and not (
        strict_worker.place / "elsewhere"
    ).exists()
