"""The official openai client against the running service: real trainer, real engine, a tiny Llama."""

from __future__ import annotations

import csv
import io
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from tests.e2e.support import (
    EMBEDDED,
    ENDED,
    ON_SERVERS,
    SYSTEM,
    Running,
    ask,
    chat_rows,
    service,
    upload,
    wait_for,
    wait_job,
)

WORDS = ["sun", "moon", "rain", "snow", "wind", "leaf", "rock", "sand"]
#: A tiny random model learns to begin with the right letter, and no more.
DAY = chat_rows([(word, "day") for word in WORDS] * 4)
NIGHT = chat_rows([(word, "night") for word in WORDS] * 4)
QUICK = {"n_epochs": 12, "batch_size": 8}


def tune(client: openai.OpenAI, rows: bytes, **options: object) -> openai.types.fine_tuning.FineTuningJob:
    """Train on ``rows`` for some seconds."""
    fields = {"hyperparameters": QUICK, "seed": 1} | options
    return client.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(client, rows),
        extra_body={"peft": {"method": "uora", "r": 16, "learning_rate": 0.1}},
        **fields,  # type: ignore[arg-type]
    )


def test_two_tenants_tune_and_ask(running: Running) -> None:
    sunny, gloomy = running.client("sunny"), running.client("gloomy")
    first = tune(sunny, DAY, validation_file=upload(sunny, DAY), suffix="Weather", metadata={"k": "v"})
    second = tune(gloomy, NIGHT)
    assert first.status == "validating_files"
    day, night = wait_job(sunny, first.id), wait_job(gloomy, second.id)
    for job in (day, night):
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model
        assert job.trained_tokens
        assert job.finished_at
    assert day.fine_tuned_model == f"ft:tiny:sunny:Weather:{day.id[-8:]}"
    assert day.method
    assert day.method.supervised
    assert day.method.supervised.hyperparameters
    assert day.method.supervised.hyperparameters.n_epochs == 12

    # Each model answers at once and for its own project; the base model is as it was.
    assert ask(sunny, day.fine_tuned_model, "moon", max_tokens=1) == "d"
    assert ask(gloomy, night.fine_tuned_model or "", "moon", max_tokens=1) == "n"
    assert ask(sunny, "tiny", "moon", max_tokens=1) not in ("d", "n")
    for client, foreign in ((sunny, night.fine_tuned_model), (gloomy, day.fine_tuned_model)):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(client, foreign or "", "moon")
        assert refused.value.code == "model_not_found"

    # Streaming gives the same text.
    stream = sunny.chat.completions.create(
        model=day.fine_tuned_model,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": "sun"}],
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ask(
        sunny, day.fine_tuned_model, "sun"
    )
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens > 0

    # What the dashboard reads.
    events = list(sunny.fine_tuning.jobs.list_events(day.id, limit=100))
    steps = [event for event in events if event.type == "metrics"]
    assert steps
    assert {"step", "train_loss"} <= steps[0].data.keys()  # type: ignore[union-attr]
    assert any("completed" in event.message for event in events)
    checkpoints = list(sunny.fine_tuning.jobs.checkpoints.list(day.id))
    assert checkpoints
    newest, oldest = checkpoints[0], checkpoints[-1]
    assert newest.step_number > oldest.step_number
    assert (newest.metrics.valid_loss or 99) < (oldest.metrics.valid_loss or 0)
    assert ask(sunny, newest.fine_tuned_model_checkpoint, "rain", max_tokens=1) == "d"

    # The model is a row: deleted, it is gone.
    assert day.fine_tuned_model in [model.id for model in sunny.models.list()]
    assert sunny.models.delete(day.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        ask(sunny, day.fine_tuned_model, "moon")
    with pytest.raises(openai.NotFoundError):
        ask(sunny, newest.fine_tuned_model_checkpoint, "rain")


#: Rates at which a tiny random model learns its word within a few seconds.
RATES = {"uora": 0.1, "vera": 0.03, "lora": 0.02, "olora": 0.005, "osora": 0.1}


@pytest.mark.timeout(600)
@ON_SERVERS
def test_five_methods_tune_and_answer_together(running: Running) -> None:
    client = running.client("curious")
    file_id = upload(client, DAY)
    jobs = {
        method: client.fine_tuning.jobs.create(
            model="tiny",
            training_file=file_id,
            seed=1,
            hyperparameters={"n_epochs": 8, "batch_size": 8},
            extra_body={"peft": {"method": method, "r": 16, "learning_rate": rate}},
        )
        for method, rate in RATES.items()
    }
    models = {}
    for method, created in jobs.items():
        job = wait_job(client, created.id, seconds=240)
        assert job.status == "succeeded", (method, job.error)
        assert job.adapter["method"] == method  # type: ignore[attr-defined]
        models[method] = job.fine_tuned_model or ""
    names = [*models.values(), "tiny"]
    alone = [ask(client, name, "moon") for name in names]
    assert [answer[:1] for answer in alone[:-1]] == ["d"] * len(RATES)
    assert alone[-1][:1] != "d"
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: ask(client, name, "moon"), names))
    assert together == alone


@EMBEDDED
def test_a_bad_row_fails_the_job_before_training(running: Running) -> None:
    client = running.client("careless")
    bad = DAY + b'{"messages": [{"role": "user", "content": "no answer"}]}\n'
    job = wait_job(client, tune(client, bad).id)
    assert job.status == "failed"
    assert job.error
    assert f"Line {len(DAY.splitlines()) + 1}" in job.error.message
    assert job.error.param == "training_file"
    assert job.trained_tokens is None
    assert not [model for model in client.models.list() if model.id.startswith("ft:")]


