"""Runs that follow a job in Weights & Biases, written offline by its own library."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.worker.support import BASE_MODEL, Service, wait_until
from tests.worker.test_supervisor import UseChild, use_child  # noqa: F401 - a fixture
from worker.context import Resources
from worker.tasks.training import train

wandb = pytest.importorskip("wandb")

STEP = (
    "say(type='step', step={step}, total_steps=2, train_loss={loss}, train_mean_token_accuracy=0.5, "
    "learning_rate=0.01, gradient_norm=None, tokens_per_second=9.0, seconds_left=1.0, hits=0, trained_tokens=7)\n"
)
RUN = (
    "say(type='started', total_steps=2)\n"
    + STEP.format(step=1, loss=0.8125)
    + STEP.format(step=2, loss=0.4375)
    + "save('c'); say(type='evaluation', step=2, metrics={'full_valid_loss': 0.3125}, file='c')\ndone()"
)


def target(project: str, **values: object) -> dict[str, object]:
    return {"type": "wandb", "wandb": {"project": project, "name": None, "entity": None, "tags": None} | values}


def offline(service: Service) -> Resources:
    return service.resources(wandb_mode="offline", base_models={BASE_MODEL: "path:/nowhere"})


def written(folder: Path, run_id: str) -> bytes:
    """What the library has written of a run that has ended."""
    found: list[bytes] = []

    def complete() -> bool:
        files = list(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
        found[:] = [file.read_bytes() for file in files]
        return len(found) == 1 and b"full_valid_loss" in found[0]

    wait_until(complete, what=f"the run {run_id} is written")
    return found[0]


def test_measurements_are_followed(service: Service, use_child: UseChild) -> None:  # noqa: F811 - the fixture
    use_child(RUN)
    job_id = service.add_job(integrations=[target("greeters", tags=["of-mine"]), target("others", name="second")])
    train(offline(service), job_id)

    assert service.job(job_id).status == "succeeded"
    folder = service.settings.home / "wandb"
    first, second = written(folder, job_id), written(folder, f"{job_id}-2")
    for expected in (b"greeters", b"of-mine", b"uora/finetune", b"0.8125", b"0.4375", b"0.3125", b"train_loss"):
        assert expected in first, expected
    assert b"others" in second
    assert b"second" in second
    assert b"greeters" not in second


def test_what_goes_wrong_there_is_told_and_changes_nothing(
    service: Service,
    use_child: UseChild,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("the server does not take the key secret-key-of-the-operator")

    monkeypatch.setattr(wandb, "init", refuse)
    wait = "deadline = time.time() + 20\nwhile not Path(GO).exists() and time.time() < deadline: time.sleep(0.02)\n"
    go = service.settings.home / "go"
    use_child("say(type='started', total_steps=2)\n" + wait.replace("GO", repr(str(go))) + "done()")
    job_id = service.add_job(integrations=[target("greeters")])
    held = service.resources(wandb_api_key=SecretStr("secret-key-of-the-operator"))
    monkeypatch.setattr("worker.following.add_event", telling(go))
    train(held, job_id)

    assert service.job(job_id).status == "succeeded"
    (told,) = [event for event in service.events(job_id, "message") if event.level == "warn"]
    assert told.message == "Weights & Biases: RuntimeError: the server does not take the key ***"


def telling(go: Path) -> object:
    """``add_event``, after which the training goes on."""
    from api.jobs.repository import add_event

    def add(*args: object, **values: object) -> None:
        add_event(*args, **values)  # type: ignore[arg-type]
        go.touch()

    return add


def test_a_job_without_integrations_has_no_followers(
    service: Service,
    use_child: UseChild,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.following.WandbRun.__init__", lambda *_: pytest.fail("nobody asked for it"))
    use_child(RUN)
    job_id = service.add_job()
    train(offline(service), job_id)
    assert service.job(job_id).status == "succeeded"
