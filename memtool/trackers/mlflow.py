"""MLflow: the server of MLFLOW_TRACKING_URI, else `mlflow.db` (SQLite) in the folder."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from memtool.trackers import Card, Points

MOST_IN_BATCH = 1000
MOST_IN_PARAMETER = 6000
"""Bounds of MLflow: metrics in a call, characters in a parameter."""

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Mlflow:
    """A run of the experiment `memtool: <group>`."""

    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""

    def begin(self, card: Card) -> str:
        """Make the experiment where there is none, and a run in it."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for talker in ("mlflow", "alembic"):  # after the import, which sets them itself
            logging.getLogger(talker).setLevel(logging.WARNING)

        folder = card.shared.absolute()
        address = os.environ.get("MLFLOW_TRACKING_URI")
        place = None
        if not address:
            folder.mkdir(parents=True, exist_ok=True)
            address = f"sqlite:///{folder / 'mlflow.db'}"
            place = (folder / "mlflow-artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=address)
        name = f"memtool: {card.group}"
        known = self._client.get_experiment_by_name(name)
        experiment = (
            self._client.create_experiment(name, artifact_location=place)
            if known is None
            else known.experiment_id
        )
        tags = {f"tag.{tag}": "yes" for tag in card.tags}
        if card.note:
            tags["mlflow.note.content"] = card.note
        run = self._client.create_run(experiment, run_name=card.name, tags=tags)
        self._id = run.info.run_id
        parameters = [Param(_plain(key), _text(value)) for key, value in card.settings.items()]
        for low in range(0, len(parameters), 100):
            self._client.log_batch(self._id, params=parameters[low : low + 100])
        shown = _without_password(address)
        is_server = address.startswith(("http://", "https://"))
        return shown if is_server else f"mlflow ui --backend-store-uri {shown}"

    def log(self, points: Iterable[Points]) -> None:
        """Send numbers, as many at once as a call takes."""
        from mlflow.entities import Metric

        found = [
            Metric(_plain(name), value, round(at.time * 1000), at.step)
            for at in points
            for name, value in at.values.items()
        ]
        for low in range(0, len(found), MOST_IN_BATCH):
            self._client.log_batch(self._id, metrics=found[low : low + MOST_IN_BATCH])

    def end(self, *, failed: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _without_password(address: str) -> str:
    """An address without what stands between `://` and `@`: who asks, and the password."""
    return re.sub(r"(?<=://)[^/]*@", "", address)


def _plain(name: str) -> str:
    """A name of letters that MLflow takes."""
    return re.sub(r"[^\w.\- /]+", "_", name)


def _text(value: Mapping[str, Any] | Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:MOST_IN_PARAMETER]
