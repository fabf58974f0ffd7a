"""The hook under real DistributedDataParallel on real gloo processes."""

import pytest
import torch.nn as nn

from comm.processes import run_checks
from hipp_ext.comm import LQSGDState
from hipp_ext.errors import CompressionError

PAIR = [
    "ranks_are_equal_and_match_the_simulation",
    "default_arguments_learn",
    "unused_parameters",
    "all_zero_gradients",
    "half_precision_parameters",
    "sparse_gradients_are_refused",
    "infinite_gradients",
    "gradient_accumulation",
    "backward_broken_off",
    "a_checkpoint_goes_on_to_the_bit",
    "ranks_that_differ_are_refused",
    "a_list_of_tensors",
    "another_model_than_the_wrapped_one",
    "fsdp_between_nodes",
    "the_trainer_and_accelerate",
    "recovering_goes_on_to_the_bit",
    "the_simulated_powersgd_trains_like_torchs",
    "made_like_powersgd",
    "made_like_powersgd_and_wrong",
    "factors_that_differ_are_noticed",
    "copies",
    "what_ddp_ignores",
    "exact_where_a_gradient_has_rank_one",
    "ways_of_using_ddp",
    "other_models_under_ddp",
    "resuming_in_the_trainer",
    "distilling_like_one_process",
    "recovering_on_rows_of_a_file",
    "a_position_is_worth_the_same_on_any_process",
    "a_sharded_model_recovers_like_a_whole_one",
    "folders_that_are_not_shared_are_refused",
]
pytestmark = pytest.mark.timeout(1500)  # all checks of a group run in one set of processes
TRIPLE = [
    "ranks_are_equal_and_match_the_simulation",
    "infinite_gradients",
    "exact_where_a_gradient_has_rank_one",
    "checkpoints_of_other_workers",
    "a_rank_that_dies",
]
FOUR = ["ranks_are_equal_and_match_the_simulation"]


@pytest.fixture(scope="module")
def pair():
    return run_checks(2, PAIR)


@pytest.fixture(scope="module")
def triple():
    return run_checks(3, TRIPLE)


@pytest.fixture(scope="module")
def four():
    return run_checks(4, FOUR)


@pytest.mark.parametrize("name", PAIR)
def test_two_processes(pair, name):
    assert not pair[name], pair[name]


@pytest.mark.parametrize("name", TRIPLE)
def test_three_processes(triple, name):
    assert not triple[name], triple[name]


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(four, name):
    assert not four[name], four[name]


def test_without_a_process_group():
    with pytest.raises(CompressionError, match="call init_process_group"):
        LQSGDState(nn.Linear(2, 2))
