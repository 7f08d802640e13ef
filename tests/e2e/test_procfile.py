"""What people run is one thing: the Procfile's commands are those of docker-compose.yml, make and the README."""

from __future__ import annotations

import yaml
from honcho.environ import parse_procfile

from api.settings import Settings
from worker.up import ROOT


def test_compose_runs_the_commands_of_the_procfile() -> None:
    processes = parse_procfile((ROOT / "Procfile").read_text()).processes
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {name: services[name]["command"] for name in processes} == dict(processes)


def test_a_trainer_has_the_time_to_keep_its_state() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    settings = Settings(_env_file=None, engine_token="x")
    assert (
        int(services["trainer"]["stop_grace_period"].removesuffix("s"))
        > (settings.pause_grace + settings.stop_grace).total_seconds()
    )


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
