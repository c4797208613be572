"""How such a service is usually written: a synchronous BentoML API, Feast's SDK, a scikit-learn pipeline on a DataFrame.

Everything is left as the libraries have it. The forest predicts on one thread, which is faster for one row.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import bentoml


@bentoml.service(name="typical")
class Typical:
    """Churn probability of a user."""

    def __init__(self) -> None:
        import joblib

        from jobs import dataset
        from jobs.settings import load_settings

        about = json.loads(Path(os.environ["BENCH_MODEL"], "features.json").read_text())
        self.names = [feature["name"] for feature in about["features"]]
        self.types = {f["name"]: object if f["kind"] == "category" else float for f in about["features"]}
        self.fill = {
            f["name"]: f["default"] if f["null_category"] is None else f["null_category"]
            for f in about["features"]
            if f["default"] is not None or f["null_category"] is not None
        }
        self.threshold = about["threshold"]
        self.pipeline = joblib.load(Path(os.environ["BENCH_MODEL"], "pipeline.joblib"))
        self.store = dataset.feature_store(load_settings())
        self.features = self.store.get_feature_service(dataset.FEATURE_SERVICE)

    @bentoml.api
    def predict(self, user_id: str) -> dict[str, Any]:
        """Look up, score, answer."""
        rows = self.store.get_online_features(features=self.features, entity_rows=[{"user_id": user_id}]).to_df()
        frame = rows[self.names].fillna(self.fill).astype(self.types)
        probability = float(self.pipeline.predict_proba(frame)[0, 1])
        return {"user_id": user_id, "churn_probability": probability, "churn": probability >= self.threshold}
