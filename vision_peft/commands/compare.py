"""`vision-peft compare`: methods x learning rates x seeds on one task, chosen on the val split only; resumable, on one machine or many.

First every method is trained at every learning rate with the first seed and scored on the val split. The rate with the best score is
then run with every seed and scored on the test split. Trials live in an Optuna study (SQLite in the folder by default; any RDB that
several machines can reach by --storage). The same command again goes on where it was stopped.

  vision-peft compare --config configs/task/fewshot_vit.yaml --methods configs/method/*.yaml --folder checkpoints/compare
"""

from __future__ import annotations

from pathlib import Path

from vision_peft.commands.parser import CommandParser
from vision_peft.commands.workers import run_workers
from vision_peft.errors import UserError


def main(command: str, argv: list[str]) -> None:
    parser = CommandParser(command, __doc__, usage="vision-peft compare --config FILE ... --methods FILE ... [options]")
    parser.add_argument("--config", action="append", required=True, help="of the task; repeat to lay one over another")
    parser.add_argument("--methods", nargs="+", required=True, help="YAML files laid over the task, one a method")
    parser.add_argument("--lr_factors", nargs="+", type=float, default=[0.3, 1.0, 3.0], help="times the learning rate of the configuration")
    parser.add_argument("--lrs", nargs="+", type=float, help="learning rates, instead of factors")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of every run")
    parser.add_argument("--score", default="val/accuracy", help="metric of the val split that chooses, higher is better")
    parser.add_argument("--report", default="test/accuracy", help="metric of the test split that is reported")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/compare"), help="study, table, plot and report")
    parser.add_argument("--storage", help="Optuna storage; by default SQLite in the folder")
    parser.add_argument("--jobs", type=int, default=1, help="processes on this machine; its threads are divided among them")
    parser.add_argument("--retry_failed", action="store_true", help="run failed trials again")
    parser.add_argument("--report_only", action="store_true", help="write the report from what is there")
    parser.add_argument("--worker", action="store_true", help="run trials until none is left, and write no report")
    given = parser.parse_args(argv)
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("compare needs optuna: pip install 'vision-peft[sweep]'") from error
    from vision_peft.commands.compare_study import Plan, Study

    plan = Plan.of(given.config, given.methods, given.lrs, given.lr_factors, given.seeds, given.set, given.score)
    given.folder.mkdir(parents=True, exist_ok=True)
    study = Study(plan, given.storage or f"sqlite:///{given.folder / 'study.db'}", given.folder)
    if given.worker:
        study.work()
        return
    if not given.report_only:
        study.reclaim(given.retry_failed)
        run_workers("compare", argv, given.jobs, study)
    from vision_peft.report.comparison import write_comparison

    print(write_comparison(study.rows(), given.folder, given.score, given.report))
