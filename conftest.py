"""Every test session: one torch thread, reproducible property tests, and the Python blocks of the Markdown pages as tests."""

import os
from typing import Any

import pytest
import torch
from hypothesis import settings
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# More threads than free cores make small batched LAPACK a thousand times slower.
torch.set_num_threads(1)

# A deadline would time the machine. In CI the same examples come every time, so that a red run can be repeated.
settings.register_profile("difflayers", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("difflayers")

# The pages of docs/ are tested, its scripts are not imported: what the gallery has copied there would run.
collect_ignore = ["docs/_build", "docs/auto_examples", "docs/conf.py", "docs/check_offline.py"]

# The blocks of one page share their names, as a reader would expect who types them in order.
pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], pattern="*.md").pytest()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``pytest -n 2``: any test to any process, but all blocks of a page to the same one."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            page, _, block = nodeid.partition("::")
            return page if page.endswith(".md") and block else nodeid

    return Scheduling(config, log)
