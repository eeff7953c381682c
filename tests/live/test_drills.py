"""The drills of docs/operations.md: its own command lines, run one after the other on a fleet that is at work."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from live_helpers import SMALL, Fleet, eventually

from fedtune.client.live.device_home import ClientHome
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.demo import JOB
from fedtune.server.live.enrolled_devices import waiting
from fedtune.server.run_directory import read_rounds

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[2] / "docs" / "operations.md"
LONG = 300.0
ALL = "federation.clients_per_round=1.0"
UNSCORED = ("data.holdout=0", "data.evaluation=''")
NEXT_VERSION = "import fedtune.core.protocol.messages as messages; messages.PROTOCOL_VERSION += 1"


def block(section: str, command: str) -> list[str]:
    """Returns the lines of the guide's code block that has this command, in this section."""
    text = GUIDE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    (found,) = [lines for lines in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) if command in lines]
    return str(found).splitlines()


class Site:
    """The server's machine, the owner's, and a device's, as folders; people carry files between the first two."""

    def __init__(self, folder: Path) -> None:
        self.cloud, self.desk = folder / "cloud", folder / "desk"
        for machine in (self.cloud / ".fedtune", self.desk):
            machine.mkdir(parents=True)
        self.fleet = Fleet(self.cloud / ".fedtune", 4, config={"wait_seconds": 30.0})
        self.fleet.join()
        self.kitchen = self.fleet.names[0]
        self.runs = 0

    def follow(self, lines: Sequence[str]) -> str:
        """Runs lines of the guide, each on the machine that it is for, and returns what they printed."""
        return "".join(map(self._run, lines))

    def begin(self, rounds: int) -> Path:
        """Has the owner sign the next job, submits it, and returns its run directory."""
        self.runs += 1
        settings = (*SMALL, ALL, *UNSCORED, f"federation.run={self.runs}", f"federation.rounds={rounds}")
        (self.desk / "job.toml").write_text(dump_job(load_job(JOB, settings)))
        name = f"job-{self.runs}"
        self.follow(
            (
                f"fedtune fleet sign job.toml --name {name} --out job.manifest",
                "fedtune server submit job.toml --manifest job.manifest",
            )
        )
        return self.fleet.home.path / "runs" / name

    def under_way(self, run: Path, rounds: int) -> list[dict[str, Any]]:
        """Waits for a number of rounds, and returns them."""
        eventually(lambda: (run / "rounds.jsonl").exists() and len(read_rounds(run)) >= rounds, LONG, self.fleet.logs)
        return read_rounds(run)[:rounds]

    def device(self, name: str) -> ClientHome:
        return ClientHome(self.fleet.client_home(name))

    def devices(self) -> list[dict[str, Any]]:
        """Returns the devices' states as the server tells them."""
        return list(self.fleet.status()["devices"].values())

    def _run(self, line: str) -> str:
        if line.split("#")[0].strip() == "fedtune server start":
            self.fleet.start_server()
            return ""
        programs = Path(sys.executable).parent
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDTUNE_")}
        environment = kept | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        place = self.cloud
        environment["HOME"] = str(self.cloud)
        if line.startswith("fedtune client"):
            environment["FEDTUNE_CLIENT_HOME"] = str(self.fleet.client_home(self.kitchen))
            line = line.replace("--name kitchen", f"--name {self.kitchen}")
            line = line.replace("invitation.json", str(self.fleet.home.path / "invitation.json"))
            line = line.replace("mine.jsonl", str(self.fleet.folder / "data" / "clients" / f"{self.kitchen}.jsonl"))
        elif line.startswith("fedtune fleet"):
            place = self.desk
            environment |= {"HOME": str(self.desk), "FEDTUNE_FLEET_HOME": str(self.fleet.folder / "owner")}
            line = line.replace("revoke kitchen", f"revoke {self.kitchen}")
            carry(self.fleet.home.path / "requests", self.desk)
        else:
            carry(self.fleet.folder / "owner" / "fleet.jsonl", self.cloud)
            for path in self.desk.glob("job.*"):
                carry(path, self.cloud)
        done = subprocess.run(
            ["bash", "-e", "-c", line],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONG,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}\n{self.fleet.logs()}"
        if line == "fedtune server stop" and self.fleet.server is not None:
            assert self.fleet.server.ended() == 0
        return done.stdout


