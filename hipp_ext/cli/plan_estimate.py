"""How long `hipp plan` will take, said before it measures."""

from typing import Any

from hipp_ext.cli import output

LITTLE = 1e11  # FLOPs that any machine does in seconds, so that its rate need not be measured


def say_estimate(model: Any, calibration: Any, passes: float) -> None:
    """Print the estimate on stderr; see `hipp_ext.sensitivity.efforts.Announce`."""
    if not passes or not output.speaks():
        return
    from hipp_ext.cli.doctor_text import duration
    from hipp_ext.evals.estimates import UTILISATION, measure_rate, pass_flops

    flops = passes * pass_flops(model, calibration)
    counted = f"{passes:.3g} forward passes over {calibration.rows} rows, {flops / 1e15:.2g} PFLOP"
    if flops < LITTLE:
        output.progress(f"measuring takes seconds ({counted}, by count)")
        return
    rate = UTILISATION * measure_rate(str(model.device), model.dtype)
    output.progress(
        f"measuring takes about {duration(flops / rate)}, by count: {counted}, at "
        f"{rate / 1e12:.2g} TFLOP/s, half of what {model.device} does now"
    )
