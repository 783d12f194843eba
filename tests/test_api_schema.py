"""Whatever a program sends to the API, nothing breaks, and it is answered as the schema says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.test_people import entered, token, user
from tests.web_studies import Ward, configured
from triage import policies
from triage.domain import Permission, Role, Status

EXAMPLES = 10
CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance),
    *(response_headers_conformance, response_schema_conformance),
]
THERE_IS = {
    "study_instance_uid": st.sampled_from(["1.1", "1.2", "1.3"]),
    "name": st.sampled_from(["jane", "Mine"]),
    "token_id": st.just(1),
    "upload_id": st.just(1),
    "destination": st.just("PACS"),
}
"""Values for the paths that are not made up."""
ENDLESS = "/worklist/events"


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path))
    policies.adopt(ward.database, ward.config, ward.now)
    user(ward, "boss", Role.ADMIN)
    user(ward, "jane")
    token(ward, "t", {Permission.READ})
    ward.arrive("1.1", ago=60)
    ward.judge("1.1", picture=ward.png(), to=("PACS",))
    ward.arrive("1.2", ago=30)
    ward.judge("1.2", Status.NEGATIVE)
    ward.arrive("1.3")
    ward.refuse("1.3", "missing slices")
    ward.database.reading.save_view("boss", "Mine", "band=severe")
    yield ward
    ward.database.close()


def cases(operation: APIOperation) -> st.SearchStrategy[Case]:
    """What the schema allows, with what there is in the path and with anything; and what it does not."""

    def placed(case: Case, path: dict[str, object]) -> Case:
        case.path_parameters.update({name: path[name] for name in case.path_parameters if name in path})
        return case

    allowed = operation.as_strategy()
    found = st.builds(placed, allowed, st.fixed_dictionaries(THERE_IS))
    return st.one_of(found, allowed, operation.as_strategy(GenerationMode.NEGATIVE))


def test_no_request_breaks_the_api(ward: Ward, subtests: pytest.Subtests) -> None:
    app = ward.app()
    cookie = entered(ward, "boss")._client.cookies["triage_session"]
    headers = {"Cookie": f"triage_session={cookie}", "Sec-Fetch-Site": "same-origin"}
    schema = schemathesis.openapi.from_asgi("/api/v1/openapi.json", app).exclude(path=ENDLESS)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        with subtests.test(operation.label):

            @settings(
                max_examples=EXAMPLES,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(cases(operation))
            def one(case: Case) -> None:
                case.call_and_validate(headers=headers, checks=CHECKS)

            one()
