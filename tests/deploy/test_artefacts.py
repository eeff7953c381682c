"""Checks every file in deploy/ with its own validator; a validator that is not installed is skipped.

The dev extra installs all but systemd-analyze, nginx and caddy, which `.ci/run` takes from the distribution if it can,
and promtool, which is in Debian's package prometheus.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MAX_EXPOSURE = 1.5  # out of ten, by `systemd-analyze security`
SECRET_FILES = ("*.key", "*.bundle", "*.pem")


def tool(name: str) -> str:
    """Returns a program of the virtual environment or of the machine."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/usr/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_install_script_passes_shellcheck() -> None:
    check(tool("shellcheck"), DEPLOY / "install.sh")


def test_the_container_file_passes_hadolint() -> None:
    check(tool("hadolint"), "--failure-threshold=info", DEPLOY / "container" / "Containerfile")


def test_what_the_container_file_copies_exists_and_is_not_ignored() -> None:
    lines = (DEPLOY / "container" / "Containerfile").read_text().splitlines()
    copied = [
        name for line in lines if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    ]
    kept = (DEPLOY / "container" / "Containerfile.dockerignore").read_text().splitlines()
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in kept, name


def test_the_compose_file_follows_the_specification() -> None:
    check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DEPLOY / "container" / "compose.yaml")


def test_every_composed_service_is_confined_and_watched() -> None:
    services: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text())[
        "services"
    ]
    assert services
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["healthcheck"]["test"][:2] == ["CMD", "fedtune"], name


@pytest.mark.parametrize("folder", ["container", "kubernetes", "monitoring"])
def test_yaml_passes_yamllint(folder: str) -> None:
    rules = "{extends: default, rules: {line-length: {max: 140}, document-start: disable}}"
    check(tool("yamllint"), "--strict", "-d", rules, DEPLOY / folder)


@pytest.mark.parametrize(
    "manifest", sorted(path.name for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.stem != "kustomization")
)
def test_kubernetes_knows_every_field_of_the_manifests(manifest: str) -> None:
    check(tool("kubernetes-validate"), "--strict", DEPLOY / "kubernetes" / manifest)


def test_the_kustomization_names_every_manifest_and_its_result_is_valid(tmp_path: Path) -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    there = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == there
    built = tmp_path / "built.yaml"
    built.write_text(check(tool("kubectl"), "kustomize", DEPLOY / "kubernetes"))
    check(tool("kubernetes-validate"), "--strict", built)


def test_the_kubernetes_server_is_one_and_confined() -> None:
    spec = yaml.safe_load((DEPLOY / "kubernetes" / "statefulset.yaml").read_text())["spec"]
    assert spec["replicas"] == 1
    pod = spec["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    for container in [*pod["initContainers"], *pod["containers"]]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("unit", ["fedtune-server.service", "fedtune-client.service", "user/fedtune-client.service"])
def test_systemd_understands_every_line_of_the_units(unit: str, tmp_path: Path) -> None:
    copied = tmp_path / Path(unit).name
    text = (DEPLOY / "systemd" / unit).read_text()
    assert text.count("/bin/fedtune ") == 1
    lines = [f"ExecStart={sys.executable}" if line.startswith("ExecStart=") else line for line in text.splitlines()]
    copied.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", copied], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert Path(unit).name not in done.stderr, done.stderr  # it reports problems of the machine's other units too


@pytest.mark.parametrize("unit", ["fedtune-server.service", "fedtune-client.service"])
def test_the_system_units_leave_little_exposed(unit: str) -> None:
    threshold = f"--threshold={MAX_EXPOSURE * 10:.0f}"
    path = DEPLOY / "systemd" / unit
    check(tool("systemd-analyze"), "security", "--offline=true", "--no-pager", threshold, path)


def test_no_key_lies_in_the_folder() -> None:
    assert [path for pattern in SECRET_FILES for path in DEPLOY.rglob(pattern)] == []


def test_the_alert_rules_pass_promtool_and_fire_when_they_should() -> None:
    monitoring = DEPLOY / "monitoring"
    check(tool("promtool"), "check", "rules", monitoring / "alerts.yaml")
    check(tool("promtool"), "check", "config", monitoring / "prometheus.yaml")
    check(tool("promtool"), "test", "rules", monitoring / "alerts_test.yaml")
