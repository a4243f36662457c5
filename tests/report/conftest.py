import base64

import pytest

from lorax.report import page

ONE_PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not drawn, which is most of the time: for tests that read the words."""
    image = base64.b64decode(ONE_PIXEL)
    monkeypatch.setattr(page, "lay_out", lambda figure: None)
    monkeypatch.setattr(page, "png", lambda figure: image)
    monkeypatch.setattr(page, "pdf", lambda figure: b"%PDF")
