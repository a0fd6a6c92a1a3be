"""`vision-peft table`: the table of the few-shot papers, sets x shots x seeds x methods at fixed settings; resumable, on many machines.

Every cell is a run of `fit` and its score on the test split; nothing is chosen by looking at scores. Trials live in an Optuna study
(SQLite in the folder by default; any RDB that several machines can reach by --storage). The same command again goes on where it was
stopped, and more sets, shots, seeds or methods may be named each time.

  vision-peft table --config configs/task/fewshot_clip.yaml --sets configs/set/*.yaml --shots 1 2 4 8 16 --steps_per_shot 500
                    --methods configs/baseline/*.yaml configs/method/lora.yaml --folder checkpoints/table
"""

from __future__ import annotations

from pathlib import Path

from vision_peft.commands.parser import CommandParser
from vision_peft.commands.workers import run_workers
from vision_peft.errors import UserError


def main(command: str, argv: list[str]) -> None:
    parser = CommandParser(command, __doc__, usage="vision-peft table --config FILE ... --sets FILE ... --methods FILE ... [options]")
    parser.add_argument("--config", action="append", required=True, help="of the task; repeat to lay one over another")
    parser.add_argument("--sets", nargs="+", required=True, help="YAML files laid over the task, one a set: its source and template")
    parser.add_argument("--methods", nargs="+", required=True, help="YAML files laid over both, one a method")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps_per_shot", type=int, help="optimizer steps a shot, for methods whose file sets no trainer.max_steps")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of every run")
    parser.add_argument("--report", default="test/accuracy", help="metric of the test split in the table")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/table"), help="study, table and plot")
    parser.add_argument("--storage", help="Optuna storage; by default SQLite in the folder")
    parser.add_argument("--jobs", type=int, default=1, help="processes on this machine; its threads, and GPUs, are divided among them")
    parser.add_argument("--retry_failed", action="store_true", help="run failed trials again")
    parser.add_argument("--report_only", action="store_true", help="write the table from what is there")
    parser.add_argument("--worker", action="store_true", help="run trials until none is left, and write no table")
    given = parser.parse_args(argv)
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("table needs optuna: pip install 'vision-peft[sweep]'") from error
    from vision_peft.commands.table_study import Grid, TableStudy

    lists = (given.config, given.sets, given.methods, given.shots, given.seeds)
    grid = Grid.of(*lists, given.steps_per_shot, given.set, given.report)
    given.folder.mkdir(parents=True, exist_ok=True)
    study = TableStudy(grid, given.storage or f"sqlite:///{given.folder / 'study.db'}", given.folder)
    if given.worker:
        study.work()
        return
    if not given.report_only:
        study.reclaim(given.retry_failed)
        run_workers("table", argv, given.jobs, study)
    from vision_peft.report.fewshot_table import write_table

    print(write_table(study.rows(), given.folder, given.report, study.size()))