def long_job(client: openai.OpenAI) -> str:
    """A job that trains for minutes if nothing stops it."""
    rows = chat_rows([(word, "day") for word in WORDS] * 100)
    job = tune(client, rows, hyperparameters={"n_epochs": 50, "batch_size": 1})
    wait_job(client, job.id, until=("running",))
    wait_for(lambda: (getattr(client.fine_tuning.jobs.retrieve(job.id), "progress", None) or {}).get("step"))
    return job.id


def children(running: Running) -> list[psutil.Process]:
    """Training processes; the spare one, which waits for a job, has no work folder yet."""
    found = psutil.Process(running.process.pid).children(recursive=True)
    return [process for process in found if "worker.child" in " ".join(process.cmdline()) and process.cwd() != "/"]


@ON_SERVERS
def test_cancel_stops_the_training_process(running: Running) -> None:
    client = running.client("hasty")
    job_id = long_job(client)
    (child,) = children(running)
    asked = time.monotonic()
    client.fine_tuning.jobs.cancel(job_id)
    child.wait(timeout=5)  # the promise: within 5 seconds
    assert time.monotonic() - asked < 5
    assert wait_job(client, job_id).status == "cancelled"
    assert not [model for model in client.models.list() if model.id.startswith("ft:")]


@ON_SERVERS
def test_a_paused_job_goes_on_where_it_stopped(running: Running) -> None:
    client = running.client("calm")
    rows = chat_rows([(word, "day") for word in WORDS] * 20)
    job = tune(client, rows, hyperparameters={"n_epochs": 20, "batch_size": 8}, validation_file=upload(client, DAY))
    wait_for(lambda: (client.fine_tuning.jobs.retrieve(job.id).progress or {}).get("step"))  # type: ignore[attr-defined]
    client.fine_tuning.jobs.pause(job.id)
    paused = wait_job(client, job.id, until=("paused", *ENDED))
    assert paused.status == "paused"
    assert not children(running)
    step = paused.progress["step"]  # type: ignore[attr-defined]
    client.fine_tuning.jobs.resume(job.id)
    done = wait_job(client, job.id)
    assert done.status == "succeeded", done.error

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=1000))
    assert f"Resuming from step {step}" in [event.message for event in events]
    (file_id,) = done.result_files
    table = list(csv.DictReader(io.StringIO(client.files.content(file_id).text)))
    assert [int(line["step"]) for line in table] == sorted({int(line["step"]) for line in table})
    assert int(table[-1]["step"]) == 400
    assert float(table[-1]["valid_loss"]) < float(table[0]["train_loss"])

    # The best checkpoint answers under the model's own name, and another job starts from there.
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    first = checkpoints[-1]
    promoted = client.post(
        f"/fine_tuning/jobs/{job.id}/checkpoints/{first.id}/promote", cast_to=FineTuningJobCheckpoint
    )
    assert promoted.id == first.id
    model = done.fine_tuned_model or ""
    assert ask(client, model, "moon") == ask(client, first.fine_tuned_model_checkpoint, "moon")
    further = client.fine_tuning.jobs.create(
        model=model,
        training_file=upload(client, NIGHT),
        seed=1,
        hyperparameters=QUICK,
        extra_body={"peft": {"learning_rate": 0.1}},
    )
    night = wait_job(client, further.id)
    assert night.status == "succeeded", night.error
    assert night.model == model
    assert ask(client, night.fine_tuned_model or "", "moon", max_tokens=1) == "n"


@ON_SERVERS
def test_a_killed_training_process_is_reported_and_the_service_goes_on(running: Running) -> None:
    client = running.client("unlucky")
    job_id = long_job(client)
    for child in children(running):
        child.send_signal(signal.SIGKILL)
    job = wait_job(client, job_id)
    assert job.status == "failed"
    assert job.error
    assert "memory" in job.error.message
    quick = wait_job(client, tune(client, DAY).id)
    assert quick.status == "succeeded"


def test_ready_names_its_parts(running: Running) -> None:
    import httpx

    assert httpx.get(f"{running.url}/healthz").status_code == 200
    assert httpx.get(f"{running.url}/readyz").json()["status"] == "ready"


def test_a_second_start_finds_the_data_of_the_first(tmp_path: Path, base_models: dict[str, str]) -> None:
    options = {"UORA_CACHE_DIR": str(tmp_path / "cache"), "UORA_DTYPE": "float32", "UORA_TORCH_THREADS": "1"}
    options |= {"UORA_SWEEP_INTERVAL": "PT1S", "UORA_SPARE_TRAINER": "false"}
    with service(tmp_path / "home", base_models, **options) as first:
        client = first.client("patient")
        file_id = upload(client, DAY)
        job_id = long_job(client)
        wait_for(lambda: "Your key, shown only now" in first.log.read_text())
    with service(tmp_path / "home", base_models, **options) as second:
        again = openai.OpenAI(base_url=f"{second.url}/v1", api_key=client.api_key)
        assert again.files.retrieve(file_id).bytes == len(DAY)
        assert again.files.content(file_id).content == DAY
        wait_for(
            lambda: any(
                event.message.startswith("Resuming from step ")
                for event in again.fine_tuning.jobs.list_events(job_id, limit=100)
            )
        )
        again.fine_tuning.jobs.cancel(job_id)
        wait_for(lambda: "your key is the one shown at the first start" in second.log.read_text())
    assert second.log.read_text().count("Your key, shown only now") == 1
