"""Models through the official client."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from api.jobs.models import JobStatus
from api.models.models import Adapter
from api.models.service import checkpoint_name, model_name
from tests.api.adapters import make_adapter
from tests.api.rows import add_adapter, add_job
from tests.api.support import ROOT, Service
from uora.artifact import loads
from uora.convert import write_lora
from uora.spec import MethodName


@dataclass(frozen=True)
class Tuned:
    """A job's models: the final one and two checkpoints."""

    job_id: str
    final: str
    first: str
    second: str

    @property
    def names(self) -> tuple[str, str, str]:
        return self.final, self.first, self.second


@pytest.fixture
def tuned(service: Service) -> Tuned:
    """Models of the first project, on a base model whose name has a slash."""
    with service.sessions.begin() as session:
        job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED, model="org/slashed")
        names = [add_adapter(session, service.tenant, job, step=step).id for step in (None, 5, 10)]
    return Tuned(job.id, *names)


def test_names_follow_openais_form() -> None:
    name = model_name("org/slashed", slug="acme", suffix=None, job_id="ftjob-0123abcd4567")
    assert name == "ft:org/slashed:acme::abcd4567"
    assert checkpoint_name(name, step=5) == "ft:org/slashed:acme::abcd4567:ckpt-step-5"
    assert model_name("tiny", slug="a", suffix="tone", job_id="ftjob-0123abcd4567") == "ft:tiny:a:tone:abcd4567"


def test_the_list_has_base_models_and_final_ones(service: Service, client: OpenAI, tuned: Tuned) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", "org/slashed", tuned.final}
    assert models[tuned.final].owned_by == service.tenant.slug
    assert models[tuned.final].parent == models[tuned.final].root == "org/slashed"  # type: ignore[attr-defined]
    assert models["tiny"].parent is None  # type: ignore[attr-defined]
    assert {model.id for model in service.client(service.stranger).models.list()} == {"tiny", "org/slashed"}


def test_a_model_says_what_it_was_trained_from(service: Service, client: OpenAI, tuned: Tuned) -> None:
    """Also when that is not there any more."""
    with service.sessions.begin() as session:
        job = add_job(
            session,
            service.tenant,
            status=JobStatus.SUCCEEDED,
            model=tuned.first,
            base_model="org/slashed",
            warm_start=tuned.first,
        )
        name = add_adapter(session, service.tenant, job).id
    for _ in range(2):
        found = client.models.retrieve(name)
        assert (found.parent, found.root) == (tuned.first, "org/slashed")  # type: ignore[attr-defined]
        if tuned.first in {each.fine_tuned_model_checkpoint for each in checkpoints(client, tuned)}:
            client.models.delete(tuned.final)
    assert checkpoints(client, tuned) == []


def checkpoints(client: OpenAI, tuned: Tuned) -> list[FineTuningJobCheckpoint]:
    return list(client.fine_tuning.jobs.checkpoints.list(tuned.job_id))


def test_each_model_is_found_by_its_name(client: OpenAI, tuned: Tuned) -> None:
    for name in (*tuned.names, "tiny", "org/slashed"):
        found = client.models.retrieve(name)
        assert (found.id, found.object) == (name, "model")


def test_deleting_a_final_model_deletes_its_checkpoints(client: OpenAI, tuned: Tuned) -> None:
    deleted = client.models.delete(tuned.final)
    assert (deleted.id, deleted.deleted, deleted.object) == (tuned.final, True, "model")
    for name in tuned.names:
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"
    assert list(client.fine_tuning.jobs.checkpoints.list(tuned.job_id)) == []


def test_deleting_a_checkpoint_leaves_the_rest(client: OpenAI, tuned: Tuned) -> None:
    client.models.delete(tuned.first)
    assert client.models.retrieve(tuned.final).id == tuned.final
    checkpoints = client.fine_tuning.jobs.checkpoints.list(tuned.job_id)
    assert [checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints] == [tuned.second]


