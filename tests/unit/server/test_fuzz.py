"""Whatever the OpenAPI document allows or forbids is answered as it says, and the engine answers after it."""

from __future__ import annotations

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from megatron_npr.server.http.app import Settings
from megatron_npr.server.served_model import ServedModel
from tests.support.patience import SECONDS
from tests.unit.server.conftest import another
from tests.unit.server.running import eventually, running

KEY = {"Authorization": "Bearer secret"}
BOUNDED = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # a failure need not be small to be read
    suppress_health_check=list(HealthCheck),
)
"""What a schema cannot say may be refused though the schema allows it: the vocabulary's size, constrain without branching."""


def statuses(operation: APIOperation, mode: GenerationMode) -> set[int]:
    """Status codes of the answers to generated requests, each of which is what the document says."""
    seen: set[int] = set()

    @BOUNDED
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.pop("model", None)  # else nearly all ask for a model that is not there
        response = case.call(headers=KEY, timeout=SECONDS)
        seen.add(response.status_code)
        case.validate_response(response, headers=KEY, excluded_checks=[positive_data_acceptance])

    ask()
    return seen


def test_the_server_answers_as_its_openapi_document_says(demo: ServedModel) -> None:
    with running(another(demo), Settings(max_tokens=12, api_key="secret"), max_in_flight=4096) as server:
        document = httpx.get(f"{server.url}/openapi.json", headers=KEY).json()
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=server.url)
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == 6
        for operation in operations:
            positive = statuses(operation, GenerationMode.POSITIVE)
            if operation.body:  # without one nothing can be sent that the document forbids
                assert 200 in positive
                assert 400 in statuses(operation, GenerationMode.NEGATIVE)
        eventually(server.is_idle)
        body = {"prompt": "Sort", "max_tokens": 5}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=KEY).status_code == 200
