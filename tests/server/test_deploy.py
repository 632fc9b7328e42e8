"""The files in deploy/ name options and routes that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalith.cli import run
from megalith.commands.serve import serve
from megalith.runtime.server.app import ROUTES

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
OPTIONS = {name for option in serve.params for name in option.opts}


def test_the_configuration_is_accepted(model: Path) -> None:
    assert run(["serve", str(model), "--config", str(DEPLOY / "serve.toml"), "--dry-run"]) == 0


@pytest.mark.parametrize("name", ["megalith.service", "Dockerfile", "kubernetes.yaml"])
def test_options_exist(name: str) -> None:
    text = (DEPLOY / name).read_text()
    used = set(re.findall(r"(?<![\w-])--(?:api-key|drain|host|config|port|max|verify)[a-z-]*", text))
    assert used
    assert used <= OPTIONS


def test_the_manifest_probes_routes_that_need_no_key() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod: Any = deployment["spec"]["template"]
    container = pod["spec"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert ROUTES[container[probe]["httpGet"]["path"]].is_open
    drain = float(container["args"][container["args"].index("--drain-timeout") + 1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > drain + 5
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "megalith.service").read_text().replace("/opt/megalith/bin/megalith", "/bin/true")
    (tmp_path / "megalith.service").write_text(text)
    subprocess.run(["systemd-analyze", "verify", tmp_path / "megalith.service"], check=True, capture_output=True)
