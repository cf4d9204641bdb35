"""Reading sessions: a model with levels reads documents, learns from them, and says what it knew before and after."""

from nestling.sessions.documents import Text, find_texts
from nestling.sessions.journal import Stopped
from nestling.sessions.page import page
from nestling.sessions.session import Session
from nestling.sessions.settings import Settings

__all__ = ["Session", "Settings", "Stopped", "Text", "find_texts", "page"]
