"""``/v1/fine_tuning/sweeps``"""

from __future__ import annotations

from api.auth import CallerDep
from api.dependencies import ReadSessionDep, ResourcesDep, WorkDep
from api.routing import Router
from api.sweeps import service
from api.sweeps.schemas import Sweep, SweepCreate

router = Router(prefix="/fine_tuning/sweeps", tags=["fine-tuning"])


@router.post("")
def create_sweep(body: SweepCreate, caller: CallerDep, work: WorkDep, resources: ResourcesDep) -> Sweep:
    """Start a fine-tuning job for each combination of seeds and learning rates."""
    return service.create(work, caller, body=body, settings=resources.settings)


@router.get("/{sweep_id}")
def get_sweep(sweep_id: str, caller: CallerDep, session: ReadSessionDep) -> Sweep:
    """Describe a sweep: its jobs, their losses, and the best of them."""
    return service.get(session, caller, sweep_id)
