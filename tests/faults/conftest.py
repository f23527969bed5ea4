"""How hard hypothesis tries: the same few examples in `make test`, FAULTS_EXAMPLES new ones where that is set."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
settings.register_profile("quick", max_examples=15, deadline=None, derandomize=True, suppress_health_check=checks)
settings.register_profile(
    "full",
    max_examples=int(os.environ.get("FAULTS_EXAMPLES", "1000")),
    deadline=None,
    database=None,
    suppress_health_check=checks,
)
settings.load_profile("full" if "FAULTS_EXAMPLES" in os.environ else "quick")