def test_a_base_model_cannot_be_deleted(client: OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")


def test_a_name_of_another_project_is_unknown(service: Service, tuned: Tuned) -> None:
    stranger = service.client(service.stranger)
    for name in (tuned.final, tuned.first, "nothing"):
        for call in (stranger.models.retrieve, stranger.models.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                call(name)
            assert caught.value.code == "model_not_found"
    assert service.client().models.retrieve(tuned.final).id == tuned.final


def store(service: Service, name: str, content: bytes) -> str:
    """Let a model have a real adapter; its digest."""
    digest = loads(content).manifest.digest
    with service.sessions.begin() as session:
        row = session.query(Adapter).filter_by(id=name).one()
        row.artifact, row.digest = content, digest
    return digest


def test_an_adapter_is_downloaded_as_it_is_stored(service: Service, tuned: Tuned) -> None:
    digest = store(service, tuned.final, make_adapter())
    answer = service.http().get(f"/v1/models/{tuned.final}/adapter")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/octet-stream")
    assert answer.content == make_adapter()
    assert answer.headers["etag"] == f'"{digest}"'
    named = re.sub("[:/]+", "-", tuned.final)
    assert answer.headers["content-disposition"] == f'attachment; filename="{named}.safetensors"'
    assert service.http().get(f"/v1/models/{tuned.first}/adapter").content == b"vectors of 5"


@pytest.mark.parametrize("method", ["uora", "vera", "lora", "olora"])
def test_an_adapter_is_downloaded_as_lora(service: Service, tuned: Tuned, method: MethodName, tmp_path: Path) -> None:
    digest = store(service, tuned.final, make_adapter(method))
    answers = [service.http().get(f"/v1/models/{tuned.final}/adapter", params={"format": "lora"}) for _ in range(2)]
    assert answers[0].headers["content-type"] == "application/zip"
    assert answers[0].headers["etag"] == f'"{digest}-lora"'
    assert answers[0].headers["content-disposition"].endswith('-lora.zip"')
    assert answers[0].content == answers[1].content
    with zipfile.ZipFile(io.BytesIO(answers[0].content)) as archive:
        archive.extractall(tmp_path / "downloaded")
    write_lora(loads(make_adapter(method)), tmp_path / "written")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "downloaded" / name).read_bytes() == (tmp_path / "written" / name).read_bytes()


@pytest.mark.parametrize(
    ("content", "form", "dtype"),
    [
        (lambda: make_adapter("osora"), "lora", None),
        (lambda: make_adapter(r=64, size=600_000), "lora", None),  # a LoRA of 307 MB
        (make_adapter, "merged", "bfloat16"),
    ],
)
def test_what_needs_the_base_model_or_much_memory_is_made_by_an_engine(
    service: Service, tuned: Tuned, content: Callable[[], bytes], form: str, dtype: str | None
) -> None:
    digest = store(service, tuned.final, content())
    service.engine.lines = ["a zip", "in pieces"]
    query = {"format": form} | ({"dtype": dtype} if dtype else {})
    answer = service.http().get(f"/v1/models/{tuned.final}/adapter", params=query)
    assert (answer.status_code, answer.content) == (200, b"a zip\nin pieces\n")
    assert answer.headers["etag"] == f'"{"-".join([digest, form, *([dtype] if dtype else [])])}"'
    asked = service.engine.requests[-1]
    assert asked == {
        "base_model": "org/slashed",
        "adapter": tuned.final,
        "digest": digest,
        "form": form,
        "dtype": dtype,
    }


def test_only_merged_models_have_a_dtype(service: Service, tuned: Tuned) -> None:
    store(service, tuned.final, make_adapter())
    answer = service.http().get(f"/v1/models/{tuned.final}/adapter", params={"format": "lora", "dtype": "float16"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "dtype")


def test_loras_are_made_without_torch() -> None:
    script = (
        "import sys\n"
        "from tests.api.adapters import make_adapter\n"
        "from uora.artifact import loads\n"
        "from uora.convert import lora_files\n"
        "for method in ('uora', 'vera', 'lora', 'olora'):\n"
        "    assert lora_files(loads(make_adapter(method)))\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_base_model_has_no_adapter(service: Service) -> None:
    answer = service.http().get("/v1/models/org/slashed/adapter")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_an_unknown_format(service: Service, tuned: Tuned) -> None:
    answer = service.http().get(f"/v1/models/{tuned.final}/adapter", params={"format": "gguf"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "format")
