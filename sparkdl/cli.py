"""The command ``sparkdl``. ``sparkdl doctor`` tells what a fit would meet on a cluster, before there is a fit."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparkdl.barrier.findings import Finding, Report, Request
from sparkdl.barrier.preflight import preflight
from sparkdl.barrier.resources import await_slots

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["build_parser", "main", "show"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: As on the command line; those of the process if None.

    Returns:
        The exit status: 0 if a fit can run, 1 if not. Wrong arguments end the process with 2.
    """
    options = build_parser().parse_args(arguments)
    try:
        spark = _session(options)
    except Exception as error:
        sys.stdout.write(f"error   session: {str(error).strip().partition(chr(10))[0]}\n")
        return 1
    try:
        report = preflight(spark, _request(options, spark), ports=True)
    finally:
        spark.stop()
    sys.stdout.write(json.dumps(report.as_dict()) + "\n" if options.json else show(report))
    return 1 if report.errors else 0


def build_parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    parser = argparse.ArgumentParser(prog="sparkdl", description="Train PyTorch modules on Spark DataFrames.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="tell what a fit would meet on this cluster")
    doctor.add_argument("--workers", type=_positive, help="ranks, as numTrainWorkers (default: one for each slot)")
    doctor.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    doctor.add_argument("--staging-dir", metavar="URL", help="directory that all executors reach, as stagingDir")
    doctor.add_argument("--checkpoint-dir", metavar="URL", help="the same for checkpoints, as checkpointDir")
    doctor.add_argument("--allow-unencrypted-traffic", action="store_true", help="as allowUnencryptedTraffic=True")
    session = doctor.add_mutually_exclusive_group()
    session.add_argument("--master", metavar="URL", help="master of classic Spark")
    session.add_argument("--remote", metavar="URL", help="server of Spark Connect")
    doctor.add_argument("--conf", metavar="NAME=VALUE", type=_setting, action="append", default=[])
    doctor.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    return parser


def show(report: Report) -> str:
    """A report as lines: severity, check, what was found, what to do."""
    return "".join(f"{_line(finding)}\n" for finding in report.findings)


def _line(finding: Finding) -> str:
    remedy = f"  -> {finding.remedy}" if finding.remedy else ""
    return f"{finding.severity:<8}{finding.check}: {finding.found}{remedy}"


def _session(options: argparse.Namespace) -> "SparkSession":
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName("sparkdl doctor")
    if options.master:
        builder = builder.master(options.master)
    if options.remote:
        builder = builder.remote(options.remote)
    for name, value in options.conf:
        builder = builder.config(name, value)
    return builder.getOrCreate()


def _request(options: argparse.Namespace, spark: "SparkSession") -> Request:
    return Request(
        num_train_workers=options.workers or await_slots(spark, 1) or 1,
        device=options.device,
        staging_dir=options.staging_dir,
        checkpoint_dir=options.checkpoint_dir,
        allow_unencrypted_traffic=options.allow_unencrypted_traffic,
    )


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks: use 1 or more")
    return number


def _setting(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is no setting: use NAME=VALUE")
    return name, value


if __name__ == "__main__":
    # spark-submit runs this file by its path, and so puts the modules beside it before all others of the same name.
    from pathlib import Path

    if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        del sys.path[0]
    sys.exit(main())
