"""Reading sessions: a model with levels reads documents, learns from them, and says what it knew before and after."""

from nestling.reading.documents import Text, find_texts
from nestling.reading.journal import Stopped
from nestling.reading.page import page
from nestling.reading.session import Session
from nestling.reading.settings import Settings

__all__ = ["Session", "Settings", "Stopped", "Text", "find_texts", "page"]