def carry(path: Path, folder: Path) -> None:
    """Copies a file or a folder into another machine's folder."""
    if path.is_dir():
        shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
    elif path.exists():
        shutil.copy(path, folder)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Makes a fleet at work, on which all drills run in turn."""
    made = Site(tmp_path_factory.mktemp("site"))
    made.fleet.start_server()
    made.fleet.start_devices()
    made.fleet.finished(made.begin(rounds=1), LONG)
    yield made
    made.fleet.close()


def test_a_server_is_restored_from_its_backup_and_its_job_goes_on(site: Site) -> None:
    fleet = site.fleet
    run = site.begin(rounds=6)
    before = site.under_way(run, 2)
    site.follow(block("Backup and restore", "tar --create"))
    with tarfile.open(site.cloud / "backup.tar.gz") as archive:
        assert {name.split("/")[0] for name in archive.getnames()} == {"server"}
        assert not [name for name in archive.getnames() if "fleet.key" in name or "link.db" in name]
    site.follow(("fedtune fleet renew", "fedtune server publish fleet.jsonl"))
    eventually(lambda: {site.device(name).fleet.number for name in fleet.names} == {3}, LONG, fleet.logs)
    assert fleet.server is not None
    fleet.server.kill()
    shutil.rmtree(fleet.home.path)

    restore = block("Backup and restore", "tar --extract")
    site.follow([line for line in restore if "publish" not in line])
    eventually(lambda: all("log is older" in device["dropped"] for device in site.devices()), LONG, fleet.logs)
    site.follow(("fedtune server stop", *restore))
    lines = fleet.finished(run, LONG)
    assert lines[:2] == before
    assert [line["round"] for line in lines] == list(range(1, 7))
    assert lines[-1]["survivors"] == fleet.names


def test_a_renewed_certificate_is_another_one_and_devices_notice_nothing(site: Site) -> None:
    fleet = site.fleet
    address = ("localhost", fleet.port)
    run = site.begin(rounds=4)
    site.under_way(run, 1)
    old = ssl.get_server_certificate(address)
    (row,) = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `server.key` |")]
    renew = re.findall("`(fedtune [^`]+)`", row)
    assert len(renew) == 1
    site.follow((*renew, "fedtune server stop", "fedtune server start"))
    lines = fleet.finished(run, LONG)
    assert ssl.get_server_certificate(address) != old
    assert lines[-1]["survivors"] == fleet.names
    assert fleet.status()["certificate_days_left"] > 390


def test_devices_follow_a_rotated_fleet_key_and_an_interrupted_job_goes_on_once_it_is_signed_again(site: Site) -> None:
    fleet = site.fleet
    run = site.begin(rounds=4)
    before = site.under_way(run, 1)
    old = site.device(site.kitchen).fleet.key
    lines = block("Keys and certificates", "fedtune fleet rotate")
    named = f" --name {run.name} --out job.manifest"
    site.follow([line.replace("sign job.toml", f"sign job.toml{named}") for line in lines])
    rounds = fleet.finished(run, LONG)
    assert rounds[: len(before)] == before
    assert rounds[-1]["survivors"] == fleet.names
    assert len({site.device(name).fleet.key for name in fleet.names} | {old}) == 2
    assert site.device(site.kitchen).fleet.key != old


def test_a_device_whose_keys_are_replaced_is_a_device_again(site: Site) -> None:
    fleet = site.fleet
    before = site.device(site.kitchen).identity.public
    revoke, leave, join = block("Keys and certificates", "fedtune client leave")
    site.follow((revoke, "fedtune server publish fleet.jsonl"))
    eventually(lambda: site.kitchen not in fleet.status()["devices"], LONG, fleet.logs)
    site.follow((leave,))
    assert fleet.devices[site.kitchen].ended() == 0
    site.follow((join,))
    fleet.start_device(site.kitchen)
    request = site.device(site.kitchen).request
    assert request is not None
    eventually(lambda: waiting(fleet.home) == [request], LONG, fleet.logs)
    owner = block("The fleet's owner", "fedtune fleet approve")
    site.follow([line for line in owner if "fleet approve" in line or "server publish" in line])
    run = site.begin(rounds=1)
    assert fleet.finished(run, LONG)[-1]["survivors"] == fleet.names
    assert site.device(site.kitchen).identity.public != before


def test_after_an_upgrade_an_interrupted_job_goes_on_with_the_devices_of_the_new_version_beside_one_of_the_old(
    site: Site,
) -> None:
    fleet = site.fleet
    run = site.begin(rounds=4)
    before = site.under_way(run, 1)
    stop, *installs, start = [line for line in block("Upgrade", "server stop") if "install.sh" not in line]
    assert [line.split()[:2] for line in installs] == [["sh", "deploy/locked.sh"]]  # tests/deploy runs the scripts
    assert start.startswith("fedtune server start")
    site.follow((stop,))
    old, *others = fleet.names
    for name in others:
        assert fleet.devices[name].stop() == 0
        fleet.start_device(name, before=NEXT_VERSION)
    fleet.start_server(before=NEXT_VERSION)
    rounds = fleet.finished(run, LONG)
    assert rounds[: len(before)] == before
    assert [line["round"] for line in rounds] == [1, 2, 3, 4]
    assert rounds[-1]["survivors"] == others
    eventually(lambda: fleet.device_status(old)["state"] == "connected", LONG, fleet.logs)
    run = site.begin(rounds=1)
    assert fleet.finished(run, LONG)[-1]["survivors"] == others
    advice = "Install the same fedtune version on server and clients"
    assert any(old in each["text"] and advice in each["text"] for each in fleet.status()["problems"])
    assert advice in fleet.device_status(old)["problem"]
