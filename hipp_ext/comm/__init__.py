"""LQ-SGD: low-rank, log-quantised gradients for distributed training.

state = LQSGDState(ddp, rank=4, bits=8)
ddp.register_comm_hook(state, lqsgd_hook)
...
state.stats()["bytes_sent"]
"""

from hipp_ext.comm.checkpoint import load_checkpoint, save_checkpoint
from hipp_ext.comm.codec import Blocks, LogCodec
from hipp_ext.comm.compressor import Compressor
from hipp_ext.comm.ddp_hook import lqsgd_hook, mean_gradients, register_lqsgd
from hipp_ext.comm.exchange import run_together
from hipp_ext.comm.fsdp import register_lqsgd_fsdp
from hipp_ext.comm.options import Options
from hipp_ext.comm.outer_loop import OuterLoop
from hipp_ext.comm.saving import load_state, save_state
from hipp_ext.comm.state import LQSGDState

__all__ = [
    "Blocks",
    "Compressor",
    "LQSGDState",
    "LogCodec",
    "Options",
    "OuterLoop",
    "load_checkpoint",
    "load_state",
    "lqsgd_hook",
    "mean_gradients",
    "register_lqsgd",
    "register_lqsgd_fsdp",
    "run_together",
    "save_checkpoint",
    "save_state",
]
