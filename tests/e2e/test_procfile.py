"""What people run is one thing: the Procfile's commands are those of docker-compose.yml, make and the README."""

from __future__ import annotations

import yaml
from honcho.environ import parse_procfile

from worker.up import ROOT


def test_compose_runs_the_commands_of_the_procfile() -> None:
    processes = parse_procfile((ROOT / "Procfile").read_text()).processes
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {name: services[name]["command"] for name in processes} == dict(processes)


def test_images_run_without_root_and_the_api_has_no_torch() -> None:
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    final = {stage.split(" AS ")[1].split()[0]: stage for stage in stages if " AS " in stage}
    assert all("USER uora" in final[name] for name in ("api", "worker"))
    assert "'.[api]'" in final["api"]


def test_readme_opens_with_the_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    first_block = readme.split("```")[1]
    assert [line.split("#")[0].strip() for line in first_block.splitlines()[1:] if line.strip()] == [
        "make demo",
        "make test",
    ]
    for target in ("demo", "up", "test"):
        assert f"\n{target}:" in makefile
