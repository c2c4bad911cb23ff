"""What the preflight hands on: what was asked, what each executor told, what follows from both."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sparkdl.config import CacheTier, Device
from sparkdl.errors import ExecutorPythonError, LaunchError, SlotsError

__all__ = ["DirectoryFacts", "ExecutorFacts", "Finding", "Report", "Request", "Severity"]

Severity = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a fit asks of the cluster.

    Attributes:
        num_train_workers: Ranks.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        staging_dir: URL that all executors must reach and write to; None: ranks spool to their local disks.
        checkpoint_dir: The same for checkpoints.
        storage_options: Credentials for both, see `sparkdl.storage`.
        cache: Where decoded rows are kept.
        allow_unencrypted_traffic: The user knows that gradients travel in the clear.
        min_workers: Ranks that a restart makes do with; None: all of them.
    """

    num_train_workers: int
    device: Device = "auto"
    staging_dir: str | None = None
    checkpoint_dir: str | None = None
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    cache: CacheTier = "auto"
    allow_unencrypted_traffic: bool = False
    min_workers: int | None = None

    @property
    def directories(self) -> dict[str, str]:
        """The directories that were given, by the name of their Param."""
        given = {"stagingDir": self.staging_dir, "checkpointDir": self.checkpoint_dir}
        return {name: url for name, url in given.items() if url is not None}

    @property
    def needs_local_disk(self) -> bool:
        """True where ranks may write rows to the local disks of the executors."""
        return self.cache in ("auto", "disk") or not self.directories


@dataclass(frozen=True, slots=True)
class DirectoryFacts:
    """What one probe task found at a directory that all executors should share.

    Attributes:
        setting: ``"stagingDir"`` or ``"checkpointDir"``.
        url: The directory.
        error: Why the task could not write there; "" if it could.
        peers: Hosts whose markers it saw, its own among them.
        removed: True where it was the last and removed all markers.
    """

    setting: str
    url: str
    error: str = ""
    peers: tuple[str, ...] = ()
    removed: bool = False


@dataclass(frozen=True, slots=True)
class ExecutorFacts:
    """What one probe task found in the Python that runs ranks.

    Attributes:
        host: Name of its host.
        executable: Its Python.
        versions: Version by package, and that of ``"python"``; packages that do not tell theirs are left out.
        missing: Packages that cannot be imported.
        num_gpus: GPUs that torch sees; None where it was not asked.
        disks: Free bytes by local directory.
        directories: What it found at the directories that all executors should share.
    """

    host: str
    executable: str
    versions: Mapping[str, str]
    missing: tuple[str, ...] = ()
    num_gpus: int | None = None
    disks: Mapping[str, int] = field(default_factory=dict)
    directories: tuple[DirectoryFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: Short name of the check.
        severity: ``"error"``: the stage cannot run; ``"warning"``: it can, but not as it should; ``"note"``: worth
            knowing; ``"ok"``.
        found: What was found, as the end of a sentence.
        asked: What was asked, as the beginning of it; "" where nothing was.
        remedy: What to do, with the setting verbatim; "" where nothing is to be done.
    """

    check: str
    severity: Severity
    found: str
    asked: str = ""
    remedy: str = ""

    @property
    def message(self) -> str:
        """What was asked, what was found and what to do, in sentences."""
        if self.asked:
            lead = f"{self.asked}, but {self.found}"
        else:  # a setting or a URL at the beginning stays as it is written
            plain = self.found.partition(" ")[0].rstrip(",;").isalpha()
            lead = self.found[:1].upper() + self.found[1:] if plain else self.found
        return f"{lead}. {self.remedy}." if self.remedy else f"{lead}."


@dataclass(frozen=True, slots=True)
class Report:
    """All that the preflight found.

    Attributes:
        findings: Worst first.
        slots: Tasks that the cluster runs at once; None where Spark does not tell.
        executors: One entry for each Python on each host that the probe reached.
    """

    findings: tuple[Finding, ...]
    slots: int | None = None
    executors: tuple[ExecutorFacts, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What keeps the stage from running."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What keeps it from running as it should."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    def raise_errors(self) -> None:
        """Raise one error for all findings that are errors.

        Raises:
            SlotsError: All are about slots.
            ExecutorPythonError: All are about the executors' Python.
            LaunchError: Else.
        """
        errors = self.errors
        if not errors:
            return
        checks = {finding.check for finding in errors}
        kind: type[LaunchError] = LaunchError
        if checks == {"slots"}:
            kind = SlotsError
        elif checks <= {"Python", "packages"}:
            kind = ExecutorPythonError
        if len(errors) == 1:
            raise kind(errors[0].message)
        listed = "".join(f"\n{number}. {finding.message}" for number, finding in enumerate(errors, 1))
        raise kind(f"The cluster cannot run this for {len(errors)} reasons:{listed}")

    def as_dict(self) -> dict[str, Any]:
        """The report in the types of JSON."""
        return asdict(self)
