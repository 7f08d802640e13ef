"""What people run is one thing: the Procfile's commands are those of docker-compose.yml, make and the README."""

from __future__ import annotations

import socket
from typing import Any

import yaml
from honcho.environ import parse_procfile

from api.settings import Settings
from worker.up import ROOT, make_manager, plan_engines, threads_per_engine


def test_compose_runs_the_commands_of_the_procfile() -> None:
    processes = parse_procfile((ROOT / "Procfile").read_text()).processes
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {name: services[name]["command"] for name in processes} == dict(processes)


def make_settings(**values: Any) -> Settings:
    return Settings(_env_file=None, engine_token="x", **values)


def test_an_engine_runs_for_each_base_model() -> None:
    settings = make_settings(base_models={"a": "known:a", "b": "known:b"}, engine_replicas=2)
    manager = make_manager(host="127.0.0.1", port=8000, settings=settings)
    commands = dict(parse_procfile((ROOT / "Procfile").read_text()).processes)
    processes = manager._processes
    assert processes.keys() == {"api", "trainer", "sweeper", "webhooks", "engine.1", "engine.2", "engine.3", "engine.4"}
    for name, process in processes.items():
        assert process["obj"].cmd == f"exec {commands[name.partition('.')[0]]}"
    environments = [processes[f"engine.{number}"]["obj"].env for number in range(1, 5)]
    assert [env["UORA_ENGINE_BASE_MODEL"] for env in environments] == ["a", "a", "b", "b"]
    assert [env["UVICORN_PORT"] for env in environments] == ["8001", "8002", "8003", "8004"]
    assert environments[3]["UORA_ENGINE_ADVERTISE_URL"] == "http://127.0.0.1:8004"
    assert {env["UORA_TORCH_THREADS"] for env in environments} == {str(threads_per_engine(settings, engines=4))}


def test_a_chosen_base_model_is_served_alone() -> None:
    settings = make_settings(base_models={"a": "known:a", "b": "known:b"}, engine_base_model="b")
    assert [(engine.name, engine.base_model, engine.port) for engine in plan_engines(settings)] == [
        ("engine", "b", 8001)
    ]
    assert threads_per_engine(settings, engines=1) == 0
    assert threads_per_engine(make_settings(torch_threads=3), engines=2) == 3


def test_processes_of_a_machine_have_their_own_ports_for_metrics() -> None:
    manager = make_manager(host="127.0.0.1", port=8000, settings=make_settings(metrics_port=9100))
    ports = {name: process["obj"].env.get("UORA_METRICS_PORT") for name, process in manager._processes.items()}
    assert ports == {"api": None, "engine": None, "trainer": "9100", "sweeper": "9101", "webhooks": "9102"}


def test_engines_of_compose_can_be_many() -> None:
    engine = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["engine"]
    assert not engine.keys() & {"ports", "container_name", "hostname"}
    advertised = make_settings(engine_advertise_url=engine["environment"]["UORA_ENGINE_ADVERTISE_URL"])
    port = engine["environment"]["UVICORN_PORT"]
    assert advertised.engine_advertise_url == f"http://{socket.gethostname()}:{port}"


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
    assert "'.[api,tracing]'" in final["api"]


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
