"""What gives access never stands in a text that goes to a person or a file."""

from __future__ import annotations

import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtool_stores import StorageError
from memtool_stores.redacted import redacted

SECRETS = st.text(string.ascii_letters + string.digits + "/+=-_.!@:", min_size=12, max_size=60)
AROUND = st.text(string.ascii_letters + " \n:/?&='\"<>", max_size=30)
VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")

a_monkeypatch_for_all = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@a_monkeypatch_for_all
@given(secret=SECRETS, before=AROUND, after=AROUND, name=st.sampled_from(VARIABLES))
def test_the_value_of_a_secret_variable_goes_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, secret: str, before: str, after: str, name: str
) -> None:
    monkeypatch.setenv(name, secret)
    assert secret not in redacted(f"{before}{secret}{after}")
    error = StorageError(f"{before}{secret}", expected=secret, remedy=f"{secret}{after}")
    assert secret not in f"{error}{error!r}{error.args}{vars(error)}"


PASSWORD = "tr0ub4dor3"
KEY_ID = "AKIAIOSFODNN7EXAMPLE"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{PASSWORD}@host:9000",
        f"no answer from https://{PASSWORD}@host/bucket?x=1",
        f"https://user:p@{PASSWORD}@host",
        f"GET https://b.s3.amazonaws.com/k?X-Amz-Credential={KEY_ID}%2F20&X-Amz-Signature={PASSWORD}",
        f"https://b.s3.amazonaws.com/k?X-Amz-Security-Token={PASSWORD}&x=1",
        f"https://host/k?AWSAccessKeyId=abc&Signature={PASSWORD}&Expires=1",
        f"https://host/k?sig={PASSWORD}",
        f"<Error><AWSAccessKeyId>{PASSWORD}</AWSAccessKeyId></Error>",
        f"AWS_SECRET_ACCESS_KEY={PASSWORD}",
        f'S3Config {{ secret_access_key: Some("{PASSWORD}") }}',
        f"{{'aws_session_token': '{PASSWORD}'}}",
        f"authorization: AWS4-HMAC-SHA256 Credential={KEY_ID}/x, Signature={PASSWORD}",
        f"x-amz-security-token: {PASSWORD}",
        f"the key {KEY_ID} is not known",
    ],
)
def test_what_a_stranger_left_in_a_message_goes(text: str) -> None:
    told = redacted(text)
    assert PASSWORD not in told
    assert KEY_ID not in told


@pytest.mark.parametrize(
    "text",
    [
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a profile, `aws configure "
        "export-credentials --format env` prints them",
        "no adapter 'photo' in s3://bucket/me@home",
        "could not read https://host/path@2: token 3 of 77, token=3",
        "store@v1~2: the keys of 10 rows; key: value",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text
