"""`hipp tasks-path | lm-eval | lmms-eval`: other programs that evaluate."""

from typing import Annotated, Literal

import typer

hosts_app = typer.Typer()


@hosts_app.command("tasks-path")
def tasks_path(
    host: Annotated[
        Literal["lm-eval", "lmms-eval"], typer.Argument(help="The program that reads them.")
    ] = "lm-eval",
) -> None:
    """Print the folder of our tasks for models of lm-eval or lmms-eval itself.

    Both have hipp_pope, hipp_scienceqa and hipp_scienceqa_val; lm-eval has hipp_repope, hipp_amber,
    hipp_hallusionbench and hipp_mme as well.

    Examples:

    `lm_eval --include_path $(hipp tasks-path) --tasks hipp_pope ...`

    `LMUData=./tsv lmms-eval --include_path $(hipp tasks-path lmms-eval) --tasks hipp_pope ...`
    """
    from hipp_ext.integrations import lm_eval, lmms_eval

    typer.echo(str((lm_eval if host == "lm-eval" else lmms_eval).tasks_path()))


@hosts_app.command(
    "lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's command line (`hipp lm-eval run --help`) with `--model hipp` and the tasks of
    `hipp tasks-path`.

    Example: `hipp lm-eval run --model hipp --model_args pretrained=./pruned --tasks
    hipp_pope,hipp_scienceqa --metadata lmu_data=./tsv --apply_chat_template --batch_size 8`
    """
    from hipp_ext.integrations.lm_eval import main as run

    raise typer.Exit(run(context.args))


@hosts_app.command(
    "lmms-eval",
    context_settings={
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "ignore_unknown_options": True,
    },
)
def lmms_eval(context: typer.Context) -> None:
    """Run lmms-eval's command line (`hipp lmms-eval eval --help`) with the tasks of `hipp
    tasks-path lmms-eval`, and with `--lmu-data DIR`, the folder of their tables. Default: $LMUData,
    else ~/LMUData.

    Example: `hipp lmms-eval --model hipp --model_args pretrained=./pruned --tasks
    hipp_pope,hipp_scienceqa --lmu-data ./tsv --batch_size 8`
    """
    from hipp_ext.integrations.lmms_eval import main as run

    raise typer.Exit(run(context.args))
