"""Which tests start real sandboxes: they carry the marker `boxes`."""

from __future__ import annotations

import pytest

PLAIN = {"test_log", "test_recorded", "test_display", "test_vm_parts"}  # these start none


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "sandbox" and item.path.stem not in PLAIN:
            item.add_marker("boxes")
